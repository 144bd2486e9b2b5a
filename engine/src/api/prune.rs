//! `/containers/prune`.

use serde_json::json;

use super::list;
use crate::{
    container::{files, state::Status},
    error::{Error, Result},
    http::{Request, Response, body, filters::Filters},
    time::UnixNanos,
};

pub(crate) async fn containers(request: &Request) -> Result<Response> {
    let filters = Filters::of(&request.query, &["until", "label", "label!"])?;
    let until = match filters.values("until") {
        [] => None,
        [one] => Some(until(one)?),
        _ => return Err(Error::invalid("more than one until filter specified")),
    };
    let mut removed = Vec::new();
    let mut reclaimed: u64 = 0;
    for container in request.core.containers.all() {
        let record = container.record();
        let label = |wanted: &String| match wanted.split_once('=') {
            Some((name, value)) => record.config.labels.get(name).is_some_and(|own| own == value),
            None => record.config.labels.contains_key(wanted),
        };
        let unwanted = filters.values("label!").iter().any(label);
        let ended = matches!(record.state.status, Status::Created | Status::Exited | Status::Dead);
        let old = until.is_none_or(|until| record.created < until);
        if !ended || unwanted || !old || !list::matches(&record, &filters) {
            continue;
        }
        // No sandbox is started to be asked for sizes.
        let size = match request.core.sandboxes.get(&record.sandbox).is_running() {
            true => files::sizes(&request.core, &container).await.map_or(0, |(written, _)| written),
            false => 0,
        };
        match container.remove(false, false).await {
            Ok(()) => {
                removed.push(record.id.to_string());
                reclaimed = reclaimed.saturating_add(size);
            }
            Err(error) => tracing::warn!(%error, name = record.name, "cannot prune a container"),
        }
    }
    Ok(body::ok(&json!({ "ContainersDeleted": removed, "SpaceReclaimed": reclaimed })))
}

/// A point in time, or a span before now (`24h`, `10m30s`).
pub(super) fn until(text: &str) -> Result<UnixNanos> {
    if let Some(span) = span_nanos(text) {
        return Ok(UnixNanos(UnixNanos::now().0.saturating_sub(span)));
    }
    UnixNanos::parse_query(text).map_err(|error| Error::invalid(error.to_string()))
}

fn span_nanos(text: &str) -> Option<i64> {
    let mut rest = text;
    let mut total: i64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: i64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let seconds = match &rest[digits..unit_end] {
            "h" => 3600,
            "m" => 60,
            "s" => 1,
            _ => return None,
        };
        total = total.checked_add(number.checked_mul(seconds)?.checked_mul(1_000_000_000)?)?;
        rest = &rest[unit_end..];
    }
    (total > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_go_writes_them() {
        assert_eq!(span_nanos("1h"), Some(3_600_000_000_000));
        assert_eq!(span_nanos("1m30s"), Some(90_000_000_000));
        for no in ["", "1", "h", "1x", "1h-1m", "99999999999999999999h"] {
            assert_eq!(span_nanos(no), None, "{no}");
        }
    }
}
