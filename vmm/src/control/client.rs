//! The daemon's side of the control protocol. Calls are synchronous and may come from any thread; a thread of the
//! client's own reads replies and events. What the VMM sends is checked, and a VMM that breaks the protocol is
//! treated as one that is gone.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::message::{
    Answer, AttachSegment, Boot, DetachSegment, Event, ExitReason, FromClient, FromVmm, Outcome, Request,
    Status, VsockConnect, VsockListen,
};
use coracle_worker::socket::{self, Received, SocketError};

/// How long a call waits for its reply. A VMM answers in microseconds, except for `boot`, which builds a machine.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("cannot talk to the VMM")]
    Socket(#[from] SocketError),
    /// The message could not be made.
    #[error("cannot encode a request to the VMM")]
    Encode(#[source] serde_json::Error),
    /// The reading thread could not be started.
    #[error("cannot start the thread that reads from the VMM")]
    Thread(#[source] std::io::Error),
    /// The VMM has ended or another client took over.
    #[error("the connection to the VMM is closed")]
    Closed,
    /// The VMM did not answer in time.
    #[error("the VMM did not answer within {} seconds", REPLY_TIMEOUT.as_secs())]
    TimedOut,
    /// The VMM answered with something else than was asked for.
    #[error("the VMM gave an answer that does not fit the request")]
    Unexpected,
    /// The VMM said no.
    #[error("the VMM refused: {0}")]
    Refused(String),
}

/// Something that the VMM reported of its own accord.
#[derive(Debug)]
pub enum Notice {
    /// The machine has ended.
    Exited(ExitReason),
    /// The guest connected to a port that was listened on.
    VsockAccepted {
        /// The host's port.
        port: u32,
        /// The guest's port.
        guest_port: u32,
        /// The host's end of the stream.
        stream: OwnedFd,
    },
    /// The VMM has ended or another client took over. Nothing comes after this.
    Disconnected,
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

/// A connection to a VMM. Dropping it closes the connection; the machine runs on.
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
    /// Connects to the control socket at `path`. `on_notice` is called from the client's own thread.
    pub fn connect(path: &Path, on_notice: impl FnMut(Notice) + Send + 'static) -> Result<Self, ClientError> {
        Self::new(socket::connect(path)?, on_notice)
    }

    /// Uses a socket that is already connected.
    pub fn new(socket: OwnedFd, on_notice: impl FnMut(Notice) + Send + 'static) -> Result<Self, ClientError> {
        let shared = Arc::new(Shared { socket, calls: Mutex::default() });
        let reader = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("vmm-client".into())
            .spawn(move || read_until_closed(&reader, on_notice))
            .map_err(ClientError::Thread)?;
        Ok(Self { shared, next_id: AtomicU64::new(1) })
    }

    /// Builds the machine and starts it. `serial` must be given exactly when `boot.serial` is set.
    pub fn boot(
        &self,
        boot: Boot,
        kernel: BorrowedFd<'_>,
        initramfs: BorrowedFd<'_>,
        data_disk: BorrowedFd<'_>,
        serial: Option<BorrowedFd<'_>>,
    ) -> Result<(), ClientError> {
        let mut fds = vec![kernel, initramfs, data_disk];
        fds.extend(serial);
        self.done(Request::Boot(boot), &fds)
    }

    /// Adds a segment to the layers disk.
    pub fn attach_segment(&self, offset: u64, len: u64, file: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.done(Request::AttachSegment(AttachSegment { offset, len }), &[file])
    }

    /// Removes the segment that begins at `offset`.
    pub fn detach_segment(&self, offset: u64) -> Result<(), ClientError> {
        self.done(Request::DetachSegment(DetachSegment { offset }), &[])
    }

    /// Connects `stream` (the VMM's end of it) to a port in the guest. A guest that refuses shows as end of file.
    pub fn vsock_connect(&self, port: u32, stream: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.done(Request::VsockConnect(VsockConnect { port, from: None }), &[stream])
    }

    /// The same from a port of the host that the guest knows the connection by; see [`VsockConnect::from`].
    pub fn vsock_connect_from(
        &self,
        from: u32,
        port: u32,
        stream: BorrowedFd<'_>,
    ) -> Result<(), ClientError> {
        self.done(Request::VsockConnect(VsockConnect { port, from: Some(from) }), &[stream])
    }

    /// Accepts the guest's connections to a host port; see [`VsockListen`].
    pub fn vsock_listen(&self, port: u32, keep: bool) -> Result<(), ClientError> {
        self.done(Request::VsockListen(VsockListen { port, keep }), &[])
    }

    /// Asks what the machine is doing.
    pub fn status(&self) -> Result<Status, ClientError> {
        match self.call(Request::Status, &[])? {
            Answer::Status(status) => Ok(*status),
            Answer::Done => Err(ClientError::Unexpected),
        }
    }

    /// Stops the processors until [`Client::resume`].
    pub fn pause(&self) -> Result<(), ClientError> {
        self.done(Request::Pause, &[])
    }

    /// Lets the processors run again.
    pub fn resume(&self) -> Result<(), ClientError> {
        self.done(Request::Resume, &[])
    }

    /// Ends the machine at once.
    pub fn stop(&self) -> Result<(), ClientError> {
        self.done(Request::Stop, &[])
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
        let sent = socket::send(&self.shared.socket, &bytes, fds);
        let outcome = match sent {
            Ok(()) => receiver.recv_timeout(REPLY_TIMEOUT),
            Err(error) => {
                self.shared.lock().waiting.remove(&id);
                return Err(error.into());
            }
        };
        match outcome {
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
        // Wakes the reading thread, which holds the socket too. It fails only if the VMM is gone already.
        let _ = rustix::net::shutdown(self.shared.socket.as_fd(), rustix::net::Shutdown::Both);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_until_closed(shared: &Shared, mut on_notice: impl FnMut(Notice)) {
    while let Ok(Received::Message(bytes, mut fds)) = socket::receive(&shared.socket) {
        match serde_json::from_slice(&bytes) {
            Ok(FromVmm::Reply(reply)) => {
                if let Some(sender) = shared.lock().waiting.remove(&reply.id) {
                    // A caller that has given up is no longer listening.
                    let _ = sender.send(reply.outcome);
                }
            }
            Ok(FromVmm::Event(Event::Exited { reason })) => on_notice(Notice::Exited(reason)),
            Ok(FromVmm::Event(Event::VsockAccepted { port, guest_port })) => {
                if let Some(stream) = fds.pop() {
                    on_notice(Notice::VsockAccepted { port, guest_port, stream });
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the VMM sent a message that cannot be read");
                break;
            }
        }
    }
    let mut calls = shared.lock();
    calls.closed = true;
    calls.waiting.clear();
    drop(calls);
    on_notice(Notice::Disconnected);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::message::Reply;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::sync::mpsc::channel;

    fn serve_one(server: &OwnedFd, outcome: Outcome) -> (FromClient, usize) {
        let Received::Message(bytes, fds) = socket::receive(server).unwrap() else { panic!("closed") };
        let message: FromClient = serde_json::from_slice(&bytes).unwrap();
        let reply = FromVmm::Reply(Reply { id: message.id, outcome });
        socket::send(server, &serde_json::to_vec(&reply).unwrap(), &[]).unwrap();
        (message, fds.len())
    }

    #[test]
    fn calls_and_events_pass_each_other_and_the_end_is_noticed() {
        let (left, right) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let (notices, seen) = channel();
        let client = Client::new(left, move |notice| notices.send(notice).unwrap()).unwrap();
        let server = std::thread::spawn(move || {
            let file = tempfile::tempfile().unwrap();
            let event = FromVmm::Event(Event::VsockAccepted { port: 1024, guest_port: 7 });
            socket::send(&right, &serde_json::to_vec(&event).unwrap(), &[file.as_fd()]).unwrap();
            let (message, fds) = serve_one(&right, Outcome::Ok(Answer::Done));
            assert_eq!(
                (message.request, fds),
                (Request::VsockConnect(VsockConnect { port: 9, from: None }), 1)
            );
            serve_one(&right, Outcome::Error("not now".into()));
        });
        let file = tempfile::tempfile().unwrap();
        client.vsock_connect(9, file.as_fd()).unwrap();
        assert!(matches!(client.pause(), Err(ClientError::Refused(text)) if text == "not now"));
        server.join().unwrap();
        assert!(matches!(seen.recv().unwrap(), Notice::VsockAccepted { port: 1024, guest_port: 7, .. }));
        assert!(matches!(seen.recv().unwrap(), Notice::Disconnected));
        assert!(matches!(client.status(), Err(ClientError::Closed | ClientError::Socket(_))));
    }
}
