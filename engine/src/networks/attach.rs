//! Containers on networks: what a new one asks for, what it gets when it starts, and what changes while it runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use coracle_agent_api as api;
use coracle_agent_api::{Mac, NetworkId};

use super::{
    Driver, Network,
    endpoint::{Attached, Lease, Wanted},
    ipam::Pool,
    names_of, new_id,
};
use crate::{
    container::{
        config::{Config, HostConfig},
        isolation,
        record::{ContainerId, Record},
        state::Status,
    },
    core::Core,
    error::{Error, Kind, Result},
};

/// Networks of one container at most.
const MAX_ENDPOINTS: usize = 100;

/// A container's endpoints and the networks they are on.
type Endpoints<'a> = Vec<(Arc<Network>, &'a Wanted, Lease)>;

fn denied(message: impl Into<String>) -> Error {
    Error::new(Kind::Denied, message)
}

/// Whether a mode stands for a namespace that is not the container's own.
fn is_shared(mode: &str) -> bool {
    mode == "host" || isolation::donor(mode).is_some()
}

impl Core {
    /// The networks that a new container is to be on, by name. As in Docker, one that is missing is missed at the start.
    pub(crate) fn wanted_networks(
        &self,
        config: &mut Config,
        host: &mut HostConfig,
        given: BTreeMap<String, Wanted>,
    ) -> Result<BTreeMap<String, Attached>> {
        if host.network_mode == "default" {
            "bridge".clone_into(&mut host.network_mode);
        }
        if let Some(donor) = isolation::donor(&host.network_mode) {
            if let Ok(donor) = self.containers.find(donor) {
                host.network_mode = format!("container:{}", donor.id());
            }
            check_donated(config, host)?;
        }
        let mut wanted: BTreeMap<String, Attached> = BTreeMap::new();
        for (name, settings) in given {
            settings.check()?;
            let name = self.networks.find(&name).map_or(name, |network| network.name.clone());
            wanted.insert(name, Attached { wanted: settings, ..Attached::default() });
        }
        if isolation::donor(&host.network_mode).is_some() {
            wanted.retain(|_, attached| attached.wanted != Wanted::default());
            return match wanted.is_empty() {
                true => Ok(wanted),
                false => {
                    Err(Error::invalid("conflicting options: a container's network and endpoints of its own"))
                }
            };
        }
        let primary = self.networks.find(&host.network_mode).map(|network| network.name.clone());
        // By its name, whether the client gave that or an id: all that follows goes by the name.
        let primary = primary.unwrap_or_else(|_| host.network_mode.clone());
        host.network_mode.clone_from(&primary);
        // By its id, too, the host's network is the host's.
        isolation::sysctls(host)?;
        let mac = std::mem::take(&mut config.mac_address);
        let first = wanted.entry(primary.clone()).or_default();
        if !mac.is_empty() {
            if !first.wanted.mac_address.is_empty() && first.wanted.mac_address != mac {
                return Err(Error::invalid(
                    "the container-wide MAC address must match the endpoint-specific MAC address for the main network, or be left empty",
                ));
            }
            first.wanted.mac_address = mac;
            first.wanted.check()?;
        }
        if self.networks.find(&primary).is_ok_and(|network| network.is_user_defined())
            && first.wanted.links.is_empty()
        {
            first.wanted.links.clone_from(&host.links);
        }
        if wanted.len() > MAX_ENDPOINTS {
            return Err(Error::invalid(format!("a container can be on {MAX_ENDPOINTS} networks at most")));
        }
        if wanted.len() > 1 && is_shared(&primary) {
            return Err(Error::invalid("conflicting options: host networking and other networks"));
        }
        if wanted.len() > 1 && wanted.contains_key("none") {
            return Err(Error::invalid(
                "container cannot be connected to multiple networks with one of the networks in private (none) mode",
            ));
        }
        for (name, attached) in &wanted {
            if let Ok(network) = self.networks.find(name) {
                check_wanted(&network, &attached.wanted)?;
            }
        }
        Ok(wanted)
    }

