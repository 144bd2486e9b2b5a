//! The daemon's side of the control protocol. Calls are synchronous and may come from any thread; a thread of the client's own reads the
//! replies and notices the server's end.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coracle_worker::socket::{self, Received, SocketError};

use super::message::{Answer, FromClient, Grant, GrantId, Outcome, Reply, Request, Revoke, Status};

/// How long a call waits for its reply. A server answers in microseconds unless the host's file system hangs.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("cannot talk to the file server")]
    Socket(#[from] SocketError),
    /// The message could not be made.
    #[error("cannot encode a request to the file server")]
    Encode(#[source] serde_json::Error),
    /// The reading thread could not be started.
    #[error("cannot start the thread that reads from the file server")]
    Thread(#[source] std::io::Error),
    /// The server has ended or another client took over.
    #[error("the connection to the file server is closed")]
    Closed,
    /// The server did not answer in time.
    #[error("the file server did not answer within {} seconds", REPLY_TIMEOUT.as_secs())]
    TimedOut,
    /// The server answered with something else than was asked for.
    #[error("the file server gave an answer that does not fit the request")]
    Unexpected,
    /// The server said no.
    #[error("the file server refused: {0}")]
    Refused(String),
}

struct Shared {
    socket: OwnedFd,
    calls: Mutex<Calls>,
}

#[derive(Default)]
struct Calls {
    closed: bool,
    waiting: HashMap<u64, SyncSender<Outcome>>,
}

/// A connection to a file server. Dropping it closes the connection; a server that serves a machine goes on.
pub struct Client {
    shared: Arc<Shared>,
    next_id: AtomicU64,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("socket", &self.shared.socket).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the control socket at `path`. `on_closed` is called once, from the client's own thread, when the server has ended, another
    /// client took over, or this client was dropped.
    pub fn connect(path: &Path, on_closed: impl FnOnce() + Send + 'static) -> Result<Self, ClientError> {
        Self::new(socket::connect(path)?, on_closed)
    }

    /// Uses a socket that is already connected.
    pub fn new(socket: OwnedFd, on_closed: impl FnOnce() + Send + 'static) -> Result<Self, ClientError> {
        let shared = Arc::new(Shared { socket, calls: Mutex::default() });
        let reader = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("fsd-client".into())
            .spawn(move || {
                read_until_closed(&reader);
                on_closed();
            })
            .map_err(ClientError::Thread)?;
        Ok(Self { shared, next_id: AtomicU64::new(1) })
    }

    /// Lets the server serve the machine whose vhost-user frontend has the other end of `frontend`.
    pub fn serve(&self, frontend: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.done(Request::Serve, &[frontend])
    }

    /// Opens a tree; see [`Grant`]. `tree` is the directory or file, opened with `O_PATH`.
    pub fn grant(&self, grant: Grant, tree: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.done(Request::Grant(grant), &[tree])
    }

    /// Closes a tree; see [`Revoke`].
    pub fn revoke(&self, id: GrantId) -> Result<(), ClientError> {
        self.done(Request::Revoke(Revoke { id }), &[])
    }

    /// Asks what is served.
    pub fn status(&self) -> Result<Status, ClientError> {
        match self.call(Request::Status, &[])? {
            Answer::Status(status) => Ok(status),
            Answer::Done => Err(ClientError::Unexpected),
        }
    }

    fn done(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        match self.call(request, fds)? {
            Answer::Done => Ok(()),
            Answer::Status(_) => Err(ClientError::Unexpected),
        }
    }

    fn call(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<Answer, ClientError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = serde_json::to_vec(&FromClient { id, request }).map_err(ClientError::Encode)?;
        let (sender, receiver) = sync_channel(1);
        {
            let mut calls = self.shared.lock();
            if calls.closed {
                return Err(ClientError::Closed);
            }
            calls.waiting.insert(id, sender);
        }
        if let Err(error) = socket::send(&self.shared.socket, &bytes, fds) {
            self.shared.lock().waiting.remove(&id);
            return Err(error.into());
        }
        match receiver.recv_timeout(REPLY_TIMEOUT) {
            Ok(Outcome::Ok(answer)) => Ok(answer),
            Ok(Outcome::Error(message)) => Err(ClientError::Refused(message)),
            Err(RecvTimeoutError::Disconnected) => Err(ClientError::Closed),
            Err(RecvTimeoutError::Timeout) => {
                self.shared.lock().waiting.remove(&id);
                Err(ClientError::TimedOut)
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Wakes the reading thread, which holds the socket too. It fails only if the server is gone already.
        let _ = rustix::net::shutdown(self.shared.socket.as_fd(), rustix::net::Shutdown::Both);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_until_closed(shared: &Shared) {
    while let Ok(Received::Message(bytes, _)) = socket::receive(&shared.socket) {
        let reply: Reply = match serde_json::from_slice(&bytes) {
            Ok(reply) => reply,
            Err(error) => {
                tracing::warn!(%error, "the file server sent a message that cannot be read");
                break;
            }
        };
        if let Some(sender) = shared.lock().waiting.remove(&reply.id) {
            // A caller that has given up is no longer listening.
            let _ = sender.send(reply.outcome);
        }
    }
    let mut calls = shared.lock();
    calls.closed = true;
    calls.waiting.clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::sync::mpsc::channel;

    fn serve_one(server: &OwnedFd, outcome: Outcome) -> (Request, usize) {
        let Received::Message(bytes, fds) = socket::receive(server).unwrap() else { panic!("closed") };
        let message: FromClient = serde_json::from_slice(&bytes).unwrap();
        let reply = Reply { id: message.id, outcome };
        socket::send(server, &serde_json::to_vec(&reply).unwrap(), &[]).unwrap();
        (message.request, fds.len())
    }

    #[test]
    fn calls_are_answered_and_the_end_is_noticed() {
        let (left, right) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let (closed, seen) = channel();
        let client = Client::new(left, move || closed.send(()).unwrap()).unwrap();
        let server = std::thread::spawn(move || {
            assert_eq!(serve_one(&right, Outcome::Ok(Answer::Done)), (Request::Serve, 1));
            serve_one(&right, Outcome::Error("not now".into()));
        });
        let file = tempfile::tempfile().unwrap();
        client.serve(file.as_fd()).unwrap();
        assert!(matches!(client.status(), Err(ClientError::Refused(text)) if text == "not now"));
        server.join().unwrap();
        seen.recv().unwrap();
        assert!(matches!(client.status(), Err(ClientError::Closed | ClientError::Socket(_))));
    }
}
