//! CLOCK_MONOTONIC in microseconds: the one clock that the CLI, the daemon and the VMM on one host share, so that their
//! times can stand in one table.

use rustix::time::{ClockId, clock_gettime};

/// Microseconds of CLOCK_MONOTONIC.
pub(crate) fn monotonic_micros() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000
}
