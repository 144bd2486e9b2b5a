//! What is known of a network; one JSON record on disk.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use coracle_agent_api::{Bridge, NetworkId};
use serde::{Deserialize, Serialize};

use super::{endpoint::check_interface, ipam::Pool};
use crate::{
    error::{Error, Result},
    time::UnixNanos,
};

/// Form of the records; rises when an old daemon could not read a new one's.
const FORMAT: u32 = 1;
/// Options of a bridge.
pub(crate) const BRIDGE_NAME: &str = "com.docker.network.bridge.name";
const ENABLE_ICC: &str = "com.docker.network.bridge.enable_icc";
pub(crate) const DEFAULT_BRIDGE: &str = "com.docker.network.bridge.default_bridge";
const MASQUERADE: &str = "com.docker.network.bridge.enable_ip_masquerade";
pub(crate) const HOST_BINDING_V4: &str = "com.docker.network.bridge.host_binding_ipv4";
pub(crate) const MTU: &str = "com.docker.network.driver.mtu";
const INTERFACE_PREFIX: &str = "com.docker.network.container_iface_prefix";

/// What stands behind a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Driver {
    /// A bridge in the guest.
    Bridge,
    /// The guest's own interfaces.
    Host,
    /// Loopback only.
    Null,
}

impl Driver {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Host => "host",
            Self::Null => "null",
        }
    }
}

/// See the module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Network {
    format: u32,
    pub(crate) id: NetworkId,
    pub(crate) name: String,
    pub(crate) created: UnixNanos,
    pub(crate) driver: Driver,
    /// At most one of each family.
    pub(crate) pools: Vec<Pool>,
    pub(crate) ipam_options: BTreeMap<String, String>,
    pub(crate) internal: bool,
    pub(crate) attachable: bool,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) options: BTreeMap<String, String>,
}

impl Network {
    pub(crate) fn new(id: NetworkId, name: &str, driver: Driver, pools: Vec<Pool>) -> Self {
        Self {
            format: FORMAT,
            id,
            name: name.to_owned(),
            created: UnixNanos::now(),
            driver,
            pools,
            ipam_options: BTreeMap::new(),
            internal: false,
            attachable: false,
            labels: BTreeMap::new(),
            options: BTreeMap::new(),
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let network: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        match network.format > FORMAT {
            true => Err(format!("it was written by a newer version (format {})", network.format)),
            false => Ok(network),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record has no map with odd keys")
    }

    /// One of those that every engine has.
    pub(crate) fn is_predefined(&self) -> bool {
        matches!(self.name.as_str(), "bridge" | "host" | "none")
    }

    /// A bridge that a client made: names are resolved on it.
    pub(crate) fn is_user_defined(&self) -> bool {
        self.driver == Driver::Bridge && !self.is_predefined()
    }

    /// The pool of an address's family.
    pub(crate) fn pool_of(&self, address: &IpAddr) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.subnet.addr().is_ipv4() == address.is_ipv4())
    }

    pub(crate) fn has_ipv4(&self) -> bool {
        self.driver != Driver::Bridge || self.pools.iter().any(|pool| pool.subnet.addr().is_ipv4())
    }

    pub(crate) fn has_ipv6(&self) -> bool {
        self.pools.iter().any(|pool| pool.subnet.addr().is_ipv6())
    }

    /// What interfaces in containers are called, before the number.
    pub(crate) fn interface_prefix(&self) -> &str {
        self.options.get(INTERFACE_PREFIX).map_or("eth", String::as_str)
    }

    /// Where on the host ports are published if the client does not say; on all addresses, if there is none.
    pub(crate) fn host_binding(&self) -> Option<IpAddr> {
        let binding: Ipv4Addr = self.options.get(HOST_BINDING_V4)?.parse().ok()?;
        (!binding.is_unspecified()).then_some(binding.into())
    }

    /// What the guest is told of it.
    pub(crate) fn bridge(&self) -> Bridge {
        Bridge {
            network: self.id.clone(),
            name: self.name.clone(),
            interface: self.interface(),
            addresses: self.pools.iter().map(Pool::gateway_net).collect(),
            internal: self.internal,
            isolated: self.options.get(ENABLE_ICC).is_some_and(|text| truth(text) == Some(false)),
            mtu: self.options.get(MTU).and_then(|text| text.parse().ok()),
        }
    }

    /// The bridge's name in the guest.
    pub(crate) fn interface(&self) -> String {
        match self.options.get(BRIDGE_NAME) {
            Some(name) => name.clone(),
            None => format!("br-{}", self.id.short()),
        }
    }
}

/// Checks the options of a bridge; what is not known is refused by name.
pub(crate) fn check_options(options: &BTreeMap<String, String>) -> Result<()> {
    for (option, value) in options {
        let wrong = || {
            let (option, value) = (shown(option), shown(value));
            Error::invalid(format!("invalid value for the network option {option}: {value:?}"))
        };
        match option.as_str() {
            BRIDGE_NAME => drop(check_interface(value)?),
            INTERFACE_PREFIX if value.len() <= 12 => drop(check_interface(value)?),
            INTERFACE_PREFIX => return Err(wrong()),
            ENABLE_ICC => drop(truth(value).ok_or_else(wrong)?),
            DEFAULT_BRIDGE | MASQUERADE => {
                // There is one default bridge, which every engine has already.
                let as_it_is = option == MASQUERADE;
                if truth(value).ok_or_else(wrong)? != as_it_is {
                    return Err(not_supported(&format!("{option}={}", shown(value))));
                }
            }
            HOST_BINDING_V4 => drop(value.parse::<Ipv4Addr>().map_err(|_| wrong())?),
            MTU => {
                value.parse::<u16>().ok().filter(|mtu| *mtu >= 68).ok_or_else(wrong)?;
            }
            other => return Err(not_supported(other)),
        }
    }
    Ok(())
}

fn not_supported(option: &str) -> Error {
    Error::unsupported(format!(
        "the network option {} is not supported by Coracle yet: leave it out",
        shown(option)
    ))
}

/// Go's words for yes and no.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

fn shown(text: &str) -> String {
    text.chars().take(120).collect()
}
