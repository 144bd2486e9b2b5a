//! On which ports of containers something listens. The kernel tells it as it happens: a BPF program of type `sock_ops` on the cgroup of
//! all containers is run at each listen(2) (`BPF_SOCK_OPS_TCP_LISTEN_CB`) and, because it then asks for that, at each change of a
//! listening socket's state (`BPF_SOCK_OPS_STATE_CB`), and writes what it sees to a ring buffer (include/uapi/linux/bpf.h). Nothing
//! is polled, and no list of sockets is read.
//!
//! A container that fills the ring before it is read can hide what listens, its own or another's, until it listens again; the
//! ring has room for some thousands of events.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_agent_api::ProcessId;
use coracle_agent_api::ports::{ContainerPort, Listening};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::bpf::{self, Purpose, Ring};
use crate::sys;

const RING: u32 = 256 * 1024;
/// Sockets that are remembered; whoever has more does not need them to be reached.
const MAX_SOCKETS: usize = 65_536;
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
    /// Listening sockets by their cookies.
    sockets: HashMap<u64, Socket>,
    /// What is published of the containers, by their network namespaces.
    published: HashMap<u64, (ProcessId, Vec<u16>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Socket {
    namespace: u64,
    port: u16,
}

impl Listeners {
    /// Begins to watch the sockets of a cgroup. Where the kernel does not tell, the log says so.
    pub(crate) fn start(cgroup: BorrowedFd<'_>) -> Arc<Self> {
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
            let mut changed = false;
            ring.read(|record| changed |= self.lock().take(record));
            if changed {
                self.changes.send_modify(|count| *count += 1);
            }
        }
    }

    /// Ports of a container are published.
    pub(crate) fn publish(&self, namespace: u64, container: &ProcessId, ports: &[u16]) {
        self.lock().published.insert(namespace, (container.clone(), ports.to_vec()));
        self.changes.send_modify(|count| *count += 1);
    }

    /// A container has ended.
    pub(crate) fn forget(&self, namespace: u64) {
        let mut state = self.lock();
        state.sockets.retain(|_, socket| socket.namespace != namespace);
        if state.published.remove(&namespace).is_some() {
            drop(state);
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
        let sockets: HashSet<(u64, u16)> =
            state.sockets.values().map(|socket| (socket.namespace, socket.port)).collect();
        let mut ports = Vec::new();
        for (namespace, (container, published)) in &state.published {
            let listened = |port: &&u16| state.blind || sockets.contains(&(*namespace, **port));
            let port = |port: &u16| ContainerPort { container: container.clone(), port: *port };
            ports.extend(published.iter().filter(listened).map(port));
        }
        Listening { ports }
    }
}

impl State {
    /// Takes a record of the program's; whether something is different now that is published.
    fn take(&mut self, record: &[u8]) -> bool {
        let Some(event) = Event::read(record) else { return false };
        let Event { listens, socket, cookie, address } = event;
        if !listens {
            return self.sockets.remove(&cookie).is_some_and(|socket| self.is_published(socket));
        }
        // What listens on loopback only cannot be reached from outside.
        if address.is_loopback() || self.sockets.len() >= MAX_SOCKETS {
            return false;
        }
        self.sockets.insert(cookie, socket);
        self.is_published(socket)
    }

    fn is_published(&self, socket: Socket) -> bool {
        self.published.get(&socket.namespace).is_some_and(|(_, ports)| ports.contains(&socket.port))
    }
}

/// A socket begins to listen, or stops.
struct Event {
    listens: bool,
    socket: Socket,
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
        let socket = Socket { namespace: double(32)?, port: u16::try_from(word(8)?).ok()? };
        Some(Self { listens: word(0)? == LISTEN, socket, cookie: double(40)?, address })
    }
}

fn attach(cgroup: BorrowedFd<'_>) -> io::Result<Ring> {
    let ring = Ring::new(RING)?;
    let program = bpf::load(Purpose::Sockets, &program(ring.as_fd())?)?;
    bpf::attach(Purpose::Sockets, cgroup, program.as_fd())?;
    Ok(ring)
}

/// Assembles eBPF: instructions, and jumps whose targets come later.
#[derive(Default)]
struct Assembler {
    instructions: Vec<u64>,
    jumps: Vec<(usize, &'static str)>,
    labels: HashMap<&'static str, usize>,
}

impl Assembler {
    fn emit(&mut self, code: u8, destination: u8, source: u8, offset: i16, value: i32) -> &mut Self {
        let registers = u64::from(source << 4 | destination);
        let word =
            u64::from(value as u32) << 32 | u64::from(offset as u16) << 16 | registers << 8 | u64::from(code);
        self.instructions.push(word);
        self
    }

    fn jump(&mut self, code: u8, register: u8, value: i32, to: &'static str) -> &mut Self {
        self.jumps.push((self.instructions.len(), to));
        self.emit(code, register, 0, 0, value)
    }

    fn label(&mut self, name: &'static str) -> &mut Self {
        self.labels.insert(name, self.instructions.len());
        self
    }

    fn finish(mut self) -> Option<Vec<u64>> {
        for (at, to) in self.jumps {
            let offset = i16::try_from(self.labels.get(to)?.checked_sub(at + 1)?).ok()?;
            self.instructions[at] |= u64::from(offset as u16) << 16;
        }
        Some(self.instructions)
    }
}

/// The program. It writes: operation, family, port, IPv4 address (4 bytes each), IPv6 address (16), then the cookies of the network
/// namespace and of the socket (8 each).
fn program(ring: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    use std::os::fd::AsRawFd;
    const LOAD: u8 = 0x61;
    const STORE: u8 = 0x63;
    const STORE_DOUBLE: u8 = 0x7b;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const CALL: u8 = 0x85;
    const EQUAL: u8 = 0x15;
    const NOT_EQUAL: u8 = 0x55;
    const ALWAYS: u8 = 0x05;
    const EXIT: u8 = 0x95;
    const LOAD_MAP: u8 = 0x18;
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
        .jump(EQUAL, 7, LISTEN as i32, "listens")
        .jump(NOT_EQUAL, 7, STATE as i32, "end")
        .emit(LOAD, 8, 6, OLD_STATE, 0)
        .jump(NOT_EQUAL, 8, STATE_LISTEN as i32, "end")
        .jump(ALWAYS, 0, 0, "write")
        .label("listens")
        .emit(MOVE, 1, 6, 0, 0)
        .emit(SET, 2, 0, 0, STATE_FLAG)
        .emit(CALL, 0, 0, 0, SET_FLAGS)
        .label("write")
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
        .label("end")
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
}
