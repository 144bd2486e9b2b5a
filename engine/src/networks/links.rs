//! `--link` on the default bridge: the other container's address in /etc/hosts, and its particulars in the environment, as Docker has it.
//! On networks of clients' own, links are names that the name server knows.

use crate::{
    container::{config::env_name, record::Record},
    core::Core,
    error::{Error, Result},
    networks::endpoint::split_link,
};

/// A container that another one knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    /// Its address.
    pub(crate) address: String,
    /// What it is called, with spaces in between.
    pub(crate) names: String,
    /// `NAME=value`.
    pub(crate) env: Vec<String>,
}

impl Core {
    /// The links of a container that is about to start; those whom it knows must run.
    pub(crate) fn links(&self, record: &Record) -> Result<Vec<Link>> {
        if !record.networks.contains_key("bridge") {
            return Ok(Vec::new());
        }
        let mut links = Vec::with_capacity(record.host_config.links.len());
        for link in &record.host_config.links {
            let (name, alias) = split_link(link)?;
            let other = self
                .containers
                .find(name)
                .map_err(|error| error.context(format!("could not get container for {name}")))?;
            let other = other.record();
            let lease = other.networks.get("bridge").and_then(|attached| attached.lease.as_ref());
            let address = lease.and_then(|lease| lease.addresses.iter().find(|net| net.addr().is_ipv4()));
            let Some(address) = address.filter(|_| other.state.status.is_running()) else {
                return Err(Error::conflict(format!(
                    "Cannot link to a non running container: /{} AS /{}/{alias}",
                    other.name, record.name
                )));
            };
            links.push(describe(record, &other, alias, &address.addr().to_string()));
        }
        Ok(links)
    }
}

fn describe(record: &Record, other: &Record, alias: &str, address: &str) -> Link {
    let mut names = vec![alias];
    for name in [other.config.hostname.as_str(), other.name.as_str()] {
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    let prefix = alias.to_uppercase().replace('-', "_");
    let mut env = vec![format!("{prefix}_NAME=/{}/{alias}", record.name)];
    let mut ports: Vec<(u16, &str)> =
        other.config.exposed_ports.keys().filter_map(|port| split_port(port)).collect();
    ports.sort_by_key(|(port, protocol)| (*protocol != "tcp", *port));
    for (at, (port, protocol)) in ports.iter().enumerate() {
        let url = format!("{protocol}://{address}:{port}");
        let name = format!("{prefix}_PORT_{port}_{}", protocol.to_uppercase());
        if at == 0 {
            env.push(format!("{prefix}_PORT={url}"));
        }
        env.push(format!("{name}={url}"));
        env.push(format!("{name}_ADDR={address}"));
        env.push(format!("{name}_PORT={port}"));
        env.push(format!("{name}_PROTO={protocol}"));
    }
    let own = other.config.env.iter().filter(|variable| !matches!(env_name(variable), "PATH" | "HOME"));
    env.extend(
        own.filter(|variable| variable.contains('=')).map(|variable| format!("{prefix}_ENV_{variable}")),
    );
    Link { address: address.to_owned(), names: names.join(" "), env }
}

fn split_port(text: &str) -> Option<(u16, &str)> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    Some((port.parse().ok()?, protocol))
}
