//! Published ports: sockets of the daemon's on the host, and behind each a port of a container.
//!
//! A TCP socket ([`bind`], [`session`]) is bound when its container starts and is listened on only while something in the container listens, which the agent
//! tells; otherwise clients are refused by the kernel. An accepted connection is handed into the guest whole, with the news of
//! whose it is. A UDP socket ([`udp`], [`datagrams`]) takes what comes while its container runs. What the agent says can at worst open or close the sockets of its own sandbox's containers.

mod bind;
mod datagrams;
mod session;
mod udp;
pub(crate) mod wanted;

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use coracle_agent_api::ports::ContainerPort;
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    container::record::{ContainerId, Record},
    core::Core,
    error::{Error, Result},
    sandbox::SandboxId,
};
use bind::{Bound, NotBound};
use session::Session;
use udp::BoundUdp;
use wanted::{Protocol, Wanted};

/// Ports that Docker gives to those who ask for any.
const ANY: std::ops::RangeInclusive<u16> = 32_768..=60_999;

/// A port that is published, as the container's record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Published {
    /// In the container.
    pub(crate) port: u16,
    #[serde(default)]
    pub(crate) protocol: Protocol,
    /// On the host.
    pub(crate) host: SocketAddr,
}

/// A published port in use.
struct Binding {
    to: ContainerPort,
    socket: Socket,
    /// The task that takes what comes, which ends when its guard is dropped.
    taking: (DropGuard, JoinHandle<()>),
}

enum Socket {
    /// With whether something listens in the container.
    Tcp(Arc<Bound>, watch::Sender<bool>),
    Udp(Arc<BoundUdp>),
}

impl Socket {
    fn address(&self) -> (Protocol, SocketAddr) {
        match self {
            Self::Tcp(bound, _) => (Protocol::Tcp, bound.address()),
            Self::Udp(bound) => (Protocol::Udp, bound.address()),
        }
    }

    fn bind(protocol: Protocol, address: SocketAddr) -> Result<Self, NotBound> {
        Ok(match protocol {
            Protocol::Tcp => Self::Tcp(Arc::new(Bound::new(address)?), watch::Sender::new(false)),
            Protocol::Udp => Self::Udp(Arc::new(BoundUdp::new(address)?)),
        })
    }
}

/// All published ports.
#[derive(Default)]
pub(crate) struct Ports {
    bindings: Mutex<HashMap<ContainerId, (SandboxId, Vec<Binding>)>>,
    sessions: Mutex<HashMap<SandboxId, Session>>,
    datagrams: Mutex<HashMap<SandboxId, datagrams::Session>>,
}

impl Ports {
    /// Sets which ports of a sandbox's containers are listened on, as its agent says.
    fn set_listening(&self, sandbox: &SandboxId, ports: &BTreeSet<ContainerPort>) {
        let bindings = self.bindings.lock().expect("no holder panics");
        let here = bindings.values().filter(|(own, _)| own == sandbox).flat_map(|(_, bindings)| bindings);
        for binding in here {
            let Socket::Tcp(_, listens) = &binding.socket else { continue };
            listens.send_if_modified(|listens| {
                std::mem::replace(listens, ports.contains(&binding.to)) != *listens
            });
        }
    }

    fn is_published(&self, protocol: Protocol, host: &SocketAddr) -> bool {
        let bindings = self.bindings.lock().expect("no holder panics");
        let mut all = bindings.values().flat_map(|(_, bindings)| bindings);
        all.any(|binding| {
            let (of, own) = binding.socket.address();
            let same_family = own.is_ipv4() == host.is_ipv4();
            let meet = own.ip() == host.ip() || own.ip().is_unspecified() || host.ip().is_unspecified();
            of == protocol && own.port() == host.port() && same_family && meet
        })
    }
}

/// Whether what a container asks for is published at all: with the host's network, or with none, there is nothing to do.
pub(crate) fn are_published(record: &Record) -> bool {
    !matches!(record.host_config.network_mode.as_str(), "host" | "none")
        && !record.host_config.network_mode.starts_with("container:")
}

impl Core {
    /// Takes the ports on the host that a container is to have while it runs. Whether its record has changed comes back.
    pub(crate) fn publish_ports(self: &Arc<Self>, record: &mut Record) -> Result<bool> {
        let mut wanted = match are_published(record) {
            true => wanted::of(&record.config, &record.host_config)?,
            false => Vec::new(),
        };
        let address = self.host_binding(record);
        for wanted in &mut wanted {
            wanted.host_ip = wanted.host_ip.or(address);
        }
        let mut bound = Vec::new();
        for wanted in &wanted {
            match self.bind(wanted, &record.ports) {
                Ok(pair) => bound.extend(pair.into_iter().map(|socket| (wanted.port, socket))),
                Err(error) => {
                    let endpoint = record.networks.values().find_map(|attached| attached.lease.as_ref());
                    let endpoint = endpoint.map(|lease| lease.endpoint.clone()).unwrap_or_default();
                    return Err(error.context(format!(
                        "failed to set up container networking: driver failed programming external connectivity on endpoint {} ({endpoint})",
                        record.name
                    )));
                }
            }
        }
        let published = |(port, socket): &(u16, Socket)| {
            let (protocol, host) = socket.address();
            Published { port: *port, protocol, host }
        };
        let ports: Vec<Published> = bound.iter().map(published).collect();
        let changed = ports != record.ports;
        record.ports = ports;
        self.use_ports(record, bound);
        Ok(changed)
    }

