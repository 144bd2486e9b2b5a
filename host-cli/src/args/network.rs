//! The options of `run` and `create` that are about networks and ports, and the networks' own commands.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};

#[derive(Debug, Args)]
pub(crate) struct NetworkArgs {
    #[command(subcommand)]
    pub(crate) command: NetworkCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Make a network
    Create {
        /// Its addresses, for example 10.5.0.0/24; once for each family
        #[arg(long, value_name = "ADDRESS/LENGTH")]
        subnet: Vec<String>,
        /// The guest's own address in a subnet
        #[arg(long, value_name = "ADDRESS")]
        gateway: Vec<String>,
        /// Give containers of a subnet these addresses only
        #[arg(long, value_name = "ADDRESS/LENGTH")]
        ip_range: Vec<String>,
        /// Also IPv6
        #[arg(long)]
        ipv6: bool,
        /// No way leads out of it
        #[arg(long)]
        internal: bool,
        /// Labels, KEY=VALUE
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        /// Options of the bridge, KEY=VALUE
        #[arg(short, long, value_name = "KEY=VALUE")]
        opt: Vec<String>,
        /// Its name
        name: String,
    },
    /// List networks
    #[command(alias = "list")]
    Ls {
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show everything known of networks as JSON
    Inspect {
        /// The networks
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove networks
    #[command(alias = "remove")]
    Rm {
        /// The networks
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Put a container on a further network
    Connect {
        /// Its IPv4 address
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<String>,
        /// Its IPv6 address
        #[arg(long, value_name = "ADDRESS")]
        ip6: Option<String>,
        /// A further name there
        #[arg(long)]
        alias: Vec<String>,
        network: String,
        container: String,
    },
    /// Take a container off a network
    Disconnect {
        /// Also off one that is gone
        #[arg(short, long)]
        force: bool,
        network: String,
        container: String,
    },
    /// Remove networks that no running container is on
    Prune,
}

/// What a container's networks and ports shall be.
#[derive(Debug, Default, Args)]
pub(crate) struct NetworkOptions {
    /// Its network: bridge (the default), host, none, container:NAME, or one of yours
    #[arg(long, alias = "net", value_name = "NETWORK")]
    network: Option<String>,
    /// A further name on its network
    #[arg(long, alias = "net-alias", value_name = "NAME")]
    network_alias: Vec<String>,
    /// Its IPv4 address
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<String>,
    /// Its IPv6 address
    #[arg(long, value_name = "ADDRESS")]
    ip6: Option<String>,
    /// Its hardware address
    #[arg(long, value_name = "ADDRESS")]
    mac_address: Option<String>,
    /// Publish a port of it on this computer
    #[arg(short, long, value_name = "[[ADDRESS:]PORT:]PORT[/PROTOCOL]")]
    publish: Vec<String>,
    /// Publish all ports that it exposes
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// Ports that it serves
    #[arg(long, value_name = "PORT[-PORT][/PROTOCOL]")]
    expose: Vec<String>,
    /// Name servers instead of this computer's
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    /// Domains in which names are looked up
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// Options of the resolver
    #[arg(long, value_name = "OPTION")]
    dns_option: Vec<String>,
    /// Lines for /etc/hosts; host-gateway is this computer's address
    #[arg(long, value_name = "NAME:ADDRESS")]
    add_host: Vec<String>,
    /// Know another container by a name
    #[arg(long, value_name = "CONTAINER[:NAME]")]
    link: Vec<String>,
}

/// The members of `HostConfig` that these options make.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct HostNetwork {
    #[serde(skip_serializing_if = "String::is_empty")]
    network_mode: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    port_bindings: BTreeMap<String, Vec<PortBinding>>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    publish_all_ports: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    dns: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    dns_search: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    dns_options: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    extra_hosts: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    links: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct PortBinding {
    host_ip: String,
    host_port: String,
}

impl NetworkOptions {
    /// The part of `HostConfig`.
    pub(super) fn host(&self) -> Result<HostNetwork> {
        let mut port_bindings: BTreeMap<String, Vec<PortBinding>> = BTreeMap::new();
        for text in &self.publish {
            for (port, binding) in publish(text)? {
                port_bindings.entry(port).or_default().push(binding);
            }
        }
        Ok(HostNetwork {
            network_mode: self.network.clone().unwrap_or_default(),
            port_bindings,
            publish_all_ports: self.publish_all,
            dns: self.dns.clone(),
            dns_search: self.dns_search.clone(),
            dns_options: self.dns_option.clone(),
            extra_hosts: self.add_host.clone(),
            links: self.link.clone(),
        })
    }

    /// `ExposedPorts`: those of `--expose`, and those that are published.
    pub(super) fn exposed(&self) -> Result<BTreeMap<String, Value>> {
        let mut exposed = BTreeMap::new();
        for text in &self.expose {
            let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
            let (first, last) = ports(range).with_context(|| format!("`{text}` is no port to expose"))?;
            exposed.extend((first..=last).map(|port| (format!("{port}/{protocol}"), json!({}))));
        }
        exposed.extend(self.host()?.port_bindings.into_keys().map(|port| (port, json!({}))));
        Ok(exposed)
    }

    /// `NetworkingConfig`, if more is said than the network's name.
    pub(super) fn endpoints(&self) -> Option<Value> {
        let endpoint = endpoint(
            self.ip.as_deref(),
            self.ip6.as_deref(),
            &self.network_alias,
            self.mac_address.as_deref(),
        )?;
        let network = self.network.as_deref().unwrap_or("bridge");
        Some(json!({ "EndpointsConfig": { network: endpoint } }))
    }
}

/// Docker's `EndpointSettings`; none if nothing is said.
pub(crate) fn endpoint(
    ip: Option<&str>,
    ip6: Option<&str>,
    aliases: &[String],
    mac: Option<&str>,
) -> Option<Value> {
    if ip.is_none() && ip6.is_none() && aliases.is_empty() && mac.is_none() {
        return None;
    }
    Some(json!({
        "IPAMConfig": { "IPv4Address": ip.unwrap_or_default(), "IPv6Address": ip6.unwrap_or_default() },
        "Aliases": aliases,
        "MacAddress": mac.unwrap_or_default(),
    }))
}

/// `[[ADDRESS:][HOSTPORT]:]PORT[/PROTOCOL]`, where both ports may be ranges: each of the container's ports and where it is.
fn publish(text: &str) -> Result<Vec<(String, PortBinding)>> {
    let wrong = || format!("`{text}` is no port to publish: expected [[ADDRESS:]PORT:]PORT[/PROTOCOL]");
    let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let (rest, inside) = rest.rsplit_once(':').unwrap_or(("", rest));
    let (address, outside) = match rest.strip_prefix('[') {
        // An IPv6 address.
        Some(rest) => {
            let (address, outside) = rest.split_once(']').with_context(wrong)?;
            (address, outside.strip_prefix(':').unwrap_or(outside))
        }
        None => rest.rsplit_once(':').unwrap_or(("", rest)),
    };
    let (first, last) = ports(inside).with_context(wrong)?;
    let host: Vec<String> = match outside {
        "" => (first..=last).map(|_| String::new()).collect(),
        _ => {
            let (low, high) = ports(outside).with_context(wrong)?;
            if first == last {
                // One of a range.
                vec![outside.to_owned()]
            } else if last - first == high - low {
                (low..=high).map(|port| port.to_string()).collect()
            } else {
                bail!("`{text}` publishes ranges of different lengths");
            }
        }
    };
    let inside = (first..=last).map(|port| format!("{port}/{protocol}"));
    let binding = |host_port| PortBinding { host_ip: address.to_owned(), host_port };
    Ok(inside.zip(host.into_iter().map(binding)).collect())
}

fn ports(text: &str) -> Result<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.parse()?, last.parse()?);
    if first == 0 || first > last {
        bail!("`{text}` is no port");
    }
    Ok((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_published_in_all_forms() {
        for (text, expected) in [
            ("80", &[("80/tcp", "", "")][..]),
            ("8080:80", &[("80/tcp", "", "8080")]),
            ("127.0.0.1:8080:80", &[("80/tcp", "127.0.0.1", "8080")]),
            ("127.0.0.1::80/udp", &[("80/udp", "127.0.0.1", "")]),
            ("[::1]:8080:80", &[("80/tcp", "::1", "8080")]),
            ("8000-8001:80-81", &[("80/tcp", "", "8000"), ("81/tcp", "", "8001")]),
            ("8000-8010:80", &[("80/tcp", "", "8000-8010")]),
        ] {
            let read = publish(text).unwrap();
            let read: Vec<_> = read
                .iter()
                .map(|(port, binding)| (port.as_str(), binding.host_ip.as_str(), binding.host_port.as_str()))
                .collect();
            assert_eq!(read, expected, "{text}");
        }
        for bad in ["", "x", "0", "70000", "1:2:3:4x", "8000-8001:80-82", "81-80"] {
            assert!(publish(bad).is_err(), "{bad}");
        }
    }
}
