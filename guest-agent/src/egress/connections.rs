//! TCP connections to the outside. The first packet waits in the kernel while the host connects; only then the handshake goes
//! on, with the agent's listener in the stead of the other side. What fails on the host fails for the container in the same way.
//!
//! A container chooses how many connections it asks for: what is under way is bounded, in all and for each address; what
//! is too much is dropped, and the container's kernel sends it again.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coracle_agent_api::egress::{Failure, Flow};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::link::Link;
use super::queue::{Queues, Waiting};
use super::relay;
use super::ruleset::Mark;
use crate::incoming::Descriptors;

/// Connections that the host is making.
const MOST_PENDING: usize = 1024;
/// Those of one container's address.
const MOST_PENDING_EACH: usize = 512;
/// Connections that are open; the VMM's limit is above it.
const MOST_OPEN: usize = 3072;
/// A container that does not go on with its handshake has given up.
const CLAIM_TIME: Duration = Duration::from_secs(15);

/// See the module.
pub(super) struct Connections {
    link: Arc<Link>,
    queues: Arc<Queues>,
    pending: Mutex<Pending>,
    room: Arc<Semaphore>,
    descriptors: Arc<Descriptors>,
}

#[derive(Default)]
struct Pending {
    flows: HashMap<Flow, State>,
    by_source: HashMap<IpAddr, usize>,
}

enum State {
    /// The host is connecting.
    Dialing,
    /// The host is connected; the container's handshake goes on.
    Connected(Connected),
}

struct Connected {
    stream: OwnedFd,
    room: OwnedSemaphorePermit,
    /// Dropped with the rest when the container has come for it.
    claimed: oneshot::Sender<()>,
}

impl Connections {
    pub(super) fn new(link: Arc<Link>, queues: Arc<Queues>, descriptors: Arc<Descriptors>) -> Arc<Self> {
        let room = Arc::new(Semaphore::new(MOST_OPEN));
        Arc::new(Self { link, queues, pending: Mutex::default(), room, descriptors })
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first packet of a connection waits.
    pub(super) fn asked(self: &Arc<Self>, flow: Flow, waiting: Waiting) {
        let mut pending = self.pending();
        match pending.flows.get(&flow) {
            // The same again: the one that came first is still held.
            Some(State::Dialing) => return self.queues.decide(waiting, None),
            // Its answer got lost.
            Some(State::Connected(_)) => return self.queues.decide(waiting, Some(Mark::Take)),
            None => {}
        }
        let room = self.room.clone().try_acquire_owned();
        let (Ok(room), true) = (room, pending.has_room(flow.source.ip())) else {
            return self.queues.decide(waiting, None);
        };
        pending.insert(flow);
        drop(pending);
        let connections = self.clone();
        tokio::spawn(async move { connections.connect(flow, waiting, room).await });
    }

    async fn connect(&self, flow: Flow, waiting: Waiting, room: OwnedSemaphorePermit) {
        match self.link.connect(flow).await {
            Ok(stream) => {
                let (claimed, gone) = oneshot::channel();
                self.pending().connected(flow, Connected { stream, room, claimed });
                self.queues.decide(waiting, Some(Mark::Take));
                // Nothing is ever sent: it ends when the stream is taken.
                if tokio::time::timeout(CLAIM_TIME, gone).await.is_err() {
                    self.pending().remove(&flow);
                }
            }
            Err(failure) => {
                self.pending().remove(&flow);
                self.queues.decide(waiting, failure.and_then(mark));
            }
        }
    }

    /// Accepts the containers' connections on one of the agent's listeners, for ever.
    pub(super) async fn accept(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        loop {
            let (stream, source) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.descriptors.survive(error).await?;
                    continue;
                }
            };
            let Ok(destination) = stream.local_addr() else { continue };
            let flow = Flow { source: plain(source), destination: plain(destination) };
            let Ok(stream) = stream.into_std().map(OwnedFd::from) else { continue };
            match self.pending().remove(&flow) {
                Some(State::Connected(Connected { stream: host, room, claimed })) => {
                    drop(claimed);
                    let descriptors = self.descriptors.clone();
                    tokio::spawn(async move {
                        relay::relay(stream, host).await;
                        drop(room);
                        descriptors.were_freed();
                    });
                }
                // It took longer than anybody waits.
                _ => relay::abort(&stream),
            }
        }
    }
}

impl Pending {
    fn has_room(&self, source: IpAddr) -> bool {
        self.flows.len() < MOST_PENDING
            && self.by_source.get(&source).is_none_or(|count| *count < MOST_PENDING_EACH)
    }

    fn insert(&mut self, flow: Flow) {
        if self.flows.insert(flow, State::Dialing).is_none() {
            *self.by_source.entry(flow.source.ip()).or_default() += 1;
        }
    }

    fn connected(&mut self, flow: Flow, connected: Connected) {
        if let Some(state) = self.flows.get_mut(&flow) {
            *state = State::Connected(connected);
        }
    }

    fn remove(&mut self, flow: &Flow) -> Option<State> {
        let state = self.flows.remove(flow)?;
        if let Some(count) = self.by_source.get_mut(&flow.source.ip()) {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&flow.source.ip());
            }
        }
        Some(state)
    }
}

/// What the container is told; nothing where it is to find out by waiting, as it would without us.
fn mark(failure: Failure) -> Option<Mark> {
    match failure {
        Failure::Refused => Some(Mark::Reset),
        Failure::HostUnreachable => Some(Mark::HostUnreachable),
        Failure::NetworkUnreachable => Some(Mark::NetworkUnreachable),
        Failure::Prohibited => Some(Mark::Prohibited),
        Failure::TimedOut | Failure::Exhausted | Failure::Idle => None,
    }
}

/// An address without the scope that the kernel adds for an interface.
pub(super) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(source: &str, port: u16) -> Flow {
        Flow {
            source: SocketAddr::new(source.parse().unwrap(), port),
            destination: "192.0.2.1:80".parse().unwrap(),
        }
    }

    #[test]
    fn one_container_cannot_take_all_the_room() {
        let mut pending = Pending::default();
        for port in 0..MOST_PENDING_EACH as u16 {
            assert!(pending.has_room("10.0.0.2".parse().unwrap()));
            pending.insert(flow("10.0.0.2", port));
        }
        assert!(!pending.has_room("10.0.0.2".parse().unwrap()));
        assert!(pending.has_room("10.0.0.3".parse().unwrap()));
        assert!(matches!(pending.remove(&flow("10.0.0.2", 7)), Some(State::Dialing)));
        assert!(pending.remove(&flow("10.0.0.2", 7)).is_none());
        assert!(pending.has_room("10.0.0.2".parse().unwrap()));
        for port in 0..MOST_PENDING_EACH as u16 {
            pending.remove(&flow("10.0.0.2", port));
        }
        assert!(pending.flows.is_empty() && pending.by_source.is_empty());
    }
}
