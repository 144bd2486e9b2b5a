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
use tokio::{net::UdpSocket, sync::Semaphore};
use tokio_util::sync::CancellationToken;

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
#[derive(Clone)]
pub(super) struct Flows {
    table: Arc<Mutex<HashMap<u32, Entry>>>,
    /// One for each socket, whether its flow still has its number or not.
    room: Arc<Semaphore>,
}

impl Default for Flows {
    fn default() -> Self {
        Self { table: Arc::default(), room: Arc::new(Semaphore::new(MOST_FLOWS)) }
    }
}

#[derive(Clone)]
struct Entry {
    flow: Flow,
    socket: Arc<UdpSocket>,
    used: Arc<AtomicBool>,
    /// Another flow has its number.
    replaced: CancellationToken,
}

impl Flows {
    fn table(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
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
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| Failure::Exhausted)?;
        let socket = connected(to).map_err(|error| reach::failure(&error))?;
        let entry = Entry {
            flow,
            socket: Arc::new(socket),
            used: Arc::default(),
            replaced: CancellationToken::new(),
        };
        if let Some(before) = self.table().insert(id, entry.clone()) {
            before.replaced.cancel();
        }
        let (flows, carried) = (self.clone(), entry.clone());
        let back = replies.clone();
        replies.spawn(async move {
            let replaced = carried.replaced.clone();
            replaced.run_until_cancelled_owned(flows.carry(id, carried, &back)).await;
            drop(room);
        });
        Ok(entry)
    }

    /// Brings back what the other side sends, until the flow is idle.
    async fn carry(&self, id: u32, entry: Entry, replies: &Replies) {
        let mut buffer = vec![0; LONGEST];
        let mut idle = IDLE;
        loop {
            let reply = match tokio::time::timeout(idle, entry.socket.recv(&mut buffer)).await {
                Ok(Ok(len)) => {
                    idle = IDLE_ANSWERED;
                    Reply::Datagram(buffer[..len].to_vec())
                }
                // An earlier datagram was not received; the flow goes on.
                Ok(Err(error)) => Reply::Failed(reach::failure(&error)),
                Err(_) if entry.used.swap(false, Ordering::Relaxed) => continue,
                Err(_) => Reply::Failed(Failure::Idle),
            };
            // Under the lock, so that the flow has its number while this is said of it.
            let mut table = self.table();
            if entry.replaced.is_cancelled() {
                return;
            }
            replies.datagram(id, &reply);
            if reply == Reply::Failed(Failure::Idle) {
                table.remove(&id);
                return;
            }
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

#[cfg(test)]
mod tests {
    use coracle_agent_api::egress::HOST_V4;
    use tokio::sync::mpsc;
    use tokio_util::task::TaskTracker;

    use super::*;

    #[tokio::test]
    async fn a_number_that_is_used_again_costs_one_socket_and_brings_the_new_flow_only() {
        let (frames, mut told) = mpsc::channel(16);
        let replies = Replies { frames, tasks: TaskTracker::new(), ended: CancellationToken::new() };
        let flows = Flows::default();
        let mut peers = Vec::new();
        for _ in 0..3 {
            let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let destination = SocketAddr::new(HOST_V4.into(), peer.local_addr().unwrap().port());
            let flow = Flow { source: "172.17.0.2:1000".parse().unwrap(), destination };
            flows.send(7, flow, b"ask", &replies, |_| Ok(()));
            let mut buffer = [0; 8];
            let (_, from) = peer.recv_from(&mut buffer).await.unwrap();
            peers.push((peer, from));
        }
        // Those that went end; the last one's stays.
        while replies.tasks.len() > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(flows.room.available_permits(), MOST_FLOWS - 1);
        for (number, (peer, from)) in peers.iter().enumerate() {
            let _ = peer.send_to(format!("from {number}").as_bytes(), from).await;
        }
        assert_eq!(told.recv().await.unwrap(), Reply::Datagram(b"from 2".to_vec()).encode(7));
        assert!(told.try_recv().is_err());
        // What is full begins no other one.
        let _all = Arc::clone(&flows.room).try_acquire_many_owned(MOST_FLOWS as u32 - 1).unwrap();
        let flow = Flow {
            source: "172.17.0.2:1001".parse().unwrap(),
            destination: "198.51.100.1:1".parse().unwrap(),
        };
        flows.send(8, flow, b"ask", &replies, |_| Ok(()));
        assert_eq!(told.recv().await.unwrap(), Reply::Failed(Failure::Exhausted).encode(8));
    }
}
