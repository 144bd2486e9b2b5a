//! Connections to published ports. Each comes as a stream from the host and, apart from it, as the news of whose it is; whichever is
//! first waits for the other. The agent then connects to the container from the client's own address, which the container therefore
//! sees: a socket may have it because it is transparent, and the answers come back to it because the guest's rules deliver what
//! is for such sockets.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coracle_agent_api::ports::Arrival;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::names::directory::Directory;
use crate::egress::relay;
use crate::sys;

/// What waits for its other half at most; the oldest goes first.
const MAX_WAITING: usize = 4096;
/// How long a container may take to accept.
const PATIENCE: Duration = Duration::from_secs(60);

/// Half of a connection.
#[derive(Debug)]
enum Half {
    News(Arrival),
    Stream(OwnedFd),
}

/// All that is on its way.
#[derive(Debug)]
pub(crate) struct Forwards {
    directory: Arc<Directory>,
    /// On which bytes are moved.
    runtime: Handle,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    halves: HashMap<u32, Half>,
    order: VecDeque<u32>,
}

impl Forwards {
    /// None yet.
    pub(crate) fn new(directory: Arc<Directory>, runtime: Handle) -> Arc<Self> {
        Arc::new(Self { directory, runtime, waiting: Mutex::default() })
    }

    /// A stream has come.
    pub(crate) fn stream_arrived(self: &Arc<Self>, id: u32, stream: OwnedFd) {
        match self.match_up(id, Half::Stream(stream)) {
            Some((Half::Stream(stream), Half::News(arrival))) => self.begin(arrival, stream),
            // Two streams of one number: neither is trusted.
            Some((Half::Stream(one), Half::Stream(other))) => [one, other].iter().for_each(relay::abort),
            _ => {}
        }
    }

    /// It is said whose a stream is.
    pub(crate) fn announced(self: &Arc<Self>, arrival: Arrival) {
        if let Some((Half::News(arrival), Half::Stream(stream))) =
            self.match_up(arrival.id, Half::News(arrival))
        {
            self.begin(arrival, stream);
        }
    }

    /// The half that came now, and the one that waited for it.
    fn match_up(&self, id: u32, half: Half) -> Option<(Half, Half)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = waiting.halves.remove(&id) {
            waiting.order.retain(|known| *known != id);
            return Some((half, other));
        }
        waiting.halves.insert(id, half);
        waiting.order.push_back(id);
        if waiting.order.len() > MAX_WAITING
            && let Some(oldest) = waiting.order.pop_front()
            && let Some(Half::Stream(stream)) = waiting.halves.remove(&oldest)
        {
            relay::abort(&stream);
        }
        None
    }

    fn begin(self: &Arc<Self>, arrival: Arrival, stream: OwnedFd) {
        let forwards = self.clone();
        self.runtime.spawn(async move {
            match forwards.connect(&arrival).await {
                Ok(container) => relay::relay(container, stream).await,
                Err(error) => {
                    let (container, port) = (arrival.to.container.short(), arrival.to.port);
                    tracing::debug!(container, port, "a client is refused: {error}");
                    // Closed without an end, it is reset.
                    relay::abort(&stream);
                }
            }
        });
    }

    async fn connect(&self, arrival: &Arrival) -> io::Result<OwnedFd> {
        let client = SocketAddr::new(arrival.client.ip().to_canonical(), arrival.client.port());
        let (target, is_near) = self
            .directory
            .target(&arrival.to.container, &client.ip())
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?;
        let target = SocketAddr::new(target, arrival.to.port);
        let from = source(client, target, is_near);
        let connected = async {
            match connect(target, from).await {
                // Another connection of this client's, which may be over, has it: better another one than none.
                Err(error) if from.is_some() && is_taken(&error) => {
                    tracing::debug!("a client's address cannot be had: {error}");
                    connect(target, None).await
                }
                connected => connected,
            }
        };
        let stream =
            timeout(PATIENCE, connected).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        Ok(stream.into_std()?.into())
    }
}

/// The address from which a container is spoken to for a client: the client's own, unless it is on the host itself, or would seem to
/// be on the container's own network. Then it is the gateway for the container.
pub(super) fn source(client: SocketAddr, target: SocketAddr, is_near: bool) -> Option<SocketAddr> {
    let is_far = !is_near && !client.ip().is_loopback() && !client.ip().is_unspecified();
    Some(client).filter(|client| is_far && client.is_ipv4() == target.is_ipv4())
}

/// Whether an address is what a connection failed for: the kernel finds that out when it is bound, or when it is connected.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL))
}

async fn connect(target: SocketAddr, from: Option<SocketAddr>) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(unconnected(target.ip(), from)?.into()).connect(target).await
}

/// A TCP socket of the calling thread's namespace; its address need not be this machine's.
pub(super) fn unconnected(target: IpAddr, from: Option<SocketAddr>) -> io::Result<OwnedFd> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    if let Some(from) = from {
        sys::set_transparent(&socket, from.is_ipv6())?;
        // The client may be connected to another container from the same port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &from)?;
    }
    Ok(socket)
}
