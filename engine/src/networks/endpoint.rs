//! A container's place on a network: what the client asked of it, and what it got.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use coracle_agent_api::Mac;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A name for the container's interface.
const INTERFACE_NAME: &str = "com.docker.network.endpoint.ifname";

/// The part of Docker's `EndpointSettings` that clients set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct Wanted {
    #[serde(rename = "IPAMConfig", skip_serializing_if = "Option::is_none")]
    pub(crate) ipam: Option<WantedAddresses>,
    pub(crate) links: Vec<String>,
    pub(crate) mac_address: String,
    pub(crate) aliases: Vec<String>,
    pub(crate) driver_opts: BTreeMap<String, String>,
    pub(crate) gw_priority: i64,
}

/// Docker's `EndpointIPAMConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct WantedAddresses {
    #[serde(rename = "IPv4Address", skip_serializing_if = "String::is_empty")]
    pub(crate) ipv4: String,
    #[serde(rename = "IPv6Address", skip_serializing_if = "String::is_empty")]
    pub(crate) ipv6: String,
    #[serde(rename = "LinkLocalIPs", skip_serializing_if = "Vec::is_empty")]
    pub(crate) link_local: Vec<String>,
}

/// What an endpoint has for as long as its container runs; later runs get the same again if no one else has taken it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    /// The endpoint's id.
    pub(crate) endpoint: String,
    /// The interface's name in the container.
    pub(crate) interface: String,
    pub(crate) mac: Option<Mac>,
    /// With the network's prefix.
    pub(crate) addresses: Vec<IpNet>,
}

/// A container's place on a network, in its record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attached {
    pub(crate) wanted: Wanted,
    pub(crate) lease: Option<Lease>,
    /// The network that the lease is of.
    #[serde(default)]
    pub(crate) network: String,
}

impl Wanted {
    /// Checks what does not depend on the network.
    pub(crate) fn check(&self) -> Result<()> {
        self.static_addresses()?;
        self.mac()?;
        self.interface()?;
        if let Some(option) = self.driver_opts.keys().find(|option| *option != INTERFACE_NAME) {
            return Err(Error::unsupported(format!(
                "the network driver's option `{}` is not supported by Coracle yet: leave it out",
                shown(option)
            )));
        }
        if self.ipam.as_ref().is_some_and(|ipam| !ipam.link_local.is_empty()) {
            return Err(Error::unsupported("--link-local-ip is not supported by Coracle yet: leave it out"));
        }
        for alias in &self.aliases {
            let legal =
                !alias.is_empty() && alias.len() <= 253 && alias.bytes().all(|b| b.is_ascii_graphic());
            if !legal {
                return Err(Error::invalid(format!("invalid network alias: {:?}", shown(alias))));
            }
        }
        self.links().map(drop)
    }

    /// Addresses that the client chose.
    pub(crate) fn static_addresses(&self) -> Result<Vec<IpAddr>> {
        let Some(ipam) = &self.ipam else { return Ok(Vec::new()) };
        let mut addresses = Vec::new();
        if !ipam.ipv4.is_empty() {
            let address: Ipv4Addr = ipam
                .ipv4
                .parse()
                .map_err(|_| Error::invalid(format!("invalid IPv4 address: {}", shown(&ipam.ipv4))))?;
            addresses.push(address.into());
        }
        if !ipam.ipv6.is_empty() {
            let address: Ipv6Addr = ipam
                .ipv6
                .parse()
                .map_err(|_| Error::invalid(format!("invalid IPv6 address: {}", shown(&ipam.ipv6))))?;
            addresses.push(address.into());
        }
        Ok(addresses)
    }

    /// The hardware address that the client chose.
    pub(crate) fn mac(&self) -> Result<Option<Mac>> {
        match self.mac_address.as_str() {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|_| Error::invalid(format!("invalid MAC address: {}", shown(text)))),
        }
    }

    /// The interface's name that the client chose.
    pub(crate) fn interface(&self) -> Result<Option<&str>> {
        let Some(name) = self.driver_opts.get(INTERFACE_NAME) else { return Ok(None) };
        check_interface(name).map(Some)
    }

    /// Other containers by the names that this one calls them.
    pub(crate) fn links(&self) -> Result<Vec<(&str, &str)>> {
        self.links.iter().map(|link| split_link(link)).collect()
    }
}

/// `NAME[:ALIAS]`: the container and what it is called.
pub(crate) fn split_link(link: &str) -> Result<(&str, &str)> {
    let bad = || Error::invalid(format!("bad format for links: {}", shown(link)));
    let (name, alias) = match link.split_once(':') {
        Some((_, alias)) if alias.contains(':') => return Err(bad()),
        Some((name, alias)) => (name, alias),
        None => (link, link),
    };
    // As older clients write them: /name:/this/alias.
    let alias = alias.rsplit('/').next().unwrap_or_default();
    let name = name.trim_start_matches('/');
    let legal = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    if legal(name) && legal(alias) { Ok((name, alias)) } else { Err(bad()) }
}

/// The kernel's rule for names of interfaces.
pub(crate) fn check_interface(name: &str) -> Result<&str> {
    let legal = (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':'))
        && !matches!(name, "." | ".." | "lo" | "all" | "default");
    if legal { Ok(name) } else { Err(Error::invalid(format!("invalid interface name: {:?}", shown(name)))) }
}

fn shown(text: &str) -> String {
    text.chars().take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            r#"{"IPAMConfig":{"IPv4Address":"fd00::1"}}"#,
            r#"{"IPAMConfig":{"IPv6Address":"10.0.0.1"}}"#,
            r#"{"MacAddress":"zz"}"#,
            r#"{"Aliases":["a b"]}"#,
            r#"{"Links":["a:b:c"]}"#,
            r#"{"DriverOpts":{"com.docker.network.endpoint.ifname":"a/b"}}"#,
        ] {
            assert_eq!(
                serde_json::from_str::<Wanted>(bad).unwrap().check().unwrap_err().status(),
                400,
                "{bad}"
            );
        }
        for missing in [r#"{"DriverOpts":{"x":"y"}}"#, r#"{"IPAMConfig":{"LinkLocalIPs":["169.254.1.1"]}}"#] {
            assert_eq!(serde_json::from_str::<Wanted>(missing).unwrap().check().unwrap_err().status(), 501);
        }
    }

    #[test]
    fn links_are_read_in_both_forms() {
        assert_eq!(split_link("db:sql").unwrap(), ("db", "sql"));
        assert_eq!(split_link("db").unwrap(), ("db", "db"));
        assert_eq!(split_link("/db:/web/sql").unwrap(), ("db", "sql"));
        assert!(split_link("db:").is_err() && split_link(":x").is_err());
    }
}
