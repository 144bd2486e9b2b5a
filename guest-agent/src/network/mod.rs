//! Networks inside the guest: a bridge for each, and a pair of interfaces for each container on it. The daemon says which there shall
//! be; bridges are made when they are needed and stay until the daemon removes them.
//!
//! What keeps networks apart and leads answers to the agent's own sockets is one table of the packet filter, made at the start:
//! it knows bridges by the group of their interfaces, so that it never changes.

pub(crate) mod datagrams;
pub(crate) mod forward;
pub(crate) mod links;
pub(crate) mod listeners;
pub(crate) mod names;
pub(crate) mod namespace;
pub(crate) mod netlink;
pub(crate) mod nft;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_agent_api::{Bridge, Endpoint, ErrorKind, Mac, NetworkId, ProcessId, WayOut};
use links::Index;
use names::directory::Directory;
use namespace::Namespace;
use netlink::Socket;

use crate::error::{AtStep, Result, conflict};

/// Group of the bridges' interfaces (`ip link show group`).
pub(crate) const GROUP: u32 = 0x0063_6f00;
/// Group of the bridges that no way leads out of.
pub(crate) const INTERNAL_GROUP: u32 = GROUP | 1;
/// What both groups have in common.
pub(crate) const GROUP_MASK: u32 = !1;
/// Mark of packets that the guest takes in whomever they are for, because a socket of the agent's waits for them.
pub(crate) const DELIVER_MARK: u32 = 1 << 30;
/// The routing table that does it.
const DELIVER_TABLE: u8 = 100;
const TABLE: &str = "coracle";
/// The kernel's place for changes of routing, before it looks a route up (`NF_IP_PRI_MANGLE`).
const PRIORITY_MANGLE: i32 = -150;
const PRIORITY_FILTER: i32 = 0;

/// The networks of the guest.
pub(crate) struct Networks {
    inner: Mutex<Inner>,
    directory: Arc<Directory>,
}

struct Inner {
    socket: Socket,
    bridges: HashMap<NetworkId, Made>,
    next_port: u64,
}

/// A bridge that is there.
struct Made {
    index: Index,
    spec: Bridge,
    /// Containers' interfaces on it.
    ports: usize,
}

impl Made {
    /// Whether a network must be made anew to be like this: what says how containers are tied to it differs.
    fn is_another(&self, spec: &Bridge) -> bool {
        self.spec.interface != spec.interface || self.spec.isolated != spec.isolated
    }
}

fn group_of(spec: &Bridge) -> u32 {
    if spec.internal { INTERNAL_GROUP } else { GROUP }
}

/// A container's interfaces outside of it; they go when this is given back.
#[derive(Debug)]
pub(crate) struct Ports {
    container: ProcessId,
    ports: Vec<Port>,
}

#[derive(Debug)]
struct Port {
    network: NetworkId,
    name: String,
}

impl Ports {
    /// None yet.
    pub(crate) fn new(container: ProcessId) -> Self {
        Self { container, ports: Vec::new() }
    }

    /// Whether there is one on a network.
    pub(crate) fn is_on(&self, network: &NetworkId) -> bool {
        self.ports.iter().any(|port| port.network == *network)
    }
}

impl Networks {
    /// Makes the guest, whose network namespace the caller is in, forward packets as it shall.
    pub(crate) fn new() -> io::Result<Self> {
        set("net/ipv4/ip_forward", "1")?;
        set("net/ipv6/conf/all/forwarding", "1")?;
        // Packets within a bridge are no business of the packet filter. The parameter is missing where bridges have no such hook.
        for name in ["iptables", "ip6tables"] {
            let _ = set(&format!("net/bridge/bridge-nf-call-{name}"), "0");
        }
        let mut socket = Socket::route()?;
        links::deliver_marked(&mut socket, DELIVER_MARK, DELIVER_TABLE)?;
        rules().commit()?;
        Ok(Self {
            inner: Mutex::new(Inner { socket, bridges: HashMap::new(), next_port: 0 }),
            directory: Arc::default(),
        })
    }

    /// Connects a container's namespace to networks; what fails in between is undone. Blocks.
    pub(crate) fn connect(
        &self,
        namespace: &Namespace,
        endpoints: &[Endpoint],
        ports: &mut Ports,
    ) -> Result<()> {
        for endpoint in endpoints {
            let step = || format!("connect the container to network {}", endpoint.bridge.network.short());
            let port = self.lock().plug(namespace, endpoint)?;
            ports.ports.push(port);
            namespace.run(|| configure(endpoint)).at(step())?;
            self.directory.add(&ports.container, endpoint);
        }
        Ok(())
    }

