//! The control protocol between the daemon and a file server: JSON messages with file descriptors over a `SOCK_SEQPACKET` unix socket,
//! framed as the VMM's are (`coracle_worker::socket`). Neither end trusts the other's bytes.
//!
//! The socket *listens*; a server has one client at a time and a new client replaces the old one, so that a daemon that was restarted takes
//! over its running servers and asks for their grants ([`Client::status`]). Every request has an id and one reply with the same id.

mod client;
mod message;

pub use client::{Client, ClientError};
pub use coracle_worker::socket::{SocketError, accept, connect, listen, receive, send};
pub use message::{
    Answer, FromClient, Grant, GrantId, GrantKind, InvalidGrantId, Outcome, Owners, Reply, Request, Revoke,
    Status,
};
