//! Keeps what a guest can trigger from flooding the host's log: each call site has a limiter of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock;

/// A lock-free limiter (GCRA): a burst, then one event per interval.
#[derive(Debug, Default)]
pub struct Limiter {
    /// Monotonic nanoseconds at which the burst would be fully available again.
    horizon: AtomicU64,
}

const INTERVAL: u64 = Duration::from_secs(5).as_nanos() as u64;
const BURST: u64 = 10;

impl Limiter {
    /// One that allows its whole burst.
    pub const fn new() -> Self {
        Self { horizon: AtomicU64::new(0) }
    }

    /// Whether the event may be logged now.
    pub fn allow(&self) -> bool {
        self.allow_at(clock::now())
    }

    fn allow_at(&self, now: u64) -> bool {
        self.horizon
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |horizon| {
                let next = horizon.max(now) + INTERVAL;
                (next - now <= BURST * INTERVAL).then_some(next)
            })
            .is_ok()
    }
}

/// `tracing::warn!`, limited per call site.
#[macro_export]
macro_rules! warn_limited {
    ($($arguments:tt)*) => {{
        static LIMITER: $crate::limit::Limiter = $crate::limit::Limiter::new();
        if LIMITER.allow() {
            tracing::warn!($($arguments)*);
        }
    }};
}
pub use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_burst_only_one_event_per_interval_passes() {
        let limiter = Limiter::new();
        let start = 1_000_000_000_000;
        assert_eq!((0..100).filter(|_| limiter.allow_at(start)).count(), 10);
        assert!(!limiter.allow_at(start + INTERVAL - 1));
        assert!(limiter.allow_at(start + INTERVAL));
        assert!(!limiter.allow_at(start + INTERVAL));
    }
}