    /// Takes the ports again that a running container had with an earlier daemon.
    pub(crate) fn republish_ports(self: &Arc<Self>, record: &Record) {
        let mut bound = Vec::new();
        for published in &record.ports {
            match Socket::bind(published.protocol, published.host) {
                Ok(socket) => bound.push((published.port, socket)),
                Err(not_bound) => {
                    let error = Error::from(not_bound);
                    tracing::error!(%error, host = %published.host, "a published port cannot be had again");
                }
            }
        }
        self.use_ports(record, bound);
    }

    fn use_ports(self: &Arc<Self>, record: &Record, bound: Vec<(u16, Socket)>) {
        let binding = |(port, socket): (u16, Socket)| {
            let to = ContainerPort { container: record.id.clone(), port };
            let ended = CancellationToken::new();
            let taking = match &socket {
                Socket::Tcp(bound, listens) => {
                    let session = self.port_session(&record.sandbox);
                    session.accept(Arc::clone(bound), to.clone(), listens.subscribe()).left_future()
                }
                Socket::Udp(bound) => {
                    let session = self.datagram_session(&record.sandbox);
                    Arc::clone(bound).receive(to.clone(), session).right_future()
                }
            };
            let closing = self.closing.clone();
            let until = ended.clone();
            let task = self.tasks.spawn(async move {
                tokio::select! {
                    () = taking => {}
                    () = until.cancelled() => {}
                    () = closing.cancelled() => {}
                }
            });
            Binding { to, socket, taking: (ended.drop_guard(), task) }
        };
        let bindings: Vec<Binding> = bound.into_iter().map(binding).collect();
        if bindings.is_empty() {
            return;
        }
        let entry = (record.sandbox.clone(), bindings);
        self.ports.bindings.lock().expect("no holder panics").insert(record.id.clone(), entry);
        self.port_session(&record.sandbox).tell_again();
    }

    /// Gives a container's ports back; they are free afterwards.
    pub(crate) async fn unpublish_ports(&self, container: &ContainerId) {
        let had = self.ports.bindings.lock().expect("no holder panics").remove(container);
        let Some((sandbox, bindings)) = had else { return };
        for Binding { socket, taking: (guard, task), .. } in bindings {
            drop((socket, guard));
            // One that panicked has no socket any more either.
            let _ = task.await;
        }
        // Flows hold their sockets.
        let datagrams = self.ports.datagrams.lock().expect("no holder panics").get(&sandbox).cloned();
        if let Some(datagrams) = datagrams {
            datagrams.forget(container);
        }
    }

    fn datagram_session(self: &Arc<Self>, sandbox: &SandboxId) -> datagrams::Session {
        let mut sessions = self.ports.datagrams.lock().expect("no holder panics");
        let make = || datagrams::Session::start(self, self.sandboxes.get(sandbox));
        sessions.entry(sandbox.clone()).or_insert_with(make).clone()
    }

    fn port_session(self: &Arc<Self>, sandbox: &SandboxId) -> Session {
        let mut sessions = self.ports.sessions.lock().expect("no holder panics");
        let make = || Session::start(self, self.sandboxes.get(sandbox));
        sessions.entry(sandbox.clone()).or_insert_with(make).clone()
    }

    /// The sockets of one wish: one for each address that it means, all with the same port. Those that the container had before are
    /// tried first where any would do.
    fn bind(&self, wanted: &Wanted, before: &[Published]) -> Result<Vec<Socket>> {
        let range = if wanted.host_ports == (0..=0) { ANY } else { wanted.host_ports.clone() };
        let same = |had: &&Published| (had.port, had.protocol) == (wanted.port, wanted.protocol);
        let had = before.iter().filter(same).map(|had| had.host.port());
        let had = had.into_iter().find(|port| range.contains(port));
        let mut taken = None;
        for port in had.into_iter().chain(range) {
            match self.bind_all(wanted, port) {
                Ok(bound) => return Ok(bound),
                Err(NotBound::Taken(error)) => taken = Some(error),
                Err(refused) => return Err(refused.into()),
            }
        }
        Err(taken.unwrap_or_else(|| Error::internal("all ports are allocated")))
    }

    fn bind_all(&self, wanted: &Wanted, port: u16) -> Result<Vec<Socket>, NotBound> {
        let mut all = Vec::new();
        for ip in wanted.addresses() {
            let address = SocketAddr::new(ip, port);
            if self.ports.is_published(wanted.protocol, &address) {
                return Err(bind::in_use(&address));
            }
            match Socket::bind(wanted.protocol, address) {
                Ok(socket) => all.push(socket),
                // A host without IPv6 has only the other one.
                Err(NotBound::NoFamily(_)) if wanted.host_ip.is_none() && ip.is_ipv6() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }
}
