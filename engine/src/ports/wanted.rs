//! What a client wants to be published (`-p`, `-P`, `--expose`), by Docker's rules.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use serde::{Deserialize, Serialize};

use crate::{
    container::config::{Config, HostConfig},
    error::{Error, Result},
};

/// Ports of one container at most.
const MAX_PORTS: usize = 4096;

/// What is published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    #[default]
    Tcp,
    Udp,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// One of those that can be named; `port` is what it was said of.
    fn of(name: &str, port: &str) -> Result<Self> {
        match name {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            other => Err(Error::unsupported(format!(
                "publishing {} ports is not supported by Coracle: leave {} out",
                other.to_uppercase(),
                shown(port)
            ))),
        }
    }
}

/// A wish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// In the container.
    pub(crate) port: u16,
    pub(crate) protocol: Protocol,
    /// On all addresses of the host, if there is none.
    pub(crate) host_ip: Option<IpAddr>,
    /// One of these; 0 is any.
    pub(crate) host_ports: RangeInclusive<u16>,
}

impl Wanted {
    /// The addresses that are bound.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        match self.host_ip {
            Some(ip) => vec![ip],
            None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        }
    }
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// `80/tcp`: the number and the protocol.
pub(crate) fn split(text: &str) -> Result<(u16, &str)> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let bad = || Error::invalid(format!("invalid port specification: {:?}", shown(text)));
    let number: u16 = number.parse().map_err(|_| bad())?;
    if number == 0 || !matches!(protocol, "tcp" | "udp" | "sctp") {
        return Err(bad());
    }
    Ok((number, protocol))
}

/// All wishes of a container.
pub(crate) fn of(config: &Config, host: &HostConfig) -> Result<Vec<Wanted>> {
    let mut all = Vec::new();
    for (text, bindings) in &host.port_bindings {
        let (port, protocol) = split(text)?;
        if bindings.is_empty() {
            continue;
        }
        let protocol = Protocol::of(protocol, text)?;
        for binding in bindings {
            let host_ip = match binding.host_ip.trim_start_matches('[').trim_end_matches(']') {
                "" => None,
                ip => Some(
                    ip.parse().map_err(|_| Error::invalid(format!("invalid IP address: {}", shown(ip))))?,
                ),
            };
            all.push(Wanted { port, protocol, host_ip, host_ports: range(&binding.host_port)? });
        }
    }
    if host.publish_all_ports {
        for text in config.exposed_ports.keys() {
            let (port, protocol) = split(text)?;
            let said = host.port_bindings.get(text).is_some_and(|bindings| !bindings.is_empty());
            if !said {
                let protocol = Protocol::of(protocol, text)?;
                all.push(Wanted { port, protocol, host_ip: None, host_ports: 0..=0 });
            }
        }
    }
    if all.len() > MAX_PORTS {
        return Err(Error::invalid(format!("a container can publish {MAX_PORTS} ports at most")));
    }
    Ok(all)
}

/// `8080`, `8000-8010`, or nothing for any.
fn range(text: &str) -> Result<RangeInclusive<u16>> {
    let bad = || Error::invalid(format!("invalid port range: value is {:?}", shown(text)));
    if text.is_empty() {
        return Ok(0..=0);
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
    if first > last || (first == 0 && last != 0) { Err(bad()) } else { Ok(first..=last) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Vec<Wanted>> {
        let config = serde_json::from_str(r#"{"ExposedPorts":{"80/tcp":{},"53/udp":{}}}"#).unwrap();
        of(&config, &serde_json::from_str(json).unwrap())
    }

    #[test]
    fn wishes_are_read_in_all_forms() {
        let wanted = read(
            r#"{"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"},{"HostIp":"::1","HostPort":"8000-8010"}],
                "443":[{"HostPort":""}],"99/udp":[]}}"#,
        )
        .unwrap();
        let ports: Vec<_> = wanted.iter().map(|one| (one.port, one.host_ports.clone())).collect();
        assert_eq!(ports, [(443, 0..=0), (80, 8080..=8080), (80, 8000..=8010)]);
        assert_eq!(wanted[0].addresses().len(), 2);
        assert_eq!(wanted[2].addresses(), ["::1".parse::<IpAddr>().unwrap()]);
        let all = read(r#"{"PublishAllPorts":true}"#).unwrap();
        let any = |port, protocol| Wanted { port, protocol, host_ip: None, host_ports: 0..=0 };
        assert_eq!(all, [any(53, Protocol::Udp), any(80, Protocol::Tcp)]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (json, status) in [
            (r#"{"PortBindings":{"0/tcp":[{}]}}"#, 400),
            (r#"{"PortBindings":{"80/icmp":[{}]}}"#, 400),
            (r#"{"PortBindings":{"70000/tcp":[{}]}}"#, 400),
            (r#"{"PortBindings":{"80/tcp":[{"HostPort":"x"}]}}"#, 400),
            (r#"{"PortBindings":{"80/tcp":[{"HostPort":"90-80"}]}}"#, 400),
            (r#"{"PortBindings":{"80/tcp":[{"HostIp":"x"}]}}"#, 400),
            (r#"{"PortBindings":{"80/sctp":[{"HostPort":"80"}]}}"#, 501),
        ] {
            assert_eq!(read(json).unwrap_err().status(), status, "{json}");
        }
    }
}
