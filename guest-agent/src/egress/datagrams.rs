//! UDP and echo requests to the outside. Each flow of datagrams (who sends, to whom) has a socket with the foreign
//! address, from which its answers come; a flow that is idle for as long as the kernel's connection tracking would remember it
//! (30 s, or 120 s once something came back) ends. Flows are bounded, in all and for each address: what is too much is dropped.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coracle_agent_api::egress::{Failure, Flow, Reply};
use tokio::io::unix::AsyncFd;
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;

use super::link::{Datagrams, Link};
use super::packet::{self, Undelivered};
use super::queue::{Queues, Waiting};
use super::ruleset::Mark;
use super::sockets;

const MOST_FLOWS: usize = 1024;
const MOST_FLOWS_EACH: usize = 512;
const MOST_ECHOES: usize = 256;
/// Idle time of a flow that nothing came back for, and of one that something did.
const IDLE: Duration = Duration::from_secs(30);
const IDLE_ANSWERED: Duration = Duration::from_secs(120);
const LONGEST: usize = 65_535;

type Send = Arc<dyn Fn(Vec<u8>) + std::marker::Send + Sync>;

/// See the module.
pub(super) struct Flows {
    link: Arc<Link>,
    queues: Arc<Queues>,
    table: Mutex<Table>,
    echoes: Arc<Semaphore>,
    raw: sockets::Raw,
}

#[derive(Default)]
struct Table {
    flows: HashMap<Flow, Send>,
    by_source: HashMap<IpAddr, usize>,
}

impl Flows {
    pub(super) fn new(link: Arc<Link>, queues: Arc<Queues>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            link,
            queues,
            table: Mutex::default(),
            echoes: Arc::new(Semaphore::new(MOST_ECHOES)),
            raw: sockets::Raw::new()?,
        }))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the datagrams that no flow's socket takes, for ever.
    pub(super) async fn listen(self: Arc<Self>, socket: AsyncFd<OwnedFd>) -> io::Result<()> {
        let mut buffer = vec![0; LONGEST];
        loop {
            let mut ready = socket.readable().await?;
            match ready.try_io(|socket| sockets::receive_from_anyone(socket.get_ref(), &mut buffer)) {
                Ok(Ok(Some((flow, len)))) => self.first(flow, &buffer[..len]),
                Ok(Ok(None)) | Err(_) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
    }

    fn first(self: &Arc<Self>, flow: Flow, data: &[u8]) {
        let mut table = self.table();
        let known = table.flows.get(&flow).cloned();
        if let Some(send) = known {
            drop(table);
            return send(data.to_vec());
        }
        let socket = match table.has_room(flow.source.ip()).then(|| sockets::answering(&flow)) {
            Some(Ok(socket)) => socket,
            Some(Err(error)) => return tracing::debug!("a flow of datagrams has no socket: {error}"),
            None => return,
        };
        let datagrams = self.link.datagrams();
        let send: Send = Arc::new(datagrams.sender(flow));
        table.insert(flow, send.clone());
        drop(table);
        send(data.to_vec());
        let flows = self.clone();
        tokio::spawn(async move {
            flows.carry(flow, &socket, datagrams, &send).await;
            flows.table().remove(&flow);
        });
    }

    /// Carries datagrams both ways until the flow is idle.
    async fn carry(&self, flow: Flow, socket: &UdpSocket, mut datagrams: Datagrams, send: &Send) {
        let mut buffer = vec![0; LONGEST];
        let mut idle = IDLE;
        loop {
            let step = async {
                tokio::select! {
                    received = socket.recv(&mut buffer) => Step::FromContainer(received),
                    reply = datagrams.replies.recv() => Step::FromHost(reply),
                }
            };
            let Ok(step) = tokio::time::timeout(idle, step).await else { return };
            match step {
                Step::FromContainer(Ok(len)) => send(buffer[..len].to_vec()),
                // The container has no socket for an answer any more; nothing is lost but that.
                Step::FromContainer(Err(_)) => {}
                Step::FromHost(Some(Reply::Datagram(data))) => {
                    idle = IDLE_ANSWERED;
                    let _ = socket.send(&data).await;
                }
                Step::FromHost(Some(Reply::Failed(Failure::Idle))) | Step::FromHost(None) => return,
                Step::FromHost(Some(Reply::Failed(failure))) => {
                    if let Some(why) = undelivered(failure) {
                        self.raw.send(flow.source.ip(), &packet::undelivered(&flow, why));
                    }
                }
                Step::FromHost(Some(_)) => {}
            }
        }
    }

    /// An echo request waits.
    pub(super) fn echo(self: &Arc<Self>, flow: Flow, data: Vec<u8>, waiting: Waiting) {
        let Ok(room) = self.echoes.clone().try_acquire_owned() else {
            return self.queues.decide(waiting, None);
        };
        let flows = self.clone();
        tokio::spawn(async move {
            let mark = match flows.link.echo(flow, data).await {
                Ok(data) => {
                    flows.raw.send(flow.source.ip(), &packet::echo_reply(&flow, &data));
                    None
                }
                Err(Some(Failure::Prohibited)) => Some(Mark::Prohibited),
                Err(Some(Failure::HostUnreachable)) => Some(Mark::HostUnreachable),
                Err(Some(Failure::NetworkUnreachable)) => Some(Mark::NetworkUnreachable),
                Err(_) => None,
            };
            flows.queues.decide(waiting, mark);
            drop(room);
        });
    }
}

enum Step {
    FromContainer(io::Result<usize>),
    FromHost(Option<Reply>),
}

impl Table {
    fn has_room(&self, source: IpAddr) -> bool {
        self.flows.len() < MOST_FLOWS
            && self.by_source.get(&source).is_none_or(|count| *count < MOST_FLOWS_EACH)
    }

    fn insert(&mut self, flow: Flow, send: Send) {
        if self.flows.insert(flow, send).is_none() {
            *self.by_source.entry(flow.source.ip()).or_default() += 1;
        }
    }

    fn remove(&mut self, flow: &Flow) {
        if self.flows.remove(flow).is_none() {
            return;
        }
        if let Some(count) = self.by_source.get_mut(&flow.source.ip()) {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&flow.source.ip());
            }
        }
    }
}

fn undelivered(failure: Failure) -> Option<Undelivered> {
    match failure {
        Failure::Refused => Some(Undelivered::Port),
        Failure::HostUnreachable => Some(Undelivered::Host),
        Failure::NetworkUnreachable => Some(Undelivered::Network),
        Failure::Prohibited => Some(Undelivered::Prohibited),
        Failure::TimedOut | Failure::Exhausted | Failure::Idle => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn flows_are_bounded_for_each_container() {
        let mut table = Table::default();
        let flow = |port| Flow {
            source: SocketAddr::new("10.0.0.2".parse().unwrap(), port),
            destination: "192.0.2.1:53".parse().unwrap(),
        };
        let send: Send = Arc::new(|_| ());
        for port in 0..MOST_FLOWS_EACH as u16 {
            assert!(table.has_room(flow(port).source.ip()));
            table.insert(flow(port), send.clone());
        }
        assert!(!table.has_room(flow(0).source.ip()));
        table.remove(&flow(0));
        table.remove(&flow(0));
        assert!(table.has_room(flow(0).source.ip()));
    }
}