    /// Takes the places that a container is to have while it runs. Whether its record has changed, and must be written before
    /// anyone acts on it, comes second.
    pub(crate) fn join_networks(&self, record: &mut Record) -> Result<(api::Network, bool)> {
        if let Some(donor) = isolation::donor(&record.host_config.network_mode) {
            return Ok((api::Network::Container(self.network_donor(donor, record)?), false));
        }
        let before = record.networks.clone();
        match self.take_places(record) {
            Ok(network) => Ok((network, before != record.networks)),
            Err(error) => {
                self.leave_networks(record);
                record.networks = before;
                Err(error)
            }
        }
    }

    fn take_places(&self, record: &mut Record) -> Result<api::Network> {
        let mut networks = self.by_rank(record)?;
        let host = networks.iter().any(|(_, network)| network.driver == Driver::Host);
        for (name, network) in &networks {
            let lease = self.take_place(record, name, network)?;
            if let Some(attached) = record.networks.get_mut(name) {
                attached.lease = Some(lease);
                attached.network = network.id.to_string();
            }
        }
        if host {
            return Ok(api::Network::Host);
        }
        networks.retain(|(_, network)| network.driver == Driver::Bridge);
        Ok(api::Network::Endpoints(self.endpoints(record).map(|endpoint| endpoint.1).collect()))
    }

    /// The container whose network a container shares; it must run.
    fn network_donor(&self, name: &str, record: &Record) -> Result<ContainerId> {
        let donor = self.containers.find(name)?;
        let donor_record = donor.record();
        match donor_record.state.status {
            Status::Running | Status::Paused if donor_record.sandbox == record.sandbox => {}
            Status::Running | Status::Paused => {
                return Err(Error::conflict(format!(
                    "cannot join network of container {}: it is in another VM",
                    donor.id()
                )));
            }
            Status::Restarting => {
                return Err(Error::conflict(format!(
                    "Container {} is restarting, wait until the container is running",
                    donor.id()
                )));
            }
            _ => {
                return Err(Error::conflict(format!(
                    "cannot join network namespace of a non running container: {}",
                    donor.id()
                )));
            }
        }
        Ok(donor.id().clone())
    }

    /// A container's networks: first the one that it was made on, then by name.
    fn by_rank(&self, record: &Record) -> Result<Vec<(String, Arc<Network>)>> {
        let mode = &record.host_config.network_mode;
        let mut networks = Vec::with_capacity(record.networks.len());
        for (name, attached) in &record.networks {
            // By its id, if it has one: a network of the same name is another one, but as good.
            let found = self.networks.find(&attached.network).or_else(|_| self.networks.find(name))?;
            networks.push((name.clone(), found));
        }
        networks.sort_by_key(|(name, network)| (name != mode && network.name != *mode, name.clone()));
        Ok(networks)
    }

    fn take_place(&self, record: &Record, name: &str, network: &Network) -> Result<Lease> {
        let attached = record.networks.get(name).cloned().unwrap_or_default();
        check_wanted(network, &attached.wanted)?;
        let previous = attached.lease.filter(|_| attached.network == network.id.as_str());
        let others = self.remembered(&network.id, &record.id);
        let interfaces: BTreeSet<&str> = record
            .networks
            .iter()
            .filter(|(other, _)| *other != name)
            .filter_map(|(_, attached)| attached.lease.as_ref())
            .map(|lease| lease.interface.as_str())
            .collect();
        self.networks.join(&network.id, &record.id, |network, taken| {
            lease(network, &attached.wanted, previous.as_ref(), &interfaces, taken, &|address| {
                others.contains(address)
            })
        })
    }

    /// Addresses that containers which do not run had last: they get them again unless there are no others left.
    fn remembered(&self, network: &NetworkId, except: &ContainerId) -> BTreeSet<IpAddr> {
        let mut addresses = BTreeSet::new();
        for container in self.containers.all().iter().filter(|container| container.id() != except) {
            let record = container.record();
            let here = record.networks.values().filter(|attached| attached.network == network.as_str());
            let leases = here.filter_map(|attached| attached.lease.as_ref());
            addresses.extend(leases.flat_map(|lease| &lease.addresses).map(|net| net.addr()));
        }
        addresses
    }

