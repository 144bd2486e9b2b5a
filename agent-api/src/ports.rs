//! Published ports. The daemon has the sockets that clients on the host connect to; it listens on one only while something in
//! the container listens on the port behind it, and hands each accepted connection itself into the guest.
//!
//! Over one connection (`GET /v1/ports`, upgrade to [`PORTS_PROTOCOL`]; the newest one counts) lines of JSON go both ways: the agent
//! sends [`Listening`], first what is and then after each change; the daemon sends an [`Arrival`] for each connection. The stream
//! itself comes to [`crate::egress::STREAM_PORT`] from the port of the host that is the arrival's id, before or after the line.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ProcessId;

/// `Upgrade:` token of the connection.
pub const PORTS_PROTOCOL: &str = "coracle-ports";
/// The smallest id of an arrival.
pub const FIRST_ARRIVAL: u32 = 0x0100_0000;
/// The largest.
pub const LAST_ARRIVAL: u32 = 0x0fff_ffff;
/// The longest line that the daemon sends.
pub const MAX_ARRIVAL: usize = 512;

/// Which of the published TCP ports something listens on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listening {
    /// In no order.
    pub ports: Vec<ContainerPort>,
}

/// A TCP port of a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerPort {
    /// The container.
    pub container: ProcessId,
    /// The port in it.
    pub port: u16,
}

/// A connection that comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arrival {
    /// [`FIRST_ARRIVAL`] to [`LAST_ARRIVAL`].
    pub id: u32,
    /// For whom.
    pub to: ContainerPort,
    /// From whom, as the host sees it.
    pub client: SocketAddr,
}
