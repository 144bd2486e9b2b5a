//! The conversation with one sandbox's agent about published ports, for as long as the daemon runs: it is begun anew with each
//! life of the sandbox.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use coracle_agent_api::{
    egress::STREAM_PORT,
    ports::{Arrival, ContainerPort, FIRST_ARRIVAL, LAST_ARRIVAL, Listening},
};
use futures_util::StreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
};
use tokio_util::codec::{FramedRead, LinesCodec};

use super::bind::Bound;
use crate::{accept::Descriptors, core::Core, error::chain, sandbox::lives::Lives, sandboxes::Host};

/// The longest line that an agent may send: some tens of thousands of ports.
const MAX_LINE: usize = 16 * 1024 * 1024;
/// Connections on their way into the guest; further ones wait in the kernel.
const WAITING: usize = 1024;

/// See the module.
#[derive(Clone)]
pub(super) struct Session {
    host: Arc<Host>,
    arrivals: mpsc::Sender<Arrival>,
    room: Arc<Semaphore>,
    descriptors: Arc<Descriptors>,
    ids: Arc<AtomicU32>,
    newest: Arc<watch::Sender<BTreeSet<ContainerPort>>>,
}

impl Session {
    /// Begins it, in the background.
    pub(super) fn start(core: &Arc<Core>, host: Arc<Host>) -> Self {
        let (arrivals, announced) = mpsc::channel(WAITING);
        let session = Self {
            host,
            arrivals,
            room: Arc::new(Semaphore::new(WAITING)),
            descriptors: Arc::clone(&core.descriptors),
            ids: Arc::new(AtomicU32::new(FIRST_ARRIVAL)),
            newest: Arc::new(watch::Sender::new(BTreeSet::new())),
        };
        let running = session.clone().run(Arc::downgrade(core), announced);
        core.tasks.spawn(core.closing.clone().run_until_cancelled_owned(running));
        session
    }

    /// New ports are bound: what was heard last may be about them.
    pub(super) fn tell_again(&self) {
        self.newest.send_modify(|_| ());
    }

    async fn run(self, core: Weak<Core>, mut announced: mpsc::Receiver<Arrival>) {
        let told = async {
            let mut newest = self.newest.subscribe();
            while newest.changed().await.is_ok() {
                let Some(core) = core.upgrade() else { return };
                let ports = newest.borrow_and_update().clone();
                core.ports.set_listening(self.host.id(), &ports);
            }
        };
        let talk = async {
            let mut lives = Lives::new(self.host.state());
            while lives.begin().await {
                let reason = tokio::select! {
                    reason = self.talk(&mut announced) => reason,
                    () = lives.over() => "the sandbox has ended".to_owned(),
                };
                tracing::debug!(sandbox = %self.host.id(), error = reason, "published ports refuse for now");
                self.newest.send_replace(BTreeSet::new());
            }
        };
        tokio::select! {
            () = told => {}
            () = talk => {}
        }
    }

    /// One conversation to its end; the reason.
    async fn talk(&self, announced: &mut mpsc::Receiver<Arrival>) -> String {
        let (stream, early) = match self.host.agent().ports().await {
            Ok(connection) => connection,
            Err(error) => return chain(&error),
        };
        let (reader, mut writer) = stream.into_split();
        let mut lines =
            FramedRead::new((&early[..]).chain(reader), LinesCodec::new_with_max_length(MAX_LINE));
        let hear = async {
            while let Some(line) = lines.next().await {
                let heard: Listening = match line.map(|line| serde_json::from_str(&line)) {
                    Ok(Ok(heard)) => heard,
                    Ok(Err(error)) => return error.to_string(),
                    Err(error) => return error.to_string(),
                };
                self.newest.send_replace(heard.ports.into_iter().collect());
            }
            "the agent has ended it".to_owned()
        };
        let announce = async {
            while let Some(arrival) = announced.recv().await {
                let mut line = serde_json::to_vec(&arrival).unwrap_or_default();
                line.push(b'\n');
                if let Err(error) = writer.write_all(&line).await {
                    return error.to_string();
                }
            }
            "the daemon is ending".to_owned()
        };
        tokio::select! {
            ended = hear => ended,
            ended = announce => ended,
        }
    }

    /// Accepts connections to one port while it is listened on, for ever.
    pub(super) async fn accept(
        self,
        bound: Arc<Bound>,
        to: ContainerPort,
        mut listens: watch::Receiver<bool>,
    ) {
        loop {
            if listens.wait_for(|listens| *listens).await.is_err() {
                return;
            }
            let listener = bound.listen().and_then(TcpListener::from_std);
            let listener = match listener {
                Ok(listener) => listener,
                Err(error) => {
                    tracing::error!(%error, host = %bound.address(), "a published port cannot be listened on");
                    // Whoever has it may be gone when the container listens again.
                    if listens.wait_for(|listens| !*listens).await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            loop {
                let accept = async {
                    let room = Arc::clone(&self.room).acquire_owned().await.expect("it is never closed");
                    listener.accept().await.map(|accepted| (room, accepted))
                };
                let accepted = tokio::select! {
                    accepted = accept => accepted,
                    stopped = listens.wait_for(|listens| !*listens) => match stopped {
                        Ok(_) => break,
                        Err(_) => return,
                    },
                };
                match accepted {
                    Ok((room, (stream, client))) => {
                        let (session, to) = (self.clone(), to.clone());
                        tokio::spawn(async move {
                            session.hand_in(stream, client, to).await;
                            drop(room);
                            session.descriptors.were_freed();
                        });
                    }
                    Err(error) => self.descriptors.after(&error, bound.address()).await,
                }
            }
            drop(listener);
            bound.refuse();
        }
    }

    async fn hand_in(&self, stream: TcpStream, client: SocketAddr, to: ContainerPort) {
        let next = |id: u32| Some(if id >= LAST_ARRIVAL { FIRST_ARRIVAL } else { id + 1 });
        let id = self.ids.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or(FIRST_ARRIVAL);
        let _ = stream.set_nodelay(true);
        if self.arrivals.send(Arrival { id, to, client }).await.is_err() {
            return;
        }
        let passed = match stream.into_std() {
            Ok(stream) => {
                self.host.pass_stream(STREAM_PORT, id, stream.into()).await.map_err(|error| chain(&error))
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = passed {
            tracing::warn!(error, "a connection cannot be handed in");
        }
    }
}
