//! UDP and echo requests, with sockets of the host's own. A flow's socket is connected, so that only the other side's datagrams come
//! in and the kernel says when one was refused. Flows that are idle for as long as connection tracking would remember them end.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use coracle_agent_api::egress::{Failure, Flow, Reply};
use rustix::{
    io::Errno,
    net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto},
};
use tokio::net::UdpSocket;

use super::{Replies, reach};

/// Flows of one sandbox.
const MOST_FLOWS: usize = 1024;
const IDLE: Duration = Duration::from_secs(30);
const IDLE_ANSWERED: Duration = Duration::from_secs(120);
const LONGEST: usize = 65_535;
/// As long as most implementations of ping wait.
const ECHO_TIME: Duration = Duration::from_secs(10);
const ECHO_HEADER: usize = 8;

/// The flows of datagrams of one sandbox.
#[derive(Clone, Default)]
pub(super) struct Flows(Arc<Mutex<HashMap<u32, Entry>>>);

#[derive(Clone)]
struct Entry {
    flow: Flow,
    socket: Arc<UdpSocket>,
    used: Arc<AtomicBool>,
}

impl Flows {
    fn table(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a datagram, and begins its flow if it is the first and the flow is admitted.
    pub(super) fn send(
        &self,
        id: u32,
        flow: Flow,
        data: &[u8],
        replies: &Replies,
        admit: impl Fn(&Flow) -> Result<(), Failure>,
    ) {
        let known = self.table().get(&id).filter(|entry| entry.flow == flow).cloned();
        let begin = || admit(&flow).and_then(|()| self.begin(id, flow, replies));
        let entry = match known.map_or_else(begin, Ok) {
            Ok(entry) => entry,
            Err(failure) => return replies.datagram(id, &Reply::Failed(failure)),
        };
        entry.used.store(true, Ordering::Relaxed);
        if let Err(error) = send(&entry.socket, data) {
            match reach::failure(&error) {
                Failure::Exhausted => {}
                failure => replies.datagram(id, &Reply::Failed(failure)),
            }
        }
    }

    fn begin(&self, id: u32, flow: Flow, replies: &Replies) -> Result<Entry, Failure> {
        let to = reach::reachable(flow.destination)?;
        let mut table = self.table();
        if table.len() >= MOST_FLOWS && !table.contains_key(&id) {
            return Err(Failure::Exhausted);
        }
        let socket = connected(to).map_err(|error| reach::failure(&error))?;
        let entry = Entry { flow, socket: Arc::new(socket), used: Arc::default() };
        table.insert(id, entry.clone());
        let (flows, replies, carried) = (self.clone(), replies.clone(), entry.clone());
        replies.clone().spawn(async move {
            carry(id, &carried, &replies).await;
            let mut table = flows.table();
            if table.get(&id).is_some_and(|entry| Arc::ptr_eq(&entry.socket, &carried.socket)) {
                table.remove(&id);
            }
        });
        Ok(entry)
    }
}

/// Brings back what the other side sends, until the flow is idle.
async fn carry(id: u32, entry: &Entry, replies: &Replies) {
    let mut buffer = vec![0; LONGEST];
    let mut idle = IDLE;
    loop {
        match tokio::time::timeout(idle, entry.socket.recv(&mut buffer)).await {
            Ok(Ok(len)) => {
                idle = IDLE_ANSWERED;
                replies.datagram(id, &Reply::Datagram(buffer[..len].to_vec()));
            }
            // An earlier datagram was not received; the flow goes on.
            Ok(Err(error)) => replies.datagram(id, &Reply::Failed(reach::failure(&error))),
            Err(_) if entry.used.swap(false, Ordering::Relaxed) => {}
            Err(_) => return replies.datagram(id, &Reply::Failed(Failure::Idle)),
        }
    }
}

/// Sends, also if an error of an earlier datagram comes first; without waiting for room.
fn send(socket: &UdpSocket, data: &[u8]) -> io::Result<()> {
    // Not by the event loop, which does not know of a new socket yet that it has room.
    let send = || rustix::net::send(socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    match send() {
        Err(error @ Errno::CONNREFUSED) => {
            // What it says is about an earlier one, and this one has not been sent.
            let _ = send();
            Err(error.into())
        }
        // A network that is full drops, too.
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    // For datagrams, this only chooses where they go.
    socket.connect(to)?;
    let socket = UdpSocket::from_std(socket)?;
    Ok(socket)
}

/// Sends an echo request, where the host lets its users do so (net.ipv4.ping_group_range), and waits for the answer.
pub(super) async fn echo(flow: Flow, data: &[u8]) -> Result<Vec<u8>, Failure> {
    let to = reach::reachable(flow.destination)?;
    let exchange = async {
        let socket = ping_socket(to.ip())?;
        let kind = if to.is_ipv4() { 8 } else { 128 };
        // The ports of an echo's flow are its identifier, which the kernel replaces, and its sequence number.
        let [s0, s1] = to.port().to_be_bytes();
        let mut request = vec![kind, 0, 0, 0, 0, 0, s0, s1];
        request.extend(data);
        socket.send(&request).await?;
        let mut reply = vec![0; LONGEST];
        loop {
            let len = socket.recv(&mut reply).await?;
            if len >= ECHO_HEADER && reply[6..ECHO_HEADER] == [s0, s1] {
                return Ok(reply[ECHO_HEADER..len].to_vec());
            }
        }
    };
    match tokio::time::timeout(ECHO_TIME, exchange).await {
        Ok(result) => result.map_err(|error: io::Error| reach::failure(&error)),
        Err(_) => Err(Failure::TimedOut),
    }
}

fn ping_socket(to: IpAddr) -> io::Result<UdpSocket> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    rustix::net::connect(&socket, &SocketAddr::new(to, 0))?;
    UdpSocket::from_std(socket.into())
}
