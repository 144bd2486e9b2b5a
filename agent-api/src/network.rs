//! Which networks a container is on. A network is a bridge in the guest; the daemon says with each start what it must be like, and
//! the agent makes it when the first container needs it.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{NetworkId, ProcessId};

/// Packets that IPv6 goes over have room for so many bytes at least (RFC 8200, 5).
pub const MIN_IPV6_MTU: u16 = 1280;

/// Where a container's interfaces come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// Its own: loopback, and one for each network that it is on.
    Endpoints(Vec<Endpoint>),
    /// The guest's.
    Host,
    /// Those of another container, which runs.
    Container(ProcessId),
}

impl Default for Network {
    fn default() -> Self {
        Self::Endpoints(Vec::new())
    }
}

/// A bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bridge {
    /// The network that it is.
    pub network: NetworkId,
    /// What it is called; names of containers may end with it.
    #[serde(default)]
    pub name: String,
    /// Name of its interface, 1 to 15 bytes; no other network has it.
    pub interface: String,
    /// The guest's own addresses on it, with the network's prefix; at most one of each family.
    pub addresses: Vec<IpNet>,
    /// No way leads out of it.
    #[serde(default)]
    pub internal: bool,
    /// Containers on it do not see each other.
    #[serde(default)]
    pub isolated: bool,
    /// Bytes in a packet, 68 to 65535, or [`MIN_IPV6_MTU`] at least where there are IPv6 addresses; the kernel's default if there is
    /// none.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// A container's place on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// The network.
    pub bridge: Bridge,
    /// Name of the interface in the container, 1 to 15 bytes.
    pub interface: String,
    /// Its hardware address.
    pub mac: Mac,
    /// Its addresses with the network's prefix; at most one of each family.
    pub addresses: Vec<IpNet>,
    /// Where packets go that no network of the container's is for; at most one of each family.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// What the container is called on the network; it is known by no name if there is none.
    #[serde(default)]
    pub names: Vec<String>,
    /// Names of others on the network by what the container calls them.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
}

/// A network of a running container that leads out of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WayOut {
    /// The network.
    pub network: NetworkId,
    /// Name of the interface in the container.
    pub interface: String,
    /// As those of an [`Endpoint`].
    pub gateways: Vec<IpAddr>,
}

/// An Ethernet address, written as `02:42:ac:11:00:02`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Why a string is no [`Mac`].
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a hardware address: expected six bytes as in 02:42:ac:11:00:02, the first of them even"
)]
pub struct MacError(String);

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let bad = || MacError(text.chars().take(40).collect());
        let separator = if text.contains('-') { '-' } else { ':' };
        let byte = |part: &str| {
            let hex = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(separator).map(byte).collect();
        let bytes: [u8; 6] = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(bad)?;
        // An odd first byte is a group of stations, and zero is no one.
        if bytes[0] & 1 == 1 || bytes == [0; 6] { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_of_one_station() {
        assert_eq!("02:42:AC-11".parse::<Mac>().ok(), None);
        assert_eq!("02:42:AC:11:00:02".parse::<Mac>().unwrap().to_string(), "02:42:ac:11:00:02");
        for bad in [
            "",
            "02:42:ac:11:00",
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "2:42:ac:11:00:02",
            "+2:42:ac:11:00:02",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prefixes_that_are_too_long_are_refused() {
        let endpoint = |address: &str| {
            let bridge = format!(r#"{{"network":"{}","interface":"br0","addresses":[]}}"#, "a".repeat(64));
            let text = format!(
                r#"{{"bridge":{bridge},"interface":"eth0","mac":"02:42:ac:11:00:02","addresses":["{address}"]}}"#
            );
            serde_json::from_str::<Endpoint>(&text)
        };
        assert_eq!(endpoint("172.17.0.2/16").unwrap().addresses[0].to_string(), "172.17.0.2/16");
        assert!(endpoint("172.17.0.2/33").is_err() && endpoint("172.17.0.2").is_err());
    }
}
