//! The daemon's side of the control protocol. Calls are synchronous and may come from any thread; a thread of the client's own reads the
//! replies and notices the server's end.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

pub use coracle_worker::control::ClientError;
use coracle_worker::control::{Caller, Heard};

use super::connect;
use super::message::{Answer, Grant, GrantId, Request, Revoke, Status};

/// Who is called, in errors.
const PEER: &str = "the file server";
/// How long a call waits for its reply. A server answers in microseconds unless the host's file system hangs.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a file server. Dropping it closes the connection; a server that serves a machine goes on.
#[derive(Debug)]
pub struct Client(Caller<Answer>);

impl Client {
    /// Connects to the control socket at `path`. `on_closed` is called once, from the client's own thread, when the server has ended, another
    /// client took over, or this client was dropped.
    pub fn connect(path: &Path, on_closed: impl FnOnce() + Send + 'static) -> Result<Self, ClientError> {
        let socket = connect(path).map_err(|source| ClientError::Socket { peer: PEER, source })?;
        Self::new(socket, on_closed)
    }

    /// Uses a socket that is already connected.
    pub fn new(socket: OwnedFd, on_closed: impl FnOnce() + Send + 'static) -> Result<Self, ClientError> {
        let mut on_closed = Some(on_closed);
        let hear = move |heard: Heard<'_>| match heard {
            Heard::Message(bytes, _) => serde_json::from_slice(bytes).map(Some),
            Heard::Closed => {
                if let Some(on_closed) = on_closed.take() {
                    on_closed();
                }
                Ok(None)
            }
        };
        Caller::new(socket, PEER, REPLY_TIMEOUT, "fsd-client", hear).map(Self)
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
        match self.0.call(Request::Status, &[])? {
            Answer::Status(status) => Ok(status),
            Answer::Done => Err(self.0.unexpected()),
        }
    }

    fn done(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        match self.0.call(request, fds)? {
            Answer::Done => Ok(()),
            Answer::Status(_) => Err(self.0.unexpected()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::control::{FromClient, Outcome, Reply, receive, send};
    use coracle_worker::socket::Received;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::sync::mpsc::channel;

    fn serve_one(server: &OwnedFd, outcome: Outcome) -> (Request, usize) {
        let Received::Message(bytes, fds) = receive(server).unwrap() else { panic!("closed") };
        let message: FromClient = serde_json::from_slice(&bytes).unwrap();
        let reply = Reply { id: message.id, outcome };
        send(server, &serde_json::to_vec(&reply).unwrap(), &[]).unwrap();
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
        assert!(matches!(client.status(), Err(ClientError::Refused { reason, .. }) if reason == "not now"));
        server.join().unwrap();
        seen.recv().unwrap();
        assert!(matches!(client.status(), Err(ClientError::Closed { .. } | ClientError::Socket { .. })));
    }
}
