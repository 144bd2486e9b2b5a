//! The daemon's side of the control protocol. Calls are synchronous and may come from any thread; a thread of the
//! client's own reads replies and events. What the VMM sends is checked, and a VMM that breaks the protocol is
//! treated as one that is gone.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

pub use coracle_worker::control::ClientError;
use coracle_worker::control::{Caller, Heard};

use super::connect;
use super::message::{
    Answer, AttachSegment, Boot, DetachSegment, Event, ExitReason, FromVmm, Request, Status, VsockConnect,
    VsockListen,
};

/// Who is called, in errors.
const PEER: &str = "the VMM";
/// How long a call waits for its reply. A VMM answers in microseconds, except for `boot`, which builds a machine.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

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

/// What comes with a [`Boot`] request; see there.
#[derive(Debug, Clone, Copy)]
pub struct BootFds<'a> {
    /// The file that the kernel is in.
    pub kernel: BorrowedFd<'a>,
    /// The file that the initramfs is in.
    pub initramfs: BorrowedFd<'a>,
    /// The data disk, writable.
    pub data_disk: BorrowedFd<'a>,
    /// The serial log, exactly if [`Boot::serial`] is set.
    pub serial: Option<BorrowedFd<'a>>,
    /// The socket to the file server, exactly if [`Boot::file_server`] is set.
    pub file_server: Option<BorrowedFd<'a>>,
}

/// A connection to a VMM. Dropping it closes the connection; the machine runs on.
#[derive(Debug)]
pub struct Client(Caller<Answer>);

impl Client {
    /// Connects to the control socket at `path`. `on_notice` is called from the client's own thread.
    pub fn connect(path: &Path, on_notice: impl FnMut(Notice) + Send + 'static) -> Result<Self, ClientError> {
        let socket = connect(path).map_err(|source| ClientError::Socket { peer: PEER, source })?;
        Self::new(socket, on_notice)
    }

    /// Uses a socket that is already connected.
    pub fn new(
        socket: OwnedFd,
        mut on_notice: impl FnMut(Notice) + Send + 'static,
    ) -> Result<Self, ClientError> {
        let hear = move |heard: Heard<'_>| {
            let Heard::Message(bytes, mut fds) = heard else {
                on_notice(Notice::Disconnected);
                return Ok(None);
            };
            match serde_json::from_slice(bytes)? {
                FromVmm::Reply(reply) => return Ok(Some(reply)),
                FromVmm::Event(Event::Exited { reason }) => on_notice(Notice::Exited(reason)),
                FromVmm::Event(Event::VsockAccepted { port, guest_port }) => {
                    if let Some(stream) = fds.pop() {
                        on_notice(Notice::VsockAccepted { port, guest_port, stream });
                    }
                }
            }
            Ok(None)
        };
        Caller::new(socket, PEER, REPLY_TIMEOUT, "vmm-client", hear).map(Self)
    }

    /// Builds the machine and starts it.
    pub fn boot(&self, boot: Boot, fds: BootFds<'_>) -> Result<(), ClientError> {
        let mut all = vec![fds.kernel, fds.initramfs, fds.data_disk];
        all.extend(fds.serial);
        all.extend(fds.file_server);
        self.done(Request::Boot(boot), &all)
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
        match self.0.call(Request::Status, &[])? {
            Answer::Status(status) => Ok(*status),
            Answer::Done => Err(self.0.unexpected()),
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
    use crate::control::{FromClient, Outcome, Received, Reply, receive, send};
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::sync::mpsc::channel;

    fn serve_one(server: &OwnedFd, outcome: Outcome) -> (FromClient, usize) {
        let Received::Message(bytes, fds) = receive(server).unwrap() else { panic!("closed") };
        let message: FromClient = serde_json::from_slice(&bytes).unwrap();
        let reply = FromVmm::Reply(Reply { id: message.id, outcome });
        send(server, &serde_json::to_vec(&reply).unwrap(), &[]).unwrap();
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
            send(&right, &serde_json::to_vec(&event).unwrap(), &[file.as_fd()]).unwrap();
            let (message, fds) = serve_one(&right, Outcome::Ok(Answer::Done));
            assert_eq!(
                (message.request, fds),
                (Request::VsockConnect(VsockConnect { port: 9, from: None }), 1)
            );
            serve_one(&right, Outcome::Error("not now".into()));
        });
        let file = tempfile::tempfile().unwrap();
        client.vsock_connect(9, file.as_fd()).unwrap();
        assert!(matches!(client.pause(), Err(ClientError::Refused { reason, .. }) if reason == "not now"));
        server.join().unwrap();
        assert!(matches!(seen.recv().unwrap(), Notice::VsockAccepted { port: 1024, guest_port: 7, .. }));
        assert!(matches!(seen.recv().unwrap(), Notice::Disconnected));
        assert!(matches!(client.status(), Err(ClientError::Closed { .. } | ClientError::Socket { .. })));
    }
}
