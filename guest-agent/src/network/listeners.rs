//! On which ports of containers something listens. The kernel tells it as it happens: a BPF program of type `sock_ops` on the cgroup of
//! all containers is run at each listen(2) (`BPF_SOCK_OPS_TCP_LISTEN_CB`) and, because it then asks for that, at each change of a
//! listening socket's state (`BPF_SOCK_OPS_STATE_CB`), and writes what it sees to a ring buffer (include/uapi/linux/bpf.h). Nothing
//! is polled, and no list of sockets is read.
//!
//! A container that fills the ring before it is read can hide what listens, its own or another's, until it listens again; the
//! ring has room for some thousands of events.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_agent_api::ProcessId;
use coracle_agent_api::ports::{ContainerPort, Listening};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::bpf::assembler::{
    ADD, ALWAYS, Assembler, CALL, EQUAL, EXIT, Instruction, LOAD, LOAD_MAP, Label, MOVE, NOT_EQUAL, SET,
    STORE, STORE_DOUBLE,
};
use crate::bpf::{self, Purpose, Ring};
use crate::sys;

const RING: u32 = 256 * 1024;
/// Sockets of one namespace that are remembered, all of them on published ports; whoever has more does not need them to be reached.
const MAX_SOCKETS: usize = 8192;
const RECORD: usize = 48;
const LISTEN: u32 = 11;
const STATE: u32 = 10;
/// TCP_LISTEN, the state.
const STATE_LISTEN: u32 = 10;
const FAMILY_V4: u32 = libc::AF_INET as u32;

/// What is known.
#[derive(Debug)]
pub(crate) struct Listeners {
    state: Mutex<State>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    /// Without events, every published port counts as listened on.
    blind: bool,
    /// What is published of the containers, by their network namespaces.
    published: HashMap<u64, Published>,
}

#[derive(Debug)]
struct Published {
    container: ProcessId,
    ports: BTreeSet<u16>,
    /// The ports of sockets that listen on one of these, by the sockets' cookies.
    sockets: HashMap<u64, u16>,
}

