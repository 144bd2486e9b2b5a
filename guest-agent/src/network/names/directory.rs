//! Who is called what on which network, and who may know it.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use coracle_agent_api::{Endpoint, NetworkId, ProcessId};
use ipnet::IpNet;

/// A container's place on a network.
#[derive(Debug, Clone)]
struct Place {
    network: NetworkId,
    network_name: String,
    /// In lower case.
    names: Vec<String>,
    addresses: Vec<IpNet>,
    /// The container's way out leads over it.
    leads_out: bool,
    /// Others by the names that this container calls them, in lower case.
    links: BTreeMap<String, String>,
}

/// The names of all containers.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    places: RwLock<HashMap<ProcessId, Vec<Place>>>,
}

fn lower(names: &[String]) -> Vec<String> {
    names.iter().map(|name| name.to_ascii_lowercase()).collect()
}

impl Directory {
    fn read(&self) -> RwLockReadGuard<'_, HashMap<ProcessId, Vec<Place>>> {
        self.places.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<ProcessId, Vec<Place>>> {
        self.places.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container has come to a network.
    pub(crate) fn add(&self, container: &ProcessId, endpoint: &Endpoint) {
        let lowered =
            |(name, other): (&String, &String)| (name.to_ascii_lowercase(), other.to_ascii_lowercase());
        let place = Place {
            network: endpoint.bridge.network.clone(),
            network_name: endpoint.bridge.name.to_ascii_lowercase(),
            names: lower(&endpoint.names),
            addresses: endpoint.addresses.clone(),
            leads_out: !endpoint.gateways.is_empty(),
            links: endpoint.links.iter().map(lowered).collect(),
        };
        self.write().entry(container.clone()).or_default().push(place);
    }

    /// A container has left a network.
    pub(crate) fn remove(&self, container: &ProcessId, network: &NetworkId) {
        let mut places = self.write();
        if let Some(own) = places.get_mut(container) {
            own.retain(|place| place.network != *network);
            if own.is_empty() {
                places.remove(container);
            }
        }
    }

    /// A container has other names on a network from now on; `false` if it is not on that.
    pub(crate) fn rename(&self, container: &ProcessId, network: &NetworkId, names: &[String]) -> bool {
        let mut places = self.write();
        let mut own = places.get_mut(container).into_iter().flatten();
        match own.find(|place| place.network == *network) {
            Some(place) => {
                place.names = lower(names);
                true
            }
            None => false,
        }
    }

    /// Only these networks lead out of a container from now on.
    pub(crate) fn lead_out(&self, container: &ProcessId, leads: impl Fn(&NetworkId) -> bool) {
        for place in self.write().get_mut(container).into_iter().flatten() {
            place.leads_out = leads(&place.network);
        }
    }

    /// The addresses of what a container calls by a name; none if it knows no one by that name.
    pub(crate) fn addresses(&self, asker: &ProcessId, name: &str) -> Option<Vec<IpAddr>> {
        let places = self.read();
        for own in places.get(asker)? {
            let on_network =
                name.strip_suffix(own.network_name.as_str()).and_then(|name| name.strip_suffix('.'));
            for name in [Some(name), on_network].into_iter().flatten() {
                let name = own.links.get(name).map_or(name, String::as_str);
                let here = places.values().flatten().filter(|place| place.network == own.network);
                let called = here.filter(|place| place.names.iter().any(|own| own == name));
                let mut addresses: Vec<IpAddr> =
                    called.flat_map(|place| &place.addresses).map(|net| net.addr()).collect();
                if !addresses.is_empty() {
                    addresses.sort_unstable();
                    return Some(addresses);
                }
            }
        }
        None
    }

    /// The address at which a client reaches a container, and whether the client's own is on that network: of the network that leads
    /// out, if there is one, and of the client's family, if there is one.
    pub(crate) fn target(&self, container: &ProcessId, client: &IpAddr) -> Option<(IpAddr, bool)> {
        let places = self.read();
        let own = places.get(container)?;
        let addresses = own.iter().flat_map(|place| place.addresses.iter().map(|net| (place.leads_out, net)));
        let rank = |(leads_out, net): &(bool, &IpNet)| (*leads_out, net.addr().is_ipv4() == client.is_ipv4());
        let (_, best) = addresses.max_by_key(rank)?;
        let is_near =
            places.values().flatten().flat_map(|place| &place.addresses).any(|net| net.contains(client));
        Some((best.addr(), is_near))
    }

    /// What a container is called that another one knows by its address.
    pub(crate) fn name(&self, asker: &ProcessId, address: &IpAddr) -> Option<String> {
        let places = self.read();
        for own in places.get(asker)? {
            let mut here = places.values().flatten().filter(|place| place.network == own.network);
            if let Some(place) = here.find(|place| place.addresses.iter().any(|net| net.addr() == *address)) {
                return place.names.first().map(|name| format!("{name}.{}", own.network_name));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use coracle_agent_api::{Bridge, Mac};

    use super::*;

    fn id(number: u8) -> ProcessId {
        format!("{number:064x}").parse().unwrap()
    }

    fn endpoint(network: u8, last: u8, names: &[&str], links: &[(&str, &str)]) -> Endpoint {
        let owned = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
        Endpoint {
            bridge: Bridge {
                network: format!("{network:064x}").parse().unwrap(),
                name: format!("net{network}"),
                interface: "br".to_owned(),
                addresses: Vec::new(),
                internal: false,
                isolated: false,
                mtu: None,
            },
            interface: "eth0".to_owned(),
            mac: Mac([2, 0, 0, 0, 0, last]),
            addresses: vec![format!("10.0.{network}.{last}/24").parse().unwrap()],
            gateways: Vec::new(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            links: links.iter().map(owned).collect(),
        }
    }

    #[test]
    fn names_are_known_on_networks_that_are_shared() {
        let directory = Directory::default();
        directory.add(&id(1), &endpoint(1, 1, &["Web", "front"], &[("sql", "db")]));
        directory.add(&id(2), &endpoint(1, 2, &["db", "store"], &[]));
        directory.add(&id(3), &endpoint(1, 3, &["db2", "store"], &[]));
        directory.add(&id(4), &endpoint(2, 4, &["far"], &[]));
        let found = |asker: u8, name: &str| {
            let addresses = directory.addresses(&id(asker), name)?;
            Some(addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        for (asker, name, addresses) in [
            (1, "db", Some("10.0.1.2")),
            (1, "web", Some("10.0.1.1")),
            (1, "db.net1", Some("10.0.1.2")),
            (1, "store", Some("10.0.1.2 10.0.1.3")),
            (1, "sql", Some("10.0.1.2")),
            (2, "sql", None),
            (1, "far", None),
            (1, "db.net2", None),
            (9, "db", None),
        ] {
            assert_eq!(found(asker, name).as_deref(), addresses, "{asker} {name}");
        }
        let address = "10.0.1.2".parse().unwrap();
        assert_eq!(directory.name(&id(1), &address).as_deref(), Some("db.net1"));
        assert_eq!(directory.name(&id(4), &address), None);
        assert!(directory.rename(&id(2), &endpoint(1, 2, &[], &[]).bridge.network, &["new".to_owned()]));
        assert!(!directory.rename(&id(2), &endpoint(2, 2, &[], &[]).bridge.network, &["far".to_owned()]));
        assert_eq!((found(1, "new").as_deref(), found(1, "db")), (Some("10.0.1.2"), None));
        directory.remove(&id(2), &endpoint(1, 2, &[], &[]).bridge.network);
        assert_eq!(found(1, "new"), None);
    }
}
