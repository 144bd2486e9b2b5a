//! `POST /networks/create`: from a client's wish to a network.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use coracle_agent_api::MIN_IPV6_MTU;
use ipnet::IpNet;
use serde::Deserialize;

use super::{
    Driver, Network, State, ipam,
    ipam::Pool,
    is_taken, new_id,
    record::{BRIDGE_NAME, MTU, check_options},
};
use crate::{
    core::Core,
    error::{Error, Kind, Result},
};

/// Networks of one engine at most: what a client can ask for is bounded.
const MAX_NETWORKS: usize = 1000;

/// Docker's `NetworkCreateRequest`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct CreateRequest {
    name: String,
    driver: String,
    scope: String,
    internal: bool,
    attachable: bool,
    ingress: bool,
    config_only: bool,
    config_from: Option<ConfigFrom>,
    #[serde(rename = "IPAM")]
    ipam: Option<Ipam>,
    #[serde(rename = "EnableIPv4")]
    enable_ipv4: Option<bool>,
    #[serde(rename = "EnableIPv6")]
    enable_ipv6: Option<bool>,
    options: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct ConfigFrom {
    network: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Ipam {
    driver: String,
    options: BTreeMap<String, String>,
    config: Vec<IpamConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct IpamConfig {
    #[serde(rename = "Subnet")]
    subnet: String,
    #[serde(rename = "IPRange")]
    range: String,
    #[serde(rename = "Gateway")]
    gateway: String,
    #[serde(rename = "AuxiliaryAddresses")]
    auxiliary: BTreeMap<String, String>,
}

fn denied(message: impl Into<String>) -> Error {
    Error::new(Kind::Denied, message)
}

fn shown(text: &str) -> String {
    text.chars().take(120).collect()
}

impl CreateRequest {
    /// Checks what does not depend on other networks.
    fn check(&self) -> Result<()> {
        let name = &self.name;
        // Docker's rule for names (libnetwork's ValidateName).
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        let legal = name.bytes().all(plain) && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if name.trim().is_empty() || !legal || name.len() > 255 {
            return Err(Error::invalid(format!(
                "invalid network name {:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed",
                shown(name)
            )));
        }
        if matches!(name.as_str(), "bridge" | "host" | "none" | "default") {
            return Err(denied(format!("operation is not permitted on predefined {name} network")));
        }
        match self.driver.as_str() {
            "" | "bridge" | "default" => {}
            driver @ ("host" | "null") => {
                return Err(denied(format!("only one instance of \"{driver}\" network is allowed")));
            }
            driver @ ("overlay" | "macvlan" | "ipvlan") => {
                return Err(Error::unsupported(format!(
                    "the network driver `{driver}` is not supported by Coracle: use `bridge`"
                )));
            }
            driver => return Err(Error::not_found(format!("plugin \"{}\" not found", shown(driver)))),
        }
        if !matches!(self.scope.as_str(), "" | "local") {
            return Err(Error::unsupported(
                "networks of a swarm are not supported by Coracle: leave the scope out",
            ));
        }
        let from = self.config_from.as_ref().is_some_and(|from| !from.network.is_empty());
        for (asked, option) in
            [(self.ingress, "--ingress"), (self.config_only, "--config-only"), (from, "--config-from")]
        {
            if asked {
                return Err(Error::unsupported(format!(
                    "{option} is not supported by Coracle: leave it out"
                )));
            }
        }
        if self.enable_ipv4 == Some(false) && self.enable_ipv6 != Some(true) {
            return Err(Error::invalid("IPv4 or IPv6 must be enabled"));
        }
        if let Some(ipam) = &self.ipam {
            if !matches!(ipam.driver.as_str(), "" | "default") {
                return Err(Error::not_found(format!("plugin \"{}\" not found", shown(&ipam.driver))));
            }
            if let Some(option) = ipam.options.keys().next() {
                return Err(Error::unsupported(format!(
                    "the IPAM option `{}` is not supported by Coracle yet: leave it out",
                    shown(option)
                )));
            }
        }
        check_options(&self.options)
    }

    /// The pools that the client chose.
    fn chosen_pools(&self) -> Result<Vec<Pool>> {
        let mut pools: Vec<Pool> = Vec::new();
        for config in self.ipam.iter().flat_map(|ipam| &ipam.config) {
            if config.subnet.is_empty() {
                let rest = [&config.range, &config.gateway].iter().any(|text| !text.is_empty());
                if rest || !config.auxiliary.is_empty() {
                    return Err(Error::invalid(format!(
                        "no matching subnet for {}",
                        shown(if config.gateway.is_empty() { &config.range } else { &config.gateway })
                    )));
                }
                continue;
            }
            let pool = pool(config)?;
            let is_v4 = pool.subnet.addr().is_ipv4();
            if pools.iter().any(|other| other.subnet.addr().is_ipv4() == is_v4) {
                return Err(Error::unsupported(
                    "more than one subnet of a family is not supported by Coracle yet: give one for IPv4 and one for IPv6",
                ));
            }
            if is_v4 && self.enable_ipv4 == Some(false) || !is_v4 && self.enable_ipv6 == Some(false) {
                return Err(Error::invalid(format!("{} is of a family that is not enabled", pool.subnet)));
            }
            pools.push(pool);
        }
        Ok(pools)
    }

    fn network(self, state: &State) -> Result<Network> {
        if state.by_id.values().any(|network| network.name == self.name) {
            return Err(Error::conflict(format!("network with name {} already exists", self.name)));
        }
        if state.by_id.len() >= MAX_NETWORKS {
            return Err(denied(format!("there are {MAX_NETWORKS} networks already: remove some")));
        }
        let mut pools = self.chosen_pools()?;
        for pool in &pools {
            if let Some(own) = ipam::hosts_own(&pool.subnet) {
                return Err(denied(format!(
                    "invalid pool request: {} has the address {own}, which is host.docker.internal for all containers: choose another subnet",
                    pool.subnet
                )));
            }
            if is_taken(state, &pool.subnet) {
                return Err(denied(format!(
                    "invalid pool request: Pool overlaps with other one on this address space ({})",
                    pool.subnet
                )));
            }
        }
        let exhausted = || {
            Error::internal(
                "all predefined address pools have been fully subnetted: give a subnet, or remove networks",
            )
        };
        let has = |pools: &[Pool], v4: bool| pools.iter().any(|pool| pool.subnet.addr().is_ipv4() == v4);
        if self.enable_ipv4 != Some(false) && !has(&pools, true) {
            let net = ipam::next_ipv4(|net| is_taken(state, net)).ok_or_else(exhausted)?;
            pools.insert(0, Pool::new(net));
        }
        if self.enable_ipv6 == Some(true) && !has(&pools, false) {
            let engine = state.by_id.values().find(|network| network.name == "bridge");
            let engine = engine.map(|network| network.id.clone()).ok_or_else(exhausted)?;
            let net = ipam::next_ipv6(&engine, |net| is_taken(state, net)).ok_or_else(exhausted)?;
            pools.push(Pool::new(net));
        }
        let mtu = self.options.get(MTU).and_then(|text| text.parse::<u16>().ok());
        if has(&pools, false) && mtu.is_some_and(|mtu| mtu < MIN_IPV6_MTU) {
            return Err(Error::invalid(format!(
                "invalid value for the network option {MTU}: with IPv6 it is {MIN_IPV6_MTU} at least"
            )));
        }
        if let Some(name) = self.options.get(BRIDGE_NAME)
            && state
                .by_id
                .values()
                .any(|network| network.driver == Driver::Bridge && network.interface() == *name)
        {
            return Err(denied(format!("a network has a bridge that is called {name} already")));
        }
        let mut network = Network::new(new_id(), &self.name, Driver::Bridge, pools);
        network.internal = self.internal;
        network.attachable = self.attachable;
        network.labels = self.labels;
        network.options = self.options;
        Ok(network)
    }
}

fn pool(config: &IpamConfig) -> Result<Pool> {
    let subnet: IpNet = config.subnet.parse().map_err(|_| {
        Error::invalid(format!("invalid subnet {}: invalid CIDR address", shown(&config.subnet)))
    })?;
    if subnet.network() != subnet.addr() {
        return Err(Error::invalid(format!("invalid subnet {subnet}: it should be {}", subnet.trunc())));
    }
    let least = if subnet.addr().is_ipv4() { 30 } else { 126 };
    if subnet.prefix_len() > least || subnet.prefix_len() == 0 {
        return Err(Error::invalid(format!(
            "invalid subnet {subnet}: it has no room for a gateway and a container"
        )));
    }
    let address = subnet.addr();
    if address.is_loopback() || address.is_multicast() {
        return Err(Error::invalid(format!("invalid subnet {subnet}: these addresses are of no network")));
    }
    let mut pool = Pool { chosen: true, ..Pool::new(subnet) };
    if !config.range.is_empty() {
        let range: IpNet = config
            .range
            .parse()
            .map_err(|_| Error::invalid(format!("invalid ip-range {}", shown(&config.range))))?;
        if !subnet.contains(&range.trunc()) {
            return Err(Error::invalid(format!("no matching subnet for range {range}")));
        }
        pool.range = Some(range.trunc());
    }
    let inside = |what: &str, text: &str| -> Result<IpAddr> {
        let address: IpAddr =
            text.parse().map_err(|_| Error::invalid(format!("invalid {what} address {}", shown(text))))?;
        match subnet.contains(&address) {
            true => Ok(address),
            false => Err(Error::invalid(format!("no matching subnet for {what} {address}"))),
        }
    };
    if !config.gateway.is_empty() {
        pool.gateway = inside("gateway", &config.gateway)?;
        if !ipam::is_host(&subnet, &pool.gateway) {
            return Err(Error::invalid(format!(
                "invalid gateway address {}: it is that of the subnet {subnet} itself, or its broadcast address",
                pool.gateway
            )));
        }
    }
    for (name, text) in &config.auxiliary {
        pool.auxiliary.insert(name.clone(), inside("aux-address", text)?);
    }
    Ok(pool)
}

impl Core {
    /// Makes the network that a client wants.
    pub(crate) async fn create_network(&self, request: CreateRequest) -> Result<Arc<Network>> {
        request.check()?;
        let network = self.networks.add(&self.store, |state| request.network(state)).await?;
        self.events.network("create", &network, None);
        Ok(network)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created(json: &str) -> Result<Network> {
        let request: CreateRequest = serde_json::from_str(json).unwrap();
        request.check()?;
        let mut state = State::default();
        for (name, driver) in [("bridge", Driver::Bridge), ("host", Driver::Host)] {
            let network = super::super::predefined(&state, name, driver)?;
            state.by_id.insert(network.id.clone(), Arc::new(network));
        }
        request.network(&state)
    }

    #[test]
    fn what_cannot_be_is_refused_in_dockers_words() {
        let ipam = |config: &str| format!(r#"{{"Name":"a","IPAM":{{"Config":[{config}]}}}}"#);
        for (json, status, words) in [
            (r#"{"Name":""}"#.to_owned(), 400, "invalid network name"),
            (r#"{"Name":"a/b"}"#.to_owned(), 400, "invalid network name"),
            (r#"{"Name":"host"}"#.to_owned(), 403, "operation is not permitted on predefined host network"),
            (r#"{"Name":"a","Driver":"host"}"#.to_owned(), 403, "only one instance of"),
            (r#"{"Name":"a","Driver":"overlay"}"#.to_owned(), 501, "use `bridge`"),
            (r#"{"Name":"a","Driver":"weave"}"#.to_owned(), 404, "plugin \"weave\" not found"),
            (r#"{"Name":"a","Options":{"x":"y"}}"#.to_owned(), 501, "network option x"),
            (
                r#"{"Name":"a","Options":{"com.docker.network.driver.mtu":"7"}}"#.to_owned(),
                400,
                "invalid value",
            ),
            (
                r#"{"Name":"a","Options":{"com.docker.network.bridge.name":"docker0"}}"#.to_owned(),
                403,
                "docker0 already",
            ),
            (
                r#"{"Name":"a","EnableIPv6":true,"Options":{"com.docker.network.driver.mtu":"1279"}}"#
                    .to_owned(),
                400,
                "with IPv6 it is 1280 at least",
            ),
            (ipam(r#"{"Subnet":"10.0.0.0/33"}"#), 400, "invalid subnet"),
            (ipam(r#"{"Subnet":"10.0.0.1/24"}"#), 400, "it should be 10.0.0.0/24"),
            (ipam(r#"{"Subnet":"10.0.0.0/31"}"#), 400, "no room"),
            (ipam(r#"{"Subnet":"127.0.0.0/8"}"#), 400, "of no network"),
            (ipam(r#"{"Subnet":"172.17.3.0/24"}"#), 403, "Pool overlaps with other one"),
            (ipam(r#"{"Subnet":"10.0.0.0/24","Gateway":"10.0.1.1"}"#), 400, "no matching subnet for gateway"),
            (
                ipam(r#"{"Subnet":"10.0.0.0/24","IPRange":"10.0.1.0/25"}"#),
                400,
                "no matching subnet for range",
            ),
            (
                ipam(r#"{"Subnet":"10.0.0.0/24","Gateway":"10.0.0.0"}"#),
                400,
                "invalid gateway address 10.0.0.0",
            ),
            (ipam(r#"{"Subnet":"10.0.0.0/24","Gateway":"10.0.0.255"}"#), 400, "invalid gateway address"),
            (ipam(r#"{"Subnet":"192.168.64.0/18"}"#), 403, "host.docker.internal"),
            (ipam(r#"{"Subnet":"fdc4:f303:9324::/48"}"#), 403, "host.docker.internal"),
            (
                r#"{"Name":"a","Options":{"com.docker.network.bridge.default_bridge":"true"}}"#.to_owned(),
                501,
                "default_bridge=true",
            ),
            (
                r#"{"Name":"a","Options":{"com.docker.network.bridge.host_binding_ipv4":"::1"}}"#.to_owned(),
                400,
                "invalid value",
            ),
            (ipam(r#"{"Gateway":"10.0.1.1"}"#), 400, "no matching subnet"),
            (ipam(r#"{"Subnet":"10.0.0.0/24"},{"Subnet":"10.1.0.0/24"}"#), 501, "more than one subnet"),
        ] {
            let error = created(&json).unwrap_err();
            assert_eq!(error.status(), status, "{json}: {error}");
            assert!(error.to_string().contains(words), "{json}: {error}");
        }
    }

    #[test]
    fn what_is_not_said_is_chosen() {
        let network = created(r#"{"Name":"a","EnableIPv6":true}"#).unwrap();
        let shown: Vec<String> = network.pools.iter().map(|pool| pool.gateway_net().to_string()).collect();
        assert_eq!(shown[0], "172.18.0.1/16");
        assert!(shown[1].starts_with("fd") && shown[1].ends_with(":1::1/64"), "{shown:?}");
        let network = created(
            r#"{"Name":"a","IPAM":{"Config":[{"Subnet":"10.0.0.0/24","Gateway":"10.0.0.254","IPRange":"10.0.0.128/25"}]},
                "Internal":true,"Labels":{"a":"b"},"Options":{"com.docker.network.bridge.enable_icc":"false"}}"#,
        )
        .unwrap();
        let bridge = network.bridge();
        assert!(bridge.internal && bridge.isolated);
        assert_eq!(bridge.addresses[0].to_string(), "10.0.0.254/24");
        assert_eq!(network.pools[0].lowest_free(|_| false).unwrap().to_string(), "10.0.0.128");
        let v6_only = created(r#"{"Name":"a","EnableIPv4":false,"EnableIPv6":true}"#).unwrap();
        assert!(!v6_only.has_ipv4() && v6_only.has_ipv6());
    }
}