impl Listeners {
    /// Begins to watch the sockets of a cgroup, on threads of a runtime. Where the kernel does not tell, the log says so.
    pub(crate) fn start(cgroup: BorrowedFd<'_>, runtime: &Handle) -> Arc<Self> {
        let _entered = runtime.enter();
        let listeners = Arc::new(Self { state: Mutex::default(), changes: watch::Sender::new(0) });
        let watched = attach(cgroup).and_then(|ring| {
            let events = sys::watch(ring.as_fd().try_clone_to_owned()?)?;
            Ok((ring, events))
        });
        match watched {
            Ok((ring, events)) => drop(tokio::spawn(listeners.clone().follow(ring, events))),
            Err(error) => {
                tracing::error!(
                    "the kernel does not tell who listens ({error}): published ports accept before anyone does"
                );
                listeners.lock().blind = true;
            }
        }
        listeners
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn follow(self: Arc<Self>, mut ring: Ring, events: AsyncFd<OwnedFd>) {
        loop {
            let Ok(mut ready) = events.readable().await else { return };
            ready.clear_ready();
            loop {
                let mut changed = false;
                let more = ring.read(|record| changed |= self.lock().take(record));
                if changed {
                    self.changes.send_modify(|count| *count += 1);
                }
                if !more {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
    }

    /// Ports of a container are published.
    pub(crate) fn publish(&self, namespace: u64, container: &ProcessId, ports: &[u16]) {
        let (container, ports) = (container.clone(), ports.iter().copied().collect());
        self.lock().published.insert(namespace, Published { container, ports, sockets: HashMap::new() });
        self.changes.send_modify(|count| *count += 1);
    }

    /// A container has ended.
    pub(crate) fn forget(&self, namespace: u64) {
        if self.lock().published.remove(&namespace).is_some() {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// Told after each change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What there is to be told.
    pub(crate) fn listening(&self) -> Listening {
        let state = self.lock();
        let mut ports = Vec::new();
        for Published { container, ports: published, sockets } in state.published.values() {
            let listened: BTreeSet<u16> = match state.blind {
                true => published.clone(),
                false => sockets.values().copied().collect(),
            };
            let port = |port: u16| ContainerPort { container: container.clone(), port };
            ports.extend(listened.into_iter().map(port));
        }
        Listening { ports }
    }
}

impl State {
    /// Takes a record of the program's; whether something is different now that is published.
    fn take(&mut self, record: &[u8]) -> bool {
        let Some(event) = Event::read(record) else { return false };
        let Event { listens, namespace, port, cookie, address } = event;
        // Nothing runs in a namespace before it is known here.
        let Some(published) = self.published.get_mut(&namespace) else { return false };
        if !listens {
            return published.sockets.remove(&cookie).is_some();
        }
        // What listens on loopback only cannot be reached from outside.
        let counts = published.ports.contains(&port) && !address.is_loopback();
        if counts && published.sockets.len() < MAX_SOCKETS {
            published.sockets.insert(cookie, port);
        }
        counts
    }
}

/// A socket begins to listen, or stops.
struct Event {
    listens: bool,
    namespace: u64,
    port: u16,
    cookie: u64,
    address: IpAddr,
}

impl Event {
    fn read(record: &[u8]) -> Option<Self> {
        let record: &[u8; RECORD] = record.try_into().ok()?;
        let word = |at: usize| record[at..at + 4].first_chunk().copied().map(u32::from_ne_bytes);
        let double = |at: usize| record[at..at + 8].first_chunk().copied().map(u64::from_ne_bytes);
        let address = match word(4)? {
            FAMILY_V4 => Ipv4Addr::from(*record[12..16].first_chunk::<4>()?).into(),
            _ => Ipv6Addr::from(*record[16..32].first_chunk::<16>()?).to_canonical(),
        };
        let (namespace, port) = (double(32)?, u16::try_from(word(8)?).ok()?);
        Some(Self { listens: word(0)? == LISTEN, namespace, port, cookie: double(40)?, address })
    }
}

fn attach(cgroup: BorrowedFd<'_>) -> io::Result<Ring> {
    let ring = Ring::new(RING)?;
    let program = bpf::load(Purpose::Sockets, &program(ring.as_fd())?)?;
    bpf::attach(Purpose::Sockets, cgroup, program.as_fd())?;
    Ok(ring)
}

/// The program. It writes: operation, family, port, IPv4 address (4 bytes each), IPv6 address (16), then the cookies of the network
/// namespace and of the socket (8 each).
fn program(ring: BorrowedFd<'_>) -> io::Result<Vec<Instruction>> {
    use std::os::fd::AsRawFd;
    const LISTENS: Label = 0;
    const WRITE: Label = 1;
    const END: Label = 2;
    // Helpers, and the flag that asks for changes of state.
    const SOCKET_COOKIE: i32 = 46;
    const SET_FLAGS: i32 = 59;
    const NAMESPACE_COOKIE: i32 = 122;
    const RING_OUTPUT: i32 = 130;
    const STATE_FLAG: i32 = 4;
    // Offsets in struct bpf_sock_ops.
    const OPERATION: i16 = 0;
    const OLD_STATE: i16 = 4;
    const FAMILY: i16 = 20;
    const LOCAL_V4: i16 = 28;
    const LOCAL_V6: i16 = 48;
    const LOCAL_PORT: i16 = 68;
    const FRAME: i16 = -(RECORD as i16);
    let mut code = Assembler::default();
    code.emit(MOVE, 6, 1, 0, 0)
        .emit(LOAD, 7, 6, OPERATION, 0)
        .jump(EQUAL, 7, LISTEN as i32, LISTENS)
        .jump(NOT_EQUAL, 7, STATE as i32, END)
        .emit(LOAD, 8, 6, OLD_STATE, 0)
        .jump(NOT_EQUAL, 8, STATE_LISTEN as i32, END)
        .jump(ALWAYS, 0, 0, WRITE)
        .label(LISTENS)
        .emit(MOVE, 1, 6, 0, 0)
        .emit(SET, 2, 0, 0, STATE_FLAG)
        .emit(CALL, 0, 0, 0, SET_FLAGS)
        .label(WRITE)
        .emit(STORE, 10, 7, FRAME, 0);
    let words = [(FAMILY, 4), (LOCAL_PORT, 8), (LOCAL_V4, 12)];
    for (from, to) in words.into_iter().chain((0..4).map(|word| (LOCAL_V6 + 4 * word, 16 + 4 * word))) {
        code.emit(LOAD, 1, 6, from, 0).emit(STORE, 10, 1, FRAME + to, 0);
    }
    for (helper, to) in [(NAMESPACE_COOKIE, 32), (SOCKET_COOKIE, 40)] {
        code.emit(MOVE, 1, 6, 0, 0).emit(CALL, 0, 0, 0, helper).emit(STORE_DOUBLE, 10, 0, FRAME + to, 0);
    }
    code.emit(LOAD_MAP, 1, 1, 0, ring.as_raw_fd())
        .emit(0, 0, 0, 0, 0)
        .emit(MOVE, 2, 10, 0, 0)
        .emit(ADD, 2, 0, 0, FRAME.into())
        .emit(SET, 3, 0, 0, RECORD as i32)
        .emit(SET, 4, 0, 0, 0)
        .emit(CALL, 0, 0, 0, RING_OUTPUT)
        .label(END)
        .emit(SET, 0, 0, 0, 1)
        .emit(EXIT, 0, 0, 0, 0);
    code.finish().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(operation: u32, port: u16, address: [u8; 4], namespace: u64, cookie: u64) -> Vec<u8> {
        let words = [operation, FAMILY_V4, port.into()].map(u32::to_ne_bytes).concat();
        [&words, &address[..], &[0; 16], &namespace.to_ne_bytes(), &cookie.to_ne_bytes()].concat()
    }

    #[test]
    fn a_port_is_listened_on_while_a_socket_listens() {
        let listeners = Listeners { state: Mutex::default(), changes: watch::Sender::new(0) };
        let container: ProcessId = "a".repeat(64).parse().unwrap();
        listeners.publish(5, &container, &[80, 443]);
        let take = |record: Vec<u8>| listeners.lock().take(&record);
        let ports = || listeners.listening().ports.iter().map(|port| port.port).collect::<Vec<_>>();
        assert!(take(record(LISTEN, 80, [0; 4], 5, 1)));
        assert!(take(record(LISTEN, 80, [172, 17, 0, 2], 5, 2)));
        assert!(!take(record(LISTEN, 443, [127, 0, 0, 1], 5, 3)), "on loopback it cannot be reached");
        assert!(!take(record(LISTEN, 443, [0; 4], 6, 4)), "it is someone else's");
        assert!(!take(record(LISTEN, 8080, [0; 4], 5, 5)), "it is not published");
        assert_eq!(ports(), [80]);
        assert!(take(record(STATE, 80, [0; 4], 5, 1)));
        assert_eq!(ports(), [80]);
        assert!(take(record(STATE, 80, [0; 4], 5, 2)));
        assert!(!take(record(STATE, 80, [0; 4], 5, 2)) && ports().is_empty());
        assert!(!take(vec![0; 47]));
        take(record(LISTEN, 80, [0; 4], 5, 6));
        listeners.forget(5);
        assert!(ports().is_empty());
    }

    #[test]
    fn what_one_container_listens_on_takes_no_room_from_another() {
        let listeners = Listeners { state: Mutex::default(), changes: watch::Sender::new(0) };
        let id = |letter: &str| letter.repeat(64).parse::<ProcessId>().unwrap();
        listeners.publish(5, &id("a"), &[80]);
        listeners.publish(6, &id("b"), &[80]);
        for cookie in 0..2 * MAX_SOCKETS as u64 {
            listeners.lock().take(&record(LISTEN, 81, [0; 4], 5, cookie));
            listeners.lock().take(&record(LISTEN, 80, [0; 4], 5, cookie));
        }
        assert_eq!(listeners.lock().published[&5].sockets.len(), MAX_SOCKETS);
        assert!(listeners.lock().take(&record(LISTEN, 80, [0; 4], 6, u64::MAX)));
        assert_eq!(listeners.listening().ports.len(), 2);
    }
}
