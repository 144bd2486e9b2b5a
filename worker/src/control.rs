//! The conversation on a control socket, whatever its words are: a request, which descriptors may come with, has one reply with the same id.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::socket::{self, Received, SocketError};

/// What a client sends: one request and the id its reply will carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FromClient<R> {
    /// Chosen by the client; comes back in the [`Reply`].
    pub id: u64,
    /// What is asked for.
    pub request: R,
}

/// The answer to the request with the same id; id 0 when the request could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply<A> {
    /// The request's id.
    pub id: u64,
    /// How it went.
    pub outcome: Outcome<A>,
}

/// How a request went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome<A> {
    /// It was done.
    Ok(A),
    /// It was not; why not, in a sentence.
    Error(String),
}

/// Why a call failed. `peer` is who was called, in words.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("cannot talk to {peer}")]
    Socket {
        /// Who was called.
        peer: &'static str,
        /// What happened.
        source: SocketError,
    },
    /// The message could not be made.
    #[error("cannot encode a request to {peer}")]
    Encode {
        /// Who was called.
        peer: &'static str,
        /// What happened.
        source: serde_json::Error,
    },
    /// The reading thread could not be started.
    #[error("cannot start the thread that reads from {peer}")]
    Thread {
        /// Who was called.
        peer: &'static str,
        /// What happened.
        source: std::io::Error,
    },
    /// The process has ended or another client took over.
    #[error("the connection to {peer} is closed")]
    Closed {
        /// Who was called.
        peer: &'static str,
    },
    /// There was no answer in time.
    #[error("{peer} did not answer within {} seconds", limit.as_secs())]
    TimedOut {
        /// Who was called.
        peer: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The answer is one to something else.
    #[error("{peer} gave an answer that does not fit the request")]
    Unexpected {
        /// Who was called.
        peer: &'static str,
    },
    /// The process said no.
    #[error("{peer} refused: {reason}")]
    Refused {
        /// Who was called.
        peer: &'static str,
        /// Its words.
        reason: String,
    },
}

struct Shared<A> {
    socket: OwnedFd,
    calls: Mutex<Calls<A>>,
}

struct Calls<A> {
    closed: bool,
    waiting: HashMap<u64, SyncSender<Outcome<A>>>,
}

impl<A> Shared<A> {
    fn lock(&self) -> MutexGuard<'_, Calls<A>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's end of a control socket. Calls are synchronous and may come from any thread; a thread of its own reads what comes. Dropping it
/// closes the connection.
pub struct Caller<A> {
    shared: Arc<Shared<A>>,
    next_id: AtomicU64,
    peer: &'static str,
    limit: Duration,
}

impl<A> std::fmt::Debug for Caller<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caller").field("socket", &self.shared.socket).finish_non_exhaustive()
    }
}

/// What the reading thread hears.
#[derive(Debug)]
pub enum Heard<'a> {
    /// A message, with its descriptors.
    Message(&'a [u8], Vec<OwnedFd>),
    /// The last: the peer has ended, another client took over, or this client was dropped.
    Closed,
}

impl<A: Send + 'static> Caller<A> {
    /// Talks to `peer` over a connected socket, and gives it `limit` for each reply. `hear` is told what comes, from a thread of the name
    /// `thread`. It gives back a reply that was one, and `None` for anything else; after an error the peer is treated as gone.
    pub fn new(
        socket: OwnedFd,
        peer: &'static str,
        limit: Duration,
        thread: &str,
        mut hear: impl FnMut(Heard<'_>) -> Result<Option<Reply<A>>, serde_json::Error> + Send + 'static,
    ) -> Result<Self, ClientError> {
        let calls = Mutex::new(Calls { closed: false, waiting: HashMap::new() });
        let shared = Arc::new(Shared { socket, calls });
        let reader = Arc::clone(&shared);
        let until_closed = move || {
            while let Ok(Received::Message(bytes, fds)) = socket::receive(&reader.socket) {
                match hear(Heard::Message(&bytes, fds)) {
                    Ok(Some(reply)) => {
                        if let Some(sender) = reader.lock().waiting.remove(&reply.id) {
                            // A caller that has given up is no longer listening.
                            let _ = sender.send(reply.outcome);
                        }
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, peer, "a message came that cannot be read");
                        break;
                    }
                }
            }
            let mut calls = reader.lock();
            calls.closed = true;
            calls.waiting.clear();
            drop(calls);
            let _ = hear(Heard::Closed);
        };
        std::thread::Builder::new()
            .name(thread.to_owned())
            .spawn(until_closed)
            .map_err(|source| ClientError::Thread { peer, source })?;
        Ok(Self { shared, next_id: AtomicU64::new(1), peer, limit })
    }

    /// Makes a request and waits for its answer.
    pub fn call(&self, request: impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<A, ClientError> {
        let peer = self.peer;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = serde_json::to_vec(&FromClient { id, request })
            .map_err(|source| ClientError::Encode { peer, source })?;
        let (sender, receiver) = sync_channel(1);
        {
            let mut calls = self.shared.lock();
            if calls.closed {
                return Err(ClientError::Closed { peer });
            }
            calls.waiting.insert(id, sender);
        }
        if let Err(source) = socket::send(&self.shared.socket, &bytes, fds) {
            self.shared.lock().waiting.remove(&id);
            return Err(ClientError::Socket { peer, source });
        }
        match receiver.recv_timeout(self.limit) {
            Ok(Outcome::Ok(answer)) => Ok(answer),
            Ok(Outcome::Error(reason)) => Err(ClientError::Refused { peer, reason }),
            Err(RecvTimeoutError::Disconnected) => Err(ClientError::Closed { peer }),
            Err(RecvTimeoutError::Timeout) => {
                self.shared.lock().waiting.remove(&id);
                Err(ClientError::TimedOut { peer, limit: self.limit })
            }
        }
    }

    /// The error of an answer that does not fit its request.
    pub fn unexpected(&self) -> ClientError {
        ClientError::Unexpected { peer: self.peer }
    }
}

impl<A> Drop for Caller<A> {
    fn drop(&mut self) {
        // Wakes the reading thread, which holds the socket too. It fails only if the peer is gone already.
        let _ = rustix::net::shutdown(self.shared.socket.as_fd(), rustix::net::Shutdown::Both);
    }
}
