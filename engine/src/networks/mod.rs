//! Networks: which there are, who is on them and with which addresses. The daemon's records are the facts; bridges in a guest come into
//! being when a container is started on them.
//!
//! An address is a container's for as long as the container runs: it is in the container's record before the guest hears of it,
//! so that a daemon that was killed never gives it to another one.

mod attach;
pub(crate) mod create;
pub(crate) mod endpoint;
pub(crate) mod files;
pub(crate) mod ipam;
pub(crate) mod links;
pub(crate) mod record;

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use coracle_agent_api::NetworkId;
use ipnet::IpNet;

use crate::{
    container::{
        names,
        record::{ContainerId, Record},
    },
    core::Core,
    error::{Error, Kind, Result, chain},
    store::{Records, Store},
};
use endpoint::{Lease, Wanted};
use ipam::Pool;
pub(crate) use record::{Driver, Network};

/// All networks.
pub(crate) struct Networks {
    state: RwLock<State>,
    /// Held while one is made or removed, so that no one hears of it before it is on disk.
    making: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    by_id: BTreeMap<NetworkId, Arc<Network>>,
    members: HashMap<NetworkId, BTreeMap<ContainerId, Lease>>,
}

impl State {
    fn is_taken(&self, network: &NetworkId, address: &IpAddr) -> bool {
        self.members.get(network).is_some_and(|members| {
            members.values().any(|lease| lease.addresses.iter().any(|own| own.addr() == *address))
        })
    }
}

/// Docker's words for a network that is not there.
pub(crate) fn no_such_network(name: &str) -> Error {
    Error::not_found(format!("network {} not found", name.chars().take(300).collect::<String>()))
}

impl Networks {
    /// From the records on disk; those that every engine has are made if they are missing.
    pub(crate) async fn load(records: Records, store: &Store) -> Result<Self> {
        let mut state = State::default();
        for (id, bytes) in records {
            match Network::decode(&bytes) {
                Ok(network) => drop(state.by_id.insert(network.id.clone(), Arc::new(network))),
                Err(error) => {
                    tracing::error!(id, error, "the record of a network cannot be used; it is left as it is");
                }
            }
        }
        for (name, driver) in [("bridge", Driver::Bridge), ("host", Driver::Host), ("none", Driver::Null)] {
            if !state.by_id.values().any(|network| network.name == name) {
                let network = predefined(&state, name, driver)?;
                store.put_network(network.id.as_str(), network.encode()).await?;
                state.by_id.insert(network.id.clone(), Arc::new(network));
            }
        }
        Ok(Self { state: RwLock::new(state), making: tokio::sync::Mutex::default() })
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().expect("no holder panics")
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("no holder panics")
    }

    /// The network of a full id, a name, or an unambiguous beginning of an id.
    pub(crate) fn find(&self, text: &str) -> Result<Arc<Network>> {
        let state = self.read();
        let text = if text == "default" { "bridge" } else { text };
        if let Some(network) = text.parse().ok().and_then(|id: NetworkId| state.by_id.get(&id)) {
            return Ok(Arc::clone(network));
        }
        if let Some(network) = state.by_id.values().find(|network| network.name == text) {
            return Ok(Arc::clone(network));
        }
        let mut matching =
            state.by_id.values().filter(|network| !text.is_empty() && network.id.as_str().starts_with(text));
        match (matching.next(), matching.next()) {
            (Some(network), None) => Ok(Arc::clone(network)),
            (Some(_), Some(_)) => {
                Err(Error::invalid(format!("network {text} is ambiguous (2 or more matches found on id)")))
            }
            (None, _) => Err(no_such_network(text)),
        }
    }

    /// All, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Network>> {
        let mut all: Vec<_> = self.read().by_id.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The container that has an address now.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<ContainerId> {
        let state = self.read();
        let has = |lease: &Lease| lease.addresses.iter().any(|own| own.addr() == address);
        let mut all = state.members.values().flatten();
        all.find(|(_, lease)| has(lease)).map(|(id, _)| id.clone())
    }

    /// The containers that run on a network.
    pub(crate) fn members(&self, network: &NetworkId) -> BTreeMap<ContainerId, Lease> {
        self.read().members.get(network).cloned().unwrap_or_default()
    }

    /// Makes a network.
    async fn add(&self, store: &Store, make: impl FnOnce(&State) -> Result<Network>) -> Result<Arc<Network>> {
        let _alone = self.making.lock().await;
        let network = Arc::new(make(&self.read())?);
        store.put_network(network.id.as_str(), network.encode()).await?;
        self.write().by_id.insert(network.id.clone(), Arc::clone(&network));
        Ok(network)
    }

