//! The three clocks that the agent reads: wall time for people, monotonic time for durations, boot time for phases.

use rustix::time::{ClockId, Timespec, clock_gettime};

fn nanos(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Nanoseconds since 1970.
pub(crate) fn unix_nanos() -> u64 {
    nanos(clock_gettime(ClockId::Realtime))
}

/// Nanoseconds on a clock that never steps; the same for all processes of this kernel.
pub(crate) fn monotonic_nanos() -> u64 {
    nanos(clock_gettime(ClockId::Monotonic))
}

/// Microseconds since the kernel's start.
pub(crate) fn boot_micros() -> u64 {
    nanos(clock_gettime(ClockId::Boottime)) / 1000
}
