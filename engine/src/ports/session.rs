//! The conversation with one sandbox's agent about published ports, for as long as the daemon runs: it is begun anew with each
//! life of the sandbox.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use coracle_agent_api::{
    egress::STREAM_PORT,
    ports::{Arrival, ContainerPort, FIRST_ARRIVAL, LAST_ARRIVAL, Listening},
};
use futures_util::StreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};
use tokio_util::codec::{FramedRead, LinesCodec};

use super::bind::Bound;
use crate::{core::Core, error::chain, sandbox::SandboxState, sandboxes::Host};

/// The longest line that an agent may send: some tens of thousands of ports.
const MAX_LINE: usize = 16 * 1024 * 1024;
/// Connections that wait for being announced.
const WAITING: usize = 1024;
/// A conversation that broke is begun again after this long.
const PAUSE: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Clone)]
pub(super) struct Session {
    host: Arc<Host>,
    arrivals: mpsc::Sender<Arrival>,
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
        let mut state = self.host.state();
        let instance = |state: &SandboxState| state.running().map(|running| running.instance);
        let told = async {
            let mut newest = self.newest.subscribe();
            while newest.changed().await.is_ok() {
                let Some(core) = core.upgrade() else { return };
                let ports = newest.borrow_and_update().clone();
                core.ports.set_listening(self.host.id(), &ports);
            }
        };
        let talk = async {
            loop {
                let Ok(life) =
                    state.wait_for(|state| state.running().is_some()).await.map(|state| instance(&state))
                else {
                    return;
                };
                let ended = tokio::select! {
                    ended = self.talk(&mut announced) => ended,
                    _ = state.wait_for(|state| instance(state) != life) => "the sandbox has ended".to_owned(),
                };
                tracing::debug!(sandbox = %self.host.id(), error = ended, "published ports refuse for now");
                self.newest.send_replace(BTreeSet::new());
                let changed = state.wait_for(|state| instance(state) != life);
                let _ = tokio::time::timeout(PAUSE, changed).await;
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
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    stopped = listens.wait_for(|listens| !*listens) => match stopped {
                        Ok(_) => break,
                        Err(_) => return,
                    },
                };
                match accepted {
                    Ok((stream, client)) => {
                        drop(tokio::spawn(self.clone().hand_in(stream, client, to.clone())))
                    }
                    // Of one connection, or for want of descriptors: then the others must end first.
                    Err(error) => {
                        tracing::warn!(%error, host = %bound.address(), "a connection cannot be accepted");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
            drop(listener);
            bound.refuse();
        }
    }

    async fn hand_in(self, stream: TcpStream, client: SocketAddr, to: ContainerPort) {
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
