//! The way out: what containers send to addresses outside of the guest. The guest's kernel leads it here ([`ruleset`]); here
//! it becomes requests to the daemon ([`link`]), which has the only sockets that reach anything. TCP is ended by the kernels on
//! both sides, and bytes go from one to the other without coming by here ([`relay`]).
//!
//! All of it runs on threads of its own, as do name servers and connections to published ports, so that neither a flood of packets nor a fast download holds up the agent's API.
//! It trusts the daemon, and no packet.

mod connections;
mod datagrams;
mod link;
mod packet;
mod queue;
pub(crate) mod relay;
mod ruleset;
mod sockets;

pub(crate) use link::next_frame;
pub(crate) use sockets::answering;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use coracle_agent_api::ProcessId;
use coracle_agent_api::egress::{Request, Transport};
use coracle_agent_api::ports::{FIRST_ARRIVAL, LAST_ARRIVAL};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::watch;

use self::connections::Connections;
use self::datagrams::Flows;
use self::link::Link;
use self::packet::Asked;
use self::queue::Queues;
use self::ruleset::Ports;
use crate::incoming::{Descriptors, Incoming};
use crate::network::forward::Forwards;
use crate::network::names::{Answer, Upstream};
use crate::sys;

/// Ids of connections to published ports.
const ARRIVALS: std::ops::RangeInclusive<u32> = FIRST_ARRIVAL..=LAST_ARRIVAL;
/// Threads that move bytes.
const MOST_THREADS: usize = 4;

/// The way out of one network namespace.
#[derive(Debug)]
pub(crate) struct Egress {
    link: Arc<Link>,
    /// Who takes streams that are not answers: connections to published ports.
    forwards: Arc<OnceLock<Arc<Forwards>>>,
    ready: watch::Receiver<bool>,
    runtime: Handle,
    descriptors: Arc<Descriptors>,
}

impl Egress {
    /// Opens the way out of the current network namespace, in the background. Where that fails, the log says so and containers
    /// reach nothing outside.
    pub(crate) fn start(incoming: Incoming) -> io::Result<Arc<Self>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("egress")
            .enable_all()
            .build()?;
        let (opened, ready) = watch::channel(false);
        let egress = Arc::new(Self {
            link: Arc::default(),
            forwards: Arc::default(),
            ready,
            runtime: runtime.handle().clone(),
            descriptors: Arc::default(),
        });
        let served = egress.clone();
        std::thread::Builder::new().name("egress".into()).spawn(move || {
            runtime.block_on(async {
                if let Err(error) = run(&served, incoming, &opened).await {
                    tracing::error!("containers cannot reach the outside: {error}");
                }
                opened.send_replace(true);
                // Others' tasks need the threads all the same.
                std::future::pending::<()>().await;
            });
        })?;
        Ok(egress)
    }

    /// The threads on which containers' bytes and packets are moved.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// For those who accept connections.
    pub(crate) fn descriptors(&self) -> &Arc<Descriptors> {
        &self.descriptors
    }

    /// Waits until containers' packets are led here, or never will be.
    pub(crate) async fn ready(&self) {
        // An error means that the thread has ended.
        let _ = self.ready.clone().wait_for(|ready| *ready).await;
    }

    /// Streams that are connections to published ports go there from now on.
    pub(crate) fn take_arrivals(&self, forwards: Arc<Forwards>) {
        // Said once, at the start.
        let _ = self.forwards.set(forwards);
    }

    /// Serves a daemon that does what is asked here, until it goes or another one comes.
    pub(crate) async fn serve(&self, io: impl AsyncRead + AsyncWrite + Send) {
        self.link.serve(io).await;
    }

    /// A connection to the daemon's API for a container that has its socket; `None` if there is none.
    pub(crate) async fn engine(&self, container: &ProcessId) -> Option<OwnedFd> {
        self.link.engine(Request::Engine(container.clone())).await
    }

    /// Asks the host's name servers for a container; the question and the answer are whole DNS messages. `None` if there is no answer.
    async fn question(
        &self,
        container: &ProcessId,
        transport: Transport,
        question: Vec<u8>,
    ) -> Option<Vec<u8>> {
        self.link.question(Request::Question(container.clone(), transport, question)).await
    }
}

impl Upstream for Egress {
    fn ask<'a>(&'a self, container: &'a ProcessId, transport: Transport, question: Vec<u8>) -> Answer<'a> {
        Box::pin(self.question(container, transport, question))
    }
}

async fn run(egress: &Egress, incoming: Incoming, opened: &watch::Sender<bool>) -> io::Result<()> {
    let (tcp_v4, tcp_v4_port) = sockets::listener(false)?;
    let (udp_v4, udp_v4_port) = sockets::datagrams(false)?;
    // A machine may have no IPv6 at all.
    let tcp_v6 = sockets::listener(true).ok();
    let udp_v6 = sockets::datagrams(true).ok();
    let port = |socket: &Option<(OwnedFd, u16)>| socket.as_ref().map_or(0, |(_, port)| *port);
    let queues = Queues::open()?;
    ruleset::apply(Ports {
        tcp_v4: tcp_v4_port,
        tcp_v6: port(&tcp_v6),
        udp_v4: udp_v4_port,
        udp_v6: port(&udp_v6),
    })?;
    let Egress { link, forwards, descriptors, .. } = egress;
    let queues = Arc::new(Queues::watch(queues)?);
    let connections = Connections::new(link.clone(), queues.clone(), descriptors.clone());
    let flows = Flows::new(link.clone(), queues.clone())?;
    let mut tasks = tokio::task::JoinSet::new();
    for listener in [Some(tcp_v4), tcp_v6.map(|(socket, _)| socket)].into_iter().flatten() {
        tasks.spawn(connections.clone().accept(TcpListener::from_std(listener.into())?));
    }
    for socket in [Some(udp_v4), udp_v6.map(|(socket, _)| socket)].into_iter().flatten() {
        tasks.spawn(flows.clone().listen(sys::watch(socket)?));
    }
    let (link, forwards, descriptors) = (link.clone(), forwards.clone(), descriptors.clone());
    tasks.spawn(async move {
        incoming
            .serve(
                |id, stream| match forwards.get().filter(|_| ARRIVALS.contains(&id)) {
                    Some(forwards) => forwards.stream_arrived(id, stream),
                    None => link.stream_arrived(id, stream),
                },
                &descriptors,
            )
            .await
    });
    tasks.spawn(hear_packets(queues, connections, flows));
    opened.send_replace(true);
    // None of them ends but by an error.
    match tasks.join_next().await {
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(io::Error::other(error)),
        None => Ok(()),
    }
}

/// Hears of the packets that wait, for ever.
async fn hear_packets(
    queues: Arc<Queues>,
    connections: Arc<Connections>,
    flows: Arc<Flows>,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        for (waiting, packet) in queues.next(&mut buffer).await? {
            match packet::parse(&packet) {
                Some(Asked::Connection(flow)) => connections.asked(flow, waiting),
                Some(Asked::Echo(flow, data)) => flows.echo(flow, data, waiting),
                None => queues.decide(waiting, None),
            }
        }
    }
}
