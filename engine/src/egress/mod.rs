//! The way out of a sandbox: does what its agent asks for (see [`coracle_agent_api::egress`]) with the host's own sockets, as the
//! person who runs the daemon. Nothing on the host needs root.
//!
//! The agent, and what speaks for it, is hostile. It chooses addresses within what [`reach`] allows, nothing else; what it has
//! under way is bounded, and a message that is none ends the connection, which is then made anew after a while. A connected TCP
//! socket is handed to the sandbox and does not concern the daemon any more: it outlives the daemon.

pub(crate) mod audit;
mod datagrams;
mod engine;
mod guard;
mod names;
pub(crate) mod policy;
mod reach;

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::{Arc, Weak},
    time::Duration,
};

use coracle_agent_api::egress::{Failure, Flow, Reply, Request, STREAM_PORT};
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::TcpSocket,
    sync::{Semaphore, mpsc},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{datagrams::Flows, guard::Guard};
use crate::{
    agent::{Agent, frames},
    core::Core,
    error::chain,
    sandbox::{Sandbox, lives::Lives},
};

pub use names::HostFiles;

/// What one sandbox has under way at most.
const MOST_DIALS: usize = 1024;
const MOST_QUESTIONS: usize = 512;
const MOST_ECHOES: usize = 256;
const MOST_CLIENTS: usize = 256;
/// Frames that wait for being sent to the agent.
const REPLIES: usize = 1024;
/// A peer that has vanished is noticed after about three minutes, as a container cannot ask for it to be looked after.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(120);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// A sandbox's way out.
pub(crate) struct WayOut {
    sandbox: Arc<dyn Sandbox>,
    agent: Agent,
    files: HostFiles,
    guard: Guard,
}

impl WayOut {
    pub(crate) fn new(sandbox: Arc<dyn Sandbox>, agent: Agent, files: HostFiles, core: Weak<Core>) -> Self {
        let guard = Guard::new(core, sandbox.id().clone());
        Self { sandbox, agent, files, guard }
    }

    /// Serves the sandbox whenever it runs, in the background, until the daemon closes.
    pub(crate) fn spawn(self, tasks: &TaskTracker, closing: CancellationToken) {
        tasks.spawn(async move {
            tokio::select! {
                () = self.serve() => {}
                () = closing.cancelled() => {}
            }
        });
    }

    async fn serve(&self) {
        let mut lives = Lives::new(self.sandbox.state());
        while lives.begin().await {
            tokio::select! {
                reason = self.serve_once() => {
                    tracing::warn!(sandbox = %self.sandbox.id(), error = reason, "the way out was interrupted");
                }
                () = lives.over() => {}
            }
        }
    }

    /// Serves one connection to its end; the reason.
    async fn serve_once(&self) -> String {
        let (stream, early) = match self.agent.egress().await {
            Ok(connection) => connection,
            Err(error) => return chain(&error),
        };
        let (reader, writer) = stream.into_split();
        let (sender, frames) = mpsc::channel::<Vec<u8>>(REPLIES);
        let mut session = Session::new(self, sender);
        frames::converse(writer, frames, session.read(early.chain(reader))).await
    }
}

/// The way back to the agent.
#[derive(Clone)]
struct Replies {
    frames: mpsc::Sender<Vec<u8>>,
    tasks: TaskTracker,
    ended: CancellationToken,
}

impl Replies {
    async fn send(&self, id: u32, reply: &Reply) {
        // An error means that there is nobody any more to be told.
        let _ = self.frames.send(reply.encode(id)).await;
    }

    /// Sends what may be lost: where there is no room, it is.
    fn datagram(&self, id: u32, reply: &Reply) {
        let _ = self.frames.try_send(reply.encode(id));
    }

    /// Runs a task that ends with the connection at the latest.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = work => {}
                () = ended.cancelled() => {}
            }
        });
    }
}

/// One connection to an agent.
struct Session {
    sandbox: Arc<dyn Sandbox>,
    files: HostFiles,
    guard: Guard,
    replies: Replies,
    flows: Flows,
    dials: Arc<Semaphore>,
    questions: Arc<Semaphore>,
    echoes: Arc<Semaphore>,
    clients: Arc<Semaphore>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.replies.ended.cancel();
    }
}