    /// What the agent is told of a container's places on bridges.
    fn endpoints<'a>(&self, record: &'a Record) -> impl Iterator<Item = (&'a str, api::Endpoint)> {
        let places: Vec<_> = record
            .networks
            .iter()
            .filter_map(|(name, attached)| {
                let network = self.networks.find(&attached.network).ok()?;
                let lease = attached.lease.clone()?;
                (network.driver == Driver::Bridge)
                    .then_some((name.as_str(), (network, &attached.wanted, lease)))
            })
            .collect();
        let (names, endpoints): (Vec<_>, Endpoints<'_>) = places.into_iter().unzip();
        let ways_out = [ways_out(&endpoints, true), ways_out(&endpoints, false)];
        let links = |wanted: &Wanted| {
            let links = wanted.links().unwrap_or_default();
            links.into_iter().map(|(name, alias)| (alias.to_owned(), name.to_owned())).collect()
        };
        let endpoint = move |(at, (network, wanted, lease)): (usize, (Arc<Network>, &Wanted, Lease))| {
            let resolves = network.is_user_defined();
            let gateways =
                ways_out.iter().flatten().filter(|(place, _)| *place == at).map(|(_, gateway)| *gateway);
            api::Endpoint {
                bridge: network.bridge(),
                interface: lease.interface,
                mac: lease.mac.unwrap_or(Mac([2, 0, 0, 0, 0, 1])),
                addresses: lease.addresses,
                gateways: gateways.collect(),
                names: if resolves { names_of(record, wanted) } else { Vec::new() },
                links: if resolves { links(wanted) } else { BTreeMap::new() },
            }
        };
        let endpoints: Vec<_> = endpoints.into_iter().enumerate().map(endpoint).collect();
        names.into_iter().zip(endpoints)
    }

    /// Gives a container's places back.
    pub(crate) fn leave_networks(&self, record: &Record) {
        for attached in record.networks.values() {
            self.leave_network(record, attached);
        }
    }

    /// Where on the host a container's ports are published if it does not say: as the network wants it that leads out.
    pub(crate) fn host_binding(&self, record: &Record) -> Option<IpAddr> {
        let mut endpoints = self.endpoints(record);
        let (name, _) = endpoints.find(|(_, endpoint)| endpoint.gateways.iter().any(IpAddr::is_ipv4))?;
        self.networks.find(name).ok()?.host_binding()
    }

    /// The ways out of a container, as the agent is told of them.
    pub(crate) fn ways_out(&self, record: &Record) -> Vec<api::WayOut> {
        let way = |(_, endpoint): (&str, api::Endpoint)| api::WayOut {
            network: endpoint.bridge.network,
            interface: endpoint.interface,
            gateways: endpoint.gateways,
        };
        self.endpoints(record).map(way).filter(|way| !way.gateways.is_empty()).collect()
    }

    /// A container that an earlier daemon started has its places.
    pub(crate) fn rejoin_networks(&self, record: &Record) {
        for attached in record.networks.values() {
            if let (Ok(id), Some(lease)) = (attached.network.parse(), &attached.lease) {
                self.networks.rejoin(&id, &record.id, lease);
            }
        }
    }

    /// Tells that a container has its places, or has them no more.
    pub(crate) fn tell_of_networks(&self, what: &'static str, record: &Record) {
        for attached in record.networks.values() {
            if let Ok(network) = self.networks.find(&attached.network) {
                self.events.network(what, &network, Some(&record.id));
            }
        }
    }

    /// Puts a container on a further network; if it runs, what the agent is to be told comes back.
    pub(crate) fn add_network(
        &self,
        record: &mut Record,
        network: &Network,
        wanted: Wanted,
    ) -> Result<Option<api::Endpoint>> {
        let mode = &record.host_config.network_mode;
        if is_shared(mode) {
            return Err(denied(
                "container sharing network namespace with another container or host cannot be connected to any other network",
            ));
        }
        if network.driver == Driver::Host {
            return Err(denied(
                "container cannot be disconnected from host network or connected to host network",
            ));
        }
        let none = record.networks.contains_key("none");
        if none || network.driver == Driver::Null && !record.networks.is_empty() {
            return Err(denied(
                "container cannot be connected to multiple networks with one of the networks in private (none) mode",
            ));
        }
        if record.networks.contains_key(&network.name) {
            return Err(denied(format!(
                "endpoint with name {} already exists in network {}",
                record.name, network.name
            )));
        }
        if record.networks.len() >= MAX_ENDPOINTS {
            return Err(denied(format!("a container can be on {MAX_ENDPOINTS} networks at most")));
        }
        wanted.check()?;
        check_wanted(network, &wanted)?;
        let attached = Attached { wanted, lease: None, network: network.id.to_string() };
        record.networks.insert(network.name.clone(), attached);
        if !record.state.status.is_running() {
            return Ok(None);
        }
        match self.take_place(record, &network.name, network) {
            Ok(lease) => {
                if let Some(attached) = record.networks.get_mut(&network.name) {
                    attached.lease = Some(lease);
                }
                let endpoint = self.endpoints(record).find(|(name, _)| *name == network.name);
                Ok(endpoint.map(|(_, endpoint)| endpoint))
            }
            Err(error) => {
                record.networks.remove(&network.name);
                Err(error)
            }
        }
    }

    /// Takes a container off a network in its record; what it had there comes back.
    pub(crate) fn drop_network(&self, record: &mut Record, name: &str) -> Result<(String, Attached)> {
        let found = self.networks.find(name).ok();
        let key = match &found {
            Some(network) => network.name.as_str(),
            None => name,
        };
        if found.as_ref().is_some_and(|network| network.driver == Driver::Host) {
            return Err(denied(
                "container cannot be disconnected from host network or connected to host network",
            ));
        }
        match record.networks.remove(key) {
            Some(attached) => Ok((key.to_owned(), attached)),
            None => Err(denied(format!(
                "container {} is not connected to the network {}",
                record.id,
                key.chars().take(300).collect::<String>()
            ))),
        }
    }

    /// Gives one place back.
    pub(crate) fn leave_network(&self, record: &Record, attached: &Attached) {
        if let Ok(id) = attached.network.parse() {
            self.networks.leave(&id, &record.id);
        }
    }
}

