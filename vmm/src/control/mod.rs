//! The control protocol between the daemon and a VMM: JSON messages with file descriptors over a `SOCK_SEQPACKET`
//! unix socket. It stands on its own: the daemon uses [`Client`] without any of the machine behind it.
//! Neither end trusts the other's bytes: whatever does not decode is an error, never a panic.
//!
//! The socket *listens*; a VMM serves one client at a time and a new client replaces the old one, so that a daemon that
//! was restarted takes over its running machines. Every request has an id and one reply with the same id; events come
//! in between.

mod client;
mod message;

pub use client::{BootFds, Client, ClientError, Notice};
pub use coracle_worker::socket::{
    MAX_FDS, MAX_MESSAGE, Received, SocketError, accept, connect, listen, receive, send,
};
pub use message::{
    Answer, AttachSegment, Boot, BootTimes, DataDisk, DetachSegment, Event, ExitCounts, ExitReason,
    FILE_SYSTEM_TAG, FileRegion, FromClient, FromVmm, MachineState, Outcome, Reply, Request, Status,
    VsockConnect, VsockCounts, VsockListen,
};