impl Session {
    fn new(way: &WayOut, frames: mpsc::Sender<Vec<u8>>) -> Self {
        let replies = Replies { frames, tasks: TaskTracker::new(), ended: CancellationToken::new() };
        Self {
            sandbox: Arc::clone(&way.sandbox),
            files: way.files.clone(),
            guard: way.guard.clone(),
            replies,
            flows: Flows::default(),
            dials: Arc::new(Semaphore::new(MOST_DIALS)),
            questions: Arc::new(Semaphore::new(MOST_QUESTIONS)),
            echoes: Arc::new(Semaphore::new(MOST_ECHOES)),
            clients: Arc::new(Semaphore::new(MOST_CLIENTS)),
        }
    }

    async fn read(&mut self, mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut payload = Vec::new();
        loop {
            let header = frames::next(&mut reader, &mut payload).await?;
            let request = Request::decode(header.kind, &payload).map_err(io::Error::other)?;
            self.perform(header.id, request).await;
        }
    }

    async fn perform(&self, id: u32, request: Request) {
        let room = match &request {
            Request::Connect(_) => &self.dials,
            Request::Question(..) => &self.questions,
            Request::Echo(..) => &self.echoes,
            Request::Engine(_) => &self.clients,
            Request::Datagram(flow, data) => {
                let admit = |flow: &Flow| self.guard.admit("udp", flow);
                return self.flows.send(id, *flow, data, &self.replies, admit);
            }
        };
        let Ok(room) = Arc::clone(room).try_acquire_owned() else {
            // An agent that asks for more than there is room for, and does not hear that, is not heard either.
            return self.replies.send(id, &Reply::Failed(Failure::Exhausted)).await;
        };
        let (sandbox, replies) = (Arc::clone(&self.sandbox), self.replies.clone());
        let (files, guard) = (self.files.clone(), self.guard.clone());
        if let Request::Engine(container) = request {
            self.replies.spawn(async move {
                if let Err(failure) = engine::connect(sandbox.as_ref(), &guard, id, &container, room).await {
                    replies.send(id, &Reply::Failed(failure)).await;
                }
            });
            return;
        }
        self.replies.spawn(async move {
            if let Some(reply) = perform(sandbox.as_ref(), &files, &guard, id, request).await {
                replies.send(id, &reply).await;
            }
            drop(room);
        });
    }
}

async fn perform(
    sandbox: &dyn Sandbox,
    files: &HostFiles,
    guard: &Guard,
    id: u32,
    request: Request,
) -> Option<Reply> {
    let done = match request {
        Request::Connect(flow) => {
            let connected = async {
                guard.admit("tcp", &flow)?;
                connect(sandbox, id, flow).await
            };
            // What tells the agent that it is connected is the stream.
            return connected.await.err().map(Reply::Failed);
        }
        Request::Echo(flow, data) => match guard.admit("icmp", &flow) {
            Ok(()) => datagrams::echo(flow, &data).await.map(Reply::Echo),
            Err(failure) => Err(failure),
        },
        Request::Question(asker, transport, question) => match guard.admit_question(&asker, &question) {
            Ok(()) => {
                let answer = names::resolve(files, transport, &question).await;
                if let Some(answer) = &answer {
                    guard.answered(&asker, &question, answer);
                }
                answer.map(Reply::Answer).ok_or(Failure::TimedOut)
            }
            Err(failure) => Err(failure),
        },
        Request::Datagram(..) | Request::Engine(_) => return None,
    };
    Some(done.unwrap_or_else(Reply::Failed))
}

/// Connects, and hands the connected socket to the sandbox.
async fn connect(sandbox: &dyn Sandbox, id: u32, flow: Flow) -> Result<(), Failure> {
    let to = reach::reachable(flow.destination)?;
    let mut dialled = dial(to).await;
    if dialled.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        && let Some(other) = reach::other_loopback(flow.destination)
        && let Ok(stream) = dial(other).await
    {
        dialled = Ok(stream);
    }
    let stream = dialled.map_err(|error| reach::failure(&error))?;
    hand_over(sandbox, id, stream.into()).await
}

async fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    let stream = socket.connect(to).await?;
    // What a container sends was delayed by its own kernel, if it wanted that.
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
    stream.into_std()
}

/// Gives the sandbox a connected stream.
async fn hand_over(sandbox: &dyn Sandbox, id: u32, stream: OwnedFd) -> Result<(), Failure> {
    sandbox.pass_stream(STREAM_PORT, id, stream).await.map_err(|error| {
        tracing::warn!(sandbox = %sandbox.id(), error = chain(&error), "a connection cannot be handed over");
        Failure::Exhausted
    })
}