    /// Lets networks, which the container is on, lead out of it. Blocks.
    pub(crate) fn lead_out(&self, namespace: &Namespace, ways: &[WayOut], ports: &Ports) -> Result<()> {
        for way in ways.iter().filter(|way| ports.is_on(&way.network)) {
            let step = || format!("lead out of the container over network {}", way.network.short());
            namespace.run(|| lead_over(&way.interface, &way.gateways)).at(step())?;
        }
        self.directory.lead_out(&ports.container, |network| ways.iter().any(|way| way.network == *network));
        Ok(())
    }

    /// Takes a container off a network. Blocks.
    pub(crate) fn disconnect(&self, network: &NetworkId, ports: &mut Ports) -> Result<()> {
        self.directory.remove(&ports.container, network);
        while let Some(at) = ports.ports.iter().position(|port| port.network == *network) {
            let port = ports.ports.swap_remove(at);
            self.lock().unplug(&port).at_kind(ErrorKind::Internal, "remove the container's interface")?;
        }
        Ok(())
    }

    /// Takes a container off all its networks: its addresses are free afterwards. Blocks.
    pub(crate) fn give_back(&self, ports: Ports) {
        for port in ports.ports {
            self.directory.remove(&ports.container, &port.network);
            if let Err(error) = self.lock().unplug(&port) {
                tracing::warn!(interface = port.name, "removing a container's interface failed: {error}");
            }
        }
    }

