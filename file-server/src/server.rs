//! The main thread: serves the control socket, one client at a time. A new client replaces the old one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use coracle_worker::chain;
use coracle_worker::limit::warn_limited;
use coracle_worker::socket::{self, Received, SocketError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::socket_type;

use crate::control::{Answer, FromClient, Outcome, Reply, Request, Status};
use crate::device;
use crate::fs::Exported;

/// How long to leave the listener alone when a client cannot be accepted, unless something else happens before: other processes give
/// descriptors back, too, and nobody says so.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Serves `listener` until the machine is over, or the last client is gone without having asked to serve one. `namespaces` is whether the process
/// has left the host's.
pub(crate) fn serve(listener: &OwnedFd, files: Arc<Exported>, namespaces: bool) -> io::Result<()> {
    let over = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let mut server = Server { files, over, namespaces, serving: false, deaf: false, client: None };
    loop {
        let [over, new, spoken] = server.wait(listener)?;
        if over {
            tracing::info!("the machine is over");
            return Ok(());
        }
        if new {
            match socket::accept(listener.as_fd()) {
                Ok(client) => {
                    server.client = Some(client);
                    continue;
                }
                Err(error) => {
                    warn_limited!(error = chain(&error), "a client cannot be accepted");
                    server.deaf = true;
                }
            }
        }
        if spoken {
            server.serve_client();
        }
        if server.client.is_none() && !server.serving && spoken {
            tracing::info!("the daemon is gone, and there is no machine to serve");
            return Ok(());
        }
    }
}

struct Server {
    files: Arc<Exported>,
    over: Arc<OwnedFd>,
    namespaces: bool,
    serving: bool,
    /// The listener is not to be waited for this time.
    deaf: bool,
    client: Option<OwnedFd>,
}

impl Server {
    /// Waits until the machine is over, there is a new client, or the client says something.
    fn wait(&mut self, listener: &OwnedFd) -> io::Result<[bool; 3]> {
        let deaf = std::mem::take(&mut self.deaf);
        let listen = if deaf { PollFlags::empty() } else { PollFlags::IN };
        let mut polled = vec![
            PollFd::from_borrowed_fd(self.over.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), listen),
        ];
        polled.extend(self.client.as_ref().map(|client| PollFd::new(client, PollFlags::IN)));
        match poll(&mut polled, deaf.then_some(&PATIENCE)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready = |index: usize| polled.get(index).is_some_and(|polled| !polled.revents().is_empty());
        Ok([ready(0), ready(1), ready(2)])
    }

    /// Answers one request; a client that breaks the protocol, or does not read its replies, is dropped.
    fn serve_client(&mut self) {
        let Some(client) = &self.client else { return };
        let (bytes, fds) = match socket::receive(client) {
            Ok(Received::Message(bytes, fds)) => (bytes, fds),
            Err(SocketError::WouldBlock) => return,
            Ok(Received::Closed) => return self.client = None,
            Err(error) => {
                tracing::warn!(%error, "the daemon's connection failed");
                return self.client = None;
            }
        };
        let message: FromClient = match serde_json::from_slice(&bytes) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(%error, "the daemon sent a message that cannot be read");
                return self.client = None;
            }
        };
        let outcome = self.carry_out(message.request, fds).map_or_else(Outcome::Error, Outcome::Ok);
        let reply = Reply { id: message.id, outcome };
        let sent = serde_json::to_vec(&reply).map_err(io::Error::other).and_then(|bytes| {
            let client = self.client.as_ref().ok_or(io::ErrorKind::NotConnected)?;
            socket::send(client, &bytes, &[]).map_err(io::Error::other)
        });
        if let Err(error) = sent {
            tracing::warn!(%error, "the daemon cannot be answered");
            self.client = None;
        }
    }

    fn carry_out(&mut self, request: Request, mut fds: Vec<OwnedFd>) -> Result<Answer, String> {
        let expected = request.expected_fds();
        if fds.len() != expected {
            return Err(format!("it came with {} descriptors instead of {expected}", fds.len()));
        }
        let fd = fds.pop();
        match (request, fd) {
            (Request::Serve, Some(frontend)) => self.start(frontend)?,
            (Request::Grant(grant), Some(tree)) => {
                self.files.grant(grant, tree).map_err(|error| chain(&error))?;
            }
            (Request::Revoke(revoke), _) => self.files.revoke(&revoke.id).map_err(|error| chain(&error))?,
            (Request::Status, _) => return Ok(Answer::Status(self.status())),
            (_, None) => return Err("its descriptor is missing".into()),
        }
        Ok(Answer::Done)
    }

    fn status(&self) -> Status {
        let (nodes, open) = self.files.counts();
        Status {
            serving: self.serving,
            namespaces: self.namespaces,
            grants: self.files.grants(),
            nodes,
            open,
        }
    }

    fn start(&mut self, frontend: OwnedFd) -> Result<(), String> {
        if self.serving {
            return Err("a machine is served already".into());
        }
        if !matches!(socket_type(&frontend), Ok(rustix::net::SocketType::STREAM)) {
            return Err("the front end's descriptor is not a stream socket".into());
        }
        let (files, over) = (Arc::clone(&self.files), Arc::clone(&self.over));
        let frontend = UnixStream::from(frontend);
        frontend.set_nonblocking(false).map_err(|error| error.to_string())?;
        std::thread::Builder::new()
            .name("frontend".into())
            .spawn(move || {
                if let Err(error) = device::serve(files, frontend) {
                    tracing::error!(%error, "the VMM broke the protocol");
                }
                // It takes a number, whatever happens.
                let _ = rustix::io::write(&over, &1u64.to_ne_bytes());
            })
            .map_err(|error| format!("a thread could not be started: {error}"))?;
        self.serving = true;
        Ok(())
    }
}
