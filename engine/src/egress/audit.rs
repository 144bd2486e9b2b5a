//! Which connections containers asked for, and whether they were let out: the newest of them, in memory. A container that asks for very
//! many pushes older ones out; it never takes more room.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use serde::Serialize;

use crate::time::UnixNanos;

/// How many are kept.
const KEPT: usize = 4096;

/// A line: a connection that a container asked for.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Line {
    /// When, RFC 3339.
    pub(crate) time: String,
    /// The container's id; empty if no container has the address that it came from.
    pub(crate) container: String,
    /// The container's name then.
    pub(crate) name: String,
    /// `tcp`, `udp`, `icmp` or `dns`.
    pub(crate) protocol: &'static str,
    /// Where to; empty for `dns`.
    pub(crate) destination: String,
    /// The name that was asked for, or that the address was allowed by; may be empty.
    pub(crate) host: String,
    /// Whether it was let out.
    pub(crate) allowed: bool,
    /// Why not; empty if it was.
    pub(crate) reason: &'static str,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Audit(Mutex<VecDeque<Line>>);

impl Audit {
    pub(super) fn note(&self, line: Line) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// The lines, oldest first: all, or those of one container.
    pub(crate) fn lines(&self, container: Option<&str>) -> Vec<Line> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| container.is_none_or(|id| line.container == id)).cloned().collect()
    }
}

impl Line {
    pub(super) fn new(
        protocol: &'static str,
        destination: Option<SocketAddr>,
        host: Option<&str>,
        refused: Option<&'static str>,
    ) -> Self {
        let destination = match destination {
            // The port of an echo request is its number.
            Some(address) if protocol == "icmp" => address.ip().to_string(),
            Some(address) => address.to_string(),
            None => String::new(),
        };
        Self {
            time: UnixNanos::now().rfc3339(),
            container: String::new(),
            name: String::new(),
            protocol,
            destination,
            host: host.unwrap_or_default().to_owned(),
            allowed: refused.is_none(),
            reason: refused.unwrap_or_default(),
        }
    }
}