    /// The names of containers.
    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Removes a network's bridge, if there is one. Blocks.
    pub(crate) fn remove(&self, network: &NetworkId) -> Result<()> {
        let mut inner = self.lock();
        if inner.bridges.get(network).is_some_and(|made| made.ports > 0) {
            return Err(conflict(format!("network {} has containers on it", network.short())));
        }
        inner.remove_bridge(network).at_kind(ErrorKind::Internal, "remove the bridge")
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Makes the bridge of a network what it shall be. What fails on the way is done again the next time.
    fn bridge(&mut self, spec: &Bridge) -> Result<Index> {
        let step = || format!("make the bridge of network {}", spec.network.short());
        match self.bridges.get(&spec.network) {
            Some(made) if made.spec == *spec => return Ok(made.index),
            // What was its name may be another network's.
            Some(made) if made.is_another(spec) && made.ports == 0 => {
                self.remove_bridge(&spec.network).at(step())?
            }
            Some(made) if made.is_another(spec) => {
                return Err(conflict(format!(
                    "network {} has containers on it and cannot become another one",
                    spec.network.short()
                )));
            }
            _ => {}
        }
        let index = match self.bridges.get(&spec.network) {
            Some(made) => made.index,
            None => self.add_bridge(spec).at(step())?,
        };
        if let Err(error) = self.configure_bridge(spec, index).at(step()) {
            if self.bridges.get(&spec.network).is_some_and(|made| made.ports == 0) {
                // Its spec does not say what it is like.
                let _ = self.remove_bridge(&spec.network);
            }
            return Err(error);
        }
        if let Some(made) = self.bridges.get_mut(&spec.network) {
            made.spec = spec.clone();
        }
        Ok(index)
    }

    /// Makes a bridge with nothing on it.
    fn add_bridge(&mut self, spec: &Bridge) -> io::Result<Index> {
        links::add_bridge(
            &mut self.socket,
            &spec.interface,
            mac_of(&spec.network),
            group_of(spec),
            spec.mtu,
        )?;
        let index = links::index_of(&mut self.socket, &spec.interface)
            .and_then(|index| index.ok_or_else(|| io::ErrorKind::NotFound.into()));
        match index {
            Ok(index) => {
                let spec = Bridge { addresses: Vec::new(), ..spec.clone() };
                self.bridges.insert(spec.network.clone(), Made { index, spec, ports: 0 });
                Ok(index)
            }
            Err(error) => {
                let _ = links::delete(&mut self.socket, &spec.interface);
                Err(error)
            }
        }
    }

    fn configure_bridge(&mut self, spec: &Bridge, index: Index) -> io::Result<()> {
        let old = match self.bridges.get(&spec.network) {
            Some(made) => made.spec.clone(),
            None => return Ok(()),
        };
        // Routers' advertisements come from containers here, which are not to be believed. Without IPv6 there is no such parameter.
        let _ = set(&format!("net/ipv6/conf/{}/accept_ra", spec.interface), "0");
        if (group_of(&old), old.mtu) != (group_of(spec), spec.mtu) {
            links::change_bridge(&mut self.socket, index, group_of(spec), spec.mtu)?;
        }
        for gone in old.addresses.iter().filter(|old| !spec.addresses.contains(old)) {
            links::remove_address(&mut self.socket, index, *gone)?;
        }
        spec.addresses.iter().try_for_each(|address| links::add_address(&mut self.socket, index, *address))
    }

    fn remove_bridge(&mut self, network: &NetworkId) -> io::Result<()> {
        let Some(made) = self.bridges.get(network) else { return Ok(()) };
        links::delete(&mut self.socket, &made.spec.interface)?;
        self.bridges.remove(network);
        Ok(())
    }

    fn plug(&mut self, namespace: &Namespace, endpoint: &Endpoint) -> Result<Port> {
        let bridge = self.bridge(&endpoint.bridge)?;
        let step = || format!("connect the container to network {}", endpoint.bridge.network.short());
        self.plug_into(bridge, namespace, endpoint).at(step())
    }

    fn plug_into(&mut self, bridge: Index, namespace: &Namespace, endpoint: &Endpoint) -> io::Result<Port> {
        self.next_port += 1;
        let name = format!("veth{:x}", self.next_port);
        let veth = links::Veth {
            name: &name,
            bridge,
            peer: &endpoint.interface,
            peer_mac: endpoint.mac,
            peer_namespace: namespace.as_fd(),
            mtu: endpoint.bridge.mtu,
        };
        links::add_veth(&mut self.socket, &veth)?;
        let port = Port { network: endpoint.bridge.network.clone(), name };
        if endpoint.bridge.isolated
            && let Err(error) = self.isolate(&port.name)
        {
            let _ = links::delete(&mut self.socket, &port.name);
            return Err(error);
        }
        if let Some(made) = self.bridges.get_mut(&port.network) {
            made.ports += 1;
        }
        Ok(port)
    }

    fn isolate(&mut self, name: &str) -> io::Result<()> {
        let index = links::index_of(&mut self.socket, name)?.ok_or(io::ErrorKind::NotFound)?;
        links::isolate_port(&mut self.socket, index)
    }

    fn unplug(&mut self, port: &Port) -> io::Result<()> {
        if let Some(made) = self.bridges.get_mut(&port.network) {
            made.ports = made.ports.saturating_sub(1);
        }
        match links::delete(&mut self.socket, &port.name) {
            // A container that may do so has deleted its end.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }
}

/// Gives a container's interface what it shall have; the thread is in the container's namespace.
fn configure(endpoint: &Endpoint) -> io::Result<()> {
    let mut socket = Socket::route()?;
    let name = &endpoint.interface;
    let index = links::index_of(&mut socket, name)?.ok_or(io::ErrorKind::NotFound)?;
    let ipv6 = endpoint.addresses.iter().any(|address| address.addr().is_ipv6());
    for (parameter, value) in
        [("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", if ipv6 { "0" } else { "1" })]
    {
        match set(&format!("net/ipv6/conf/{}/{parameter}", name), value) {
            // Packets this short are too short for IPv6, which the kernel then leaves out.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !ipv6 => {}
            other => other?,
        }
    }
    for address in &endpoint.addresses {
        links::add_address(&mut socket, index, *address)?;
    }
    links::bring_up(&mut socket, index)?;
    lead_over(name, &endpoint.gateways)
}

/// Sends what no network of the container's is for over an interface of it; the thread is in the container's namespace.
fn lead_over(interface: &str, gateways: &[IpAddr]) -> io::Result<()> {
    let mut socket = Socket::route()?;
    let index = links::index_of(&mut socket, interface)?.ok_or(io::ErrorKind::NotFound)?;
    gateways.iter().try_for_each(|gateway| links::set_default_route(&mut socket, index, *gateway))
}

/// The guest's own rules.
fn rules() -> nft::Batch {
    use nft::{Batch, Family, Hook, Meta, Rule, Verdict};
    let from_containers = || Rule::new().group_is(Meta::InGroup, GROUP_MASK, GROUP);
    let to_containers = |rule: Rule| rule.group_is(Meta::OutGroup, GROUP_MASK, GROUP);
    let internal = INTERNAL_GROUP.to_ne_bytes();
    Batch::new_table(Family::Inet, TABLE)
        .chain("prerouting", "filter", Hook::Prerouting, PRIORITY_MANGLE)
        .rule(
            "prerouting",
            from_containers().has_transparent_socket().set_mark(DELIVER_MARK).verdict(Verdict::Accept),
        )
        .chain("forward", "filter", Hook::Forward, PRIORITY_FILTER)
        .rule("forward", to_containers(from_containers()).verdict(Verdict::Drop))
        .rule("forward", Rule::new().meta_is(Meta::InGroup, &internal).verdict(Verdict::Drop))
        .rule("forward", Rule::new().meta_is(Meta::OutGroup, &internal).verdict(Verdict::Drop))
}

/// The hardware address of a network's bridge, the same in every life of the guest.
fn mac_of(network: &NetworkId) -> Mac {
    let digits = network.as_str().as_bytes();
    let byte = |at: usize| {
        let pair = digits.get(at..at + 2).and_then(|pair| std::str::from_utf8(pair).ok());
        pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or_default()
    };
    Mac([0x02, 0x42, byte(0), byte(2), byte(4), byte(6)])
}

/// Sets a parameter of the calling thread's namespace; a slash in an interface's name is a dot here, as in sysctl(8).
fn set(name: &str, value: &str) -> io::Result<()> {
    std::fs::write(format!("/proc/sys/{name}"), value)
}
