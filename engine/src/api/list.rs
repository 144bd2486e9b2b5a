//! `docker ps`: summaries of containers and their filters.

use std::sync::Arc;

use serde_json::{Value, json};

use super::networks;
use crate::{
    container::{Container, files, health::HealthStatus, mounts, record::Record, state::Status},
    core::Core,
    error::{Error, Result},
    http::{filters::Filters, query::Query},
    time::{UnixNanos, human_span},
};

const FILTERS: &[&str] = &[
    "ancestor", "before", "exited", "expose", "health", "id", "is-task", "label", "name", "network",
    "publish", "since", "status", "volume",
];

/// The containers that a query asks for, newest first.
pub(super) fn select(core: &Core, query: &Query) -> Result<Vec<Arc<Container>>> {
    let filters = Filters::of(query, FILTERS)?;
    check(&filters)?;
    let limit = query
        .number::<i64>("limit")?
        .and_then(|limit| usize::try_from(limit).ok())
        .filter(|limit| *limit > 0);
    let everything = query.flag("all")
        || limit.is_some()
        || !filters.values("status").is_empty()
        || !filters.values("exited").is_empty();
    let created = |name: &str| -> Result<Option<UnixNanos>> {
        filters
            .values(name)
            .first()
            .map(|container| Ok(core.containers.find(container)?.record().created))
            .transpose()
    };
    let (before, since) = (created("before")?, created("since")?);
    let mut selected = Vec::new();
    for container in core.containers.all() {
        let record = container.record();
        let fits = (everything || record.state.status.is_active())
            && before.is_none_or(|before| record.created < before)
            && since.is_none_or(|since| record.created > since)
            && matches(&record, &filters)
            && filters.any("health", |wanted| wanted == health_name(&container));
        if fits {
            selected.push(container);
        }
        if limit.is_some_and(|limit| selected.len() >= limit) {
            break;
        }
    }
    Ok(selected)
}

/// Filters whose values are from a closed set.
fn check(filters: &Filters) -> Result<()> {
    let statuses = ["created", "restarting", "running", "removing", "paused", "exited", "dead"];
    if let Some(bad) = filters.values("status").iter().find(|status| !statuses.contains(&status.as_str())) {
        return Err(Error::invalid(format!(
            "invalid filter 'status={}'",
            bad.chars().take(40).collect::<String>()
        )));
    }
    if let Some(bad) = filters.values("exited").iter().find(|code| code.parse::<i32>().is_err()) {
        return Err(Error::invalid(format!(
            "invalid filter 'exited={}'",
            bad.chars().take(40).collect::<String>()
        )));
    }
    let healths = ["starting", "healthy", "unhealthy", "none"];
    if let Some(bad) = filters.values("health").iter().find(|health| !healths.contains(&health.as_str())) {
        return Err(Error::invalid(format!(
            "invalid filter 'health={}'",
            bad.chars().take(40).collect::<String>()
        )));
    }
    let truth = ["1", "0", "true", "false", "True", "False", "t", "f", "T", "F", "TRUE", "FALSE"];
    if let Some(bad) = filters.values("is-task").iter().find(|value| !truth.contains(&value.as_str())) {
        let shown: String = bad.chars().take(40).collect();
        return Err(Error::invalid(format!("invalid filter 'is-task={shown}'")));
    }
    for name in ["expose", "publish"] {
        if let Some(bad) = filters.values(name).iter().find(|value| Ports::parse(value).is_none()) {
            let shown: String = bad.chars().take(40).collect();
            return Err(Error::invalid(format!("invalid filter '{name}={shown}'")));
        }
    }
    Ok(())
}

/// A port or a range of ports with their protocol, as filters write them.
struct Ports<'a> {
    first: u16,
    last: u16,
    protocol: &'a str,
}

impl<'a> Ports<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        let known = ["tcp", "udp", "sctp"].contains(&protocol);
        (known && first <= last).then_some(Self { first, last, protocol })
    }

    fn meets(&self, other: &Ports<'_>) -> bool {
        self.protocol == other.protocol && self.first <= other.last && other.first <= self.last
    }
}

fn exposes(record: &Record, wanted: &str) -> bool {
    let Some(wanted) = Ports::parse(wanted) else { return false };
    record.config.exposed_ports.keys().filter_map(|port| Ports::parse(port)).any(|port| port.meets(&wanted))
}

fn publishes(record: &Record, wanted: &str) -> bool {
    let Some(wanted) = Ports::parse(wanted) else { return false };
    record.ports.iter().any(|published| {
        let port = published.host.port();
        wanted.meets(&Ports { first: port, last: port, protocol: published.protocol.name() })
    })
}