/// Options that say something of a network namespace which is another container's.
fn check_donated(config: &Config, host: &HostConfig) -> Result<()> {
    let conflicts = [
        (!config.hostname.is_empty() && host.uts_mode != "host", "hostname and the network mode"),
        (
            !host.links.is_empty(),
            "container type network can't be used with links. This would result in undefined behavior",
        ),
        (!host.dns.is_empty(), "dns and the network mode"),
        (!host.extra_hosts.is_empty(), "custom host-to-IP mapping and the network mode"),
        (!config.mac_address.is_empty(), "mac-address and the network mode"),
        (
            !host.port_bindings.is_empty() || host.publish_all_ports,
            "port publishing and the container type network mode",
        ),
        (!config.exposed_ports.is_empty(), "port exposing and the container type network mode"),
    ];
    match conflicts.iter().find(|(conflict, _)| *conflict) {
        Some((_, what)) => Err(Error::invalid(format!("conflicting options: {what}"))),
        None => Ok(()),
    }
}

/// Checks what a client wants of its place on a network.
fn check_wanted(network: &Network, wanted: &Wanted) -> Result<()> {
    let addresses = wanted.static_addresses()?;
    if !addresses.is_empty() && !network.is_user_defined() {
        return Err(Error::invalid(
            "invalid config for network ".to_owned()
                + &network.name
                + ": user specified IP address is supported on user defined networks only",
        ));
    }
    for (given, what) in [(&wanted.aliases, "aliases"), (&wanted.links, "links")] {
        if !given.is_empty() && !network.is_user_defined() {
            return Err(Error::invalid(format!(
                "invalid endpoint settings: network-scoped {what} are only supported for user-defined networks, and {} is none",
                network.name
            )));
        }
    }
    let options = [
        (!wanted.mac_address.is_empty(), "mac-address"),
        (!wanted.driver_opts.is_empty(), "driver-opt"),
        (wanted.gw_priority != 0, "gw-priority"),
    ];
    if network.driver != Driver::Bridge
        && let Some((_, option)) = options.iter().find(|(given, _)| *given)
    {
        return Err(Error::invalid(format!(
            "conflicting options: {option} and the network mode: on {} a container has no interface of its own",
            network.name
        )));
    }
    for address in &addresses {
        match network.pool_of(address) {
            Some(pool) if !pool.chosen => {
                return Err(Error::invalid(format!(
                    "invalid config for network {}: user specified IP address is supported only when connecting to networks with user configured subnets",
                    network.name
                )));
            }
            Some(pool) if pool.subnet.contains(address) => {}
            _ => {
                return Err(Error::invalid(format!(
                    "invalid config for network {}: invalid endpoint settings: no configured subnet contains IP address {address}",
                    network.name
                )));
            }
        }
    }
    Ok(())
}

