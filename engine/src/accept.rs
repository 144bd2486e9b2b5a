//! What to do when a connection cannot be accepted.

use std::{fmt::Display, io, time::Duration};

use rustix::io::Errno;
use tokio::sync::Notify;

/// How long to wait for the end of a connection before trying again: the daemon is not the only one who gives descriptors back.
const PATIENCE: Duration = Duration::from_secs(1);

/// The daemon's file descriptors, as those wait for them who accept connections.
#[derive(Debug, Default)]
pub(crate) struct Descriptors(Notify);

impl Descriptors {
    /// A connection has ended: its descriptors can be had.
    pub(crate) fn were_freed(&self) {
        self.0.notify_one();
    }

    /// Returns when it makes sense to accept again: at once when only the one connection was lost, else when descriptors were freed.
    pub(crate) async fn after(&self, error: &io::Error, listener: impl Display) {
        match Errno::from_io_error(error) {
            Some(Errno::CONNABORTED | Errno::CONNRESET | Errno::INTR | Errno::PROTO) => {}
            _ => {
                tracing::warn!(%error, %listener, "a connection cannot be accepted");
                let _ = tokio::time::timeout(PATIENCE, self.0.notified()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_lost_connection_is_no_reason_to_wait_and_the_end_of_one_ends_the_wait() {
        let (descriptors, begun) = (Descriptors::default(), tokio::time::Instant::now());
        descriptors.after(&Errno::CONNABORTED.into(), "x").await;
        descriptors.were_freed();
        descriptors.after(&Errno::MFILE.into(), "x").await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        descriptors.after(&Errno::MFILE.into(), "x").await;
        assert_eq!(begun.elapsed(), PATIENCE);
    }
}