/// Whether a container fits filters that need nothing but its record.
pub(super) fn matches(record: &Record, filters: &Filters) -> bool {
    let image = record.image().to_string();
    let ancestor = |wanted: &str| {
        let own = &record.config.image;
        own == wanted
            || own.strip_suffix(":latest") == Some(wanted)
            || wanted.strip_suffix(":latest") == Some(own.as_str())
            || image == wanted
            || wanted.len() >= 4 && image.trim_start_matches("sha256:").starts_with(wanted)
    };
    filters.any("id", |wanted| record.id.as_str().starts_with(wanted))
        && filters.any("name", |wanted| name_fits(&record.name, wanted))
        && filters.any("status", |wanted| wanted == record.state.status.name())
        && filters.any("exited", |wanted| {
            record.state.status == Status::Exited && wanted.parse() == Ok(record.state.exit_code)
        })
        && filters.any("ancestor", ancestor)
        && filters.any("volume", |wanted| {
            record.volumes.iter().any(|attached| attached.volume == wanted || attached.path == wanted)
                || record.binds.iter().any(|bind| bind.source == wanted || bind.path == wanted)
        })
        && filters.any("network", |wanted| {
            record.networks.iter().any(|(name, attached)| {
                name == wanted || !attached.network.is_empty() && attached.network.starts_with(wanted)
            })
        })
        && filters.any("expose", |wanted| exposes(record, wanted))
        // There is no swarm whose task a container could be.
        && filters.any("is-task", |wanted| matches!(wanted, "0" | "false" | "False" | "f" | "F" | "FALSE"))
        && filters.any("publish", |wanted| publishes(record, wanted))
        && filters.labels("label", |name| record.config.labels.get(name).map(String::as_str))
}

fn health_name(container: &Container) -> &'static str {
    container.health().map_or("none", |health| health.status.name())
}

/// Docker takes a regular expression; what people write is a part of a name, with `^` and `$` at most.
fn name_fits(name: &str, wanted: &str) -> bool {
    let wanted = wanted.strip_prefix("^/").or_else(|| wanted.strip_prefix('/')).map_or_else(
        || wanted.strip_prefix('^').map_or((false, wanted), |rest| (true, rest)),
        |rest| (true, rest),
    );
    let (from_start, wanted) = wanted;
    match (from_start, wanted.strip_suffix('$')) {
        (true, Some(whole)) => name == whole,
        (true, None) => name.starts_with(wanted),
        (false, Some(end)) => name.ends_with(end),
        (false, None) => name.contains(wanted),
    }
}

/// One entry of the list.
pub(crate) fn summary(core: &Core, container: &Container) -> Value {
    let record = &container.record();
    let state = &record.state;
    json!({
        "Id": record.id.as_str(),
        "Names": [format!("/{}", record.name)],
        "Image": record.config.image,
        "ImageID": record.image().to_string(),
        "Command": command_line(record),
        "Created": record.created.seconds(),
        "Ports": networks::port_list(record),
        "Labels": record.config.labels,
        "State": state.status.name(),
        "Status": status_line(record, container.health().map(|health| health.status)),
        "HostConfig": { "NetworkMode": record.host_config.network_mode },
        "NetworkSettings": { "Networks": networks::of_container(core, record) },
        "Mounts": mounts::describe(core, record),
    })
}

/// Adds a container's sizes, if they can be had: a list is not lost over one of its members.
pub(crate) async fn add_sizes(core: &Arc<Core>, container: &Container, summary: &mut Value) {
    match files::sizes(core, container).await {
        Ok((written, all)) => {
            summary["SizeRw"] = json!(written);
            summary["SizeRootFs"] = json!(all);
        }
        Err(error) => tracing::warn!(%error, name = container.record().name, "cannot measure a container"),
    }
}

fn command_line(record: &Record) -> String {
    let quoted = |argument: &String| {
        if argument.contains(' ') { format!("'{}'", argument.replace('\'', "\\'")) } else { argument.clone() }
    };
    record.config.command().iter().map(quoted).collect::<Vec<_>>().join(" ")
}

fn status_line(record: &Record, health: Option<HealthStatus>) -> String {
    let now = UnixNanos::now();
    let ago =
        |time: Option<UnixNanos>| human_span(time.map_or(0, |time| now.0.saturating_sub(time.0).max(0)));
    let state = &record.state;
    match state.status {
        Status::Created => "Created".to_owned(),
        Status::Running => match health {
            None => format!("Up {}", ago(state.started)),
            Some(HealthStatus::Starting) => format!("Up {} (health: starting)", ago(state.started)),
            Some(health) => format!("Up {} ({})", ago(state.started), health.name()),
        },
        Status::Paused => format!("Up {} (Paused)", ago(state.started)),
        Status::Restarting => {
            format!("Restarting ({}) {} ago", state.exit_code, ago(state.finished))
        }
        Status::Exited => format!("Exited ({}) {} ago", state.exit_code, ago(state.finished)),
        Status::Removing => "Removal In Progress".to_owned(),
        Status::Dead => "Dead".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_as_people_write_them() {
        for (name, wanted, fits) in [
            ("web-1", "web", true),
            ("web-1", "eb-", true),
            ("web-1", "^/web-1$", true),
            ("web-1", "^web$", false),
            ("web-1", "/web-1", true),
            ("web-1", "1$", true),
            ("web-1", "db", false),
        ] {
            assert_eq!(name_fits(name, wanted), fits, "{name} {wanted}");
        }
    }
}