/// A container's place on a network.
fn lease(
    network: &Network,
    wanted: &Wanted,
    previous: Option<&Lease>,
    interfaces: &BTreeSet<&str>,
    taken: &dyn Fn(&IpAddr) -> bool,
    remembered: &dyn Fn(&IpAddr) -> bool,
) -> Result<Lease> {
    let endpoint = previous.map_or_else(|| new_id().to_string(), |lease| lease.endpoint.clone());
    if network.driver != Driver::Bridge {
        return Ok(Lease { endpoint, interface: String::new(), mac: None, addresses: Vec::new() });
    }
    let chosen = wanted.static_addresses()?;
    let mut addresses = Vec::with_capacity(network.pools.len());
    for pool in &network.pools {
        let own = chosen.iter().find(|address| address.is_ipv4() == pool.subnet.addr().is_ipv4());
        let address = match own {
            Some(own) if pool.may_be_given(own) && !taken(own) => *own,
            Some(_) => return Err(denied("Address already in use")),
            None => any_address(pool, previous, taken, remembered).ok_or_else(|| {
                Error::internal(format!(
                    "no available IPv{} addresses on this network's address pools: {} ({})",
                    if pool.subnet.addr().is_ipv4() { 4 } else { 6 },
                    network.name,
                    network.id
                ))
            })?,
        };
        addresses.push(pool.with_prefix(address));
    }
    let same = previous.filter(|lease| lease.addresses == addresses);
    let mac = match wanted.mac()? {
        Some(mac) => mac,
        None => same
            .and_then(|lease| lease.mac)
            .unwrap_or_else(|| mac_of(addresses.first().map(|net| net.addr()))),
    };
    let interface = match (wanted.interface()?, previous) {
        (Some(name), _) => name.to_owned(),
        (None, Some(lease)) if !interfaces.contains(lease.interface.as_str()) => lease.interface.clone(),
        (None, _) => {
            let prefix = network.interface_prefix();
            let mut names = (0..=MAX_ENDPOINTS).map(|number| format!("{prefix}{number}"));
            names.find(|name| !interfaces.contains(name.as_str())).unwrap_or_default()
        }
    };
    Ok(Lease { endpoint, interface, mac: Some(mac), addresses })
}

/// The address it had, or the lowest that no one has or had, or the lowest that no one has.
fn any_address(
    pool: &Pool,
    previous: Option<&Lease>,
    taken: &dyn Fn(&IpAddr) -> bool,
    remembered: &dyn Fn(&IpAddr) -> bool,
) -> Option<IpAddr> {
    let had = previous.into_iter().flat_map(|lease| &lease.addresses).map(|net| net.addr());
    let in_range = |address: &IpAddr| pool.range.is_none_or(|range| range.contains(address));
    let mut again = had.filter(|address| pool.may_be_given(address) && in_range(address) && !taken(address));
    again
        .next()
        .or_else(|| pool.lowest_free(|address| taken(address) || remembered(address)))
        .or_else(|| pool.lowest_free(taken))
}

/// A hardware address made from an address, as Docker makes it.
fn mac_of(address: Option<IpAddr>) -> Mac {
    let [a, b, c, d] = match address {
        Some(IpAddr::V4(address)) => address.octets(),
        Some(IpAddr::V6(address)) => {
            let [.., a, b, c, d] = address.octets();
            [a, b, c, d]
        }
        None => [0; 4],
    };
    Mac([0x02, 0x42, a, b, c, d])
}

/// Which endpoint leads out, and by which address: the one of the highest priority, then the first by the network's name.
fn ways_out(endpoints: &Endpoints<'_>, ipv4: bool) -> Option<(usize, IpAddr)> {
    let gateway = |(at, (network, wanted, _)): (usize, &(Arc<Network>, &Wanted, Lease))| {
        if network.internal {
            return None;
        }
        let pool = network.pools.iter().find(|pool| pool.subnet.addr().is_ipv4() == ipv4)?;
        Some((std::cmp::Reverse(wanted.gw_priority), network.name.clone(), at, pool.gateway))
    };
    let best = endpoints.iter().enumerate().filter_map(gateway).min()?;
    Some((best.2, best.3))
}