    /// Takes a place on a network: `previous` again if it is still free, else what the container may have.
    fn join(
        &self,
        network: &NetworkId,
        container: &ContainerId,
        make: impl FnOnce(&Network, &dyn Fn(&IpAddr) -> bool) -> Result<Lease>,
    ) -> Result<Lease> {
        let mut state = self.write();
        let found = state.by_id.get(network).cloned().ok_or_else(|| no_such_network(network.short()))?;
        let lease = make(&found, &|address| state.is_taken(network, address))?;
        state.members.entry(network.clone()).or_default().insert(container.clone(), lease.clone());
        Ok(lease)
    }

    /// A container that was found running is where its record says.
    fn rejoin(&self, network: &NetworkId, container: &ContainerId, lease: &Lease) {
        self.write().members.entry(network.clone()).or_default().insert(container.clone(), lease.clone());
    }

    /// Gives a place back; whether there was one.
    fn leave(&self, network: &NetworkId, container: &ContainerId) -> bool {
        let mut state = self.write();
        let Some(members) = state.members.get_mut(network) else { return false };
        let was_there = members.remove(container).is_some();
        if members.is_empty() {
            state.members.remove(network);
        }
        was_there
    }
}

impl Core {
    /// Removes a network that no running container is on.
    pub(crate) async fn remove_network(&self, name: &str) -> Result<Arc<Network>> {
        let networks = &self.networks;
        let _alone = networks.making.lock().await;
        let network = networks.find(name)?;
        let denied = |message: String| Error::new(Kind::Denied, message);
        if network.is_predefined() {
            return Err(denied(format!("{} is a pre-defined network and cannot be removed", network.name)));
        }
        {
            let mut state = networks.write();
            if let Some(members) = state.members.get(&network.id).filter(|members| !members.is_empty()) {
                let shown = members.iter().map(|(container, lease)| {
                    let name =
                        self.containers.find(container.as_str()).map(|found| found.record().name.clone());
                    let endpoint = lease.endpoint.get(..12).unwrap_or_default();
                    format!("name:{:?} id:{endpoint:?}", name.unwrap_or_default())
                });
                let shown: Vec<_> = shown.collect();
                return Err(denied(format!(
                    "error while removing network: network {} has active endpoints ({})",
                    network.name,
                    shown.join(", ")
                )));
            }
            // From here on no container can be started on it.
            state.by_id.remove(&network.id);
        }
        if let Err(error) = self.store.delete_network(network.id.as_str()).await {
            networks.write().by_id.insert(network.id.clone(), Arc::clone(&network));
            return Err(error.into());
        }
        for host in self.sandboxes.all().into_iter().filter(|host| host.is_running()) {
            // A bridge that is left behind has no one on it, and no other network has its name.
            if let Err(error) = host.agent().remove_network(&network.id).await {
                tracing::warn!(error = chain(&error), network = network.name, "cannot remove a bridge now");
            }
        }
        self.events.network("destroy", &network, None);
        Ok(network)
    }
}

fn predefined(state: &State, name: &str, driver: Driver) -> Result<Network> {
    let id = new_id();
    let taken = |net: &IpNet| is_taken(state, net);
    let pools = match driver {
        Driver::Bridge => {
            [ipam::next_ipv4(taken), ipam::next_ipv6(&id, taken)].into_iter().flatten().collect()
        }
        Driver::Host | Driver::Null => Vec::new(),
    };
    let mut network = Network::new(id, name, driver, pools.into_iter().map(Pool::new).collect());
    if driver == Driver::Bridge {
        for (option, value) in [
            (record::BRIDGE_NAME, "docker0"),
            (record::DEFAULT_BRIDGE, "true"),
            ("com.docker.network.bridge.enable_icc", "true"),
            ("com.docker.network.bridge.enable_ip_masquerade", "true"),
            (record::HOST_BINDING_V4, "0.0.0.0"),
            ("com.docker.network.driver.mtu", "1500"),
        ] {
            network.options.insert(option.to_owned(), value.to_owned());
        }
    }
    Ok(network)
}

/// What a container is called on a network that resolves names: its name, its aliases, its short id and its host name.
pub(crate) fn names_of(record: &Record, wanted: &Wanted) -> Vec<String> {
    let own = [record.name.as_str()].into_iter().chain(wanted.aliases.iter().map(String::as_str));
    let own = own.chain([record.id.short(), record.config.hostname.as_str()]);
    let mut names: Vec<String> = Vec::new();
    for name in own.filter(|name| !name.is_empty()) {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}

fn new_id() -> NetworkId {
    names::new_id().to_string().parse().expect("all ids have the same form")
}

/// Whether a subnet has an address in common with that of a network, or with those that stand for the host.
fn is_taken(state: &State, net: &IpNet) -> bool {
    let pools = state.by_id.values().flat_map(|network| &network.pools);
    ipam::hosts_own(net).is_some() || pools.into_iter().any(|pool| ipam::overlap(&pool.subnet, net))
}
