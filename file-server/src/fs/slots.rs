//! Places for descriptors. What the guest has open and what is granted stays below what the process may have, so that there are always some
//! left for the control socket, the rings, and what is open for the length of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is left free: standard and control descriptors, three for each ring, and a few for each thread that serves a request.
const SPARE: u64 = 96;
/// The most directories to keep open for look-ups.
const MAX_DIRECTORIES: u64 = 4096;

/// The places of a process.
#[derive(Debug)]
pub(super) struct Slots {
    limit: u64,
    used: Arc<AtomicU64>,
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub(super) struct Slot(Arc<AtomicU64>);

/// How many directories a process that may have so many descriptors keeps open for look-ups.
pub(super) fn directories_for(descriptors: u64) -> u64 {
    (descriptors / 4).clamp(8, MAX_DIRECTORIES)
}

impl Slots {
    /// For a process that may have so many descriptors.
    pub(super) fn new(descriptors: u64) -> Self {
        let spare = SPARE.min(descriptors / 8);
        let limit = descriptors.saturating_sub(directories_for(descriptors) + spare);
        Self { limit, used: Arc::default() }
    }

    /// One for something that the guest opens. It cannot take the last ones.
    pub(super) fn for_guest(&self) -> Option<Slot> {
        self.take(self.limit - self.limit / 8)
    }

    /// One for a grant.
    pub(super) fn for_grant(&self) -> Option<Slot> {
        self.take(self.limit)
    }

    fn take(&self, limit: u64) -> Option<Slot> {
        let one_more = |used| (used < limit).then_some(used + 1);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Slot(Arc::clone(&self.used)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_leaves_some_for_grants_and_both_leave_some_for_the_server() {
        let slots = Slots::new(1024);
        let open: Vec<_> = std::iter::from_fn(|| slots.for_guest()).collect();
        let granted: Vec<_> = std::iter::from_fn(|| slots.for_grant()).collect();
        assert_eq!((open.len(), granted.len()), (588, 84));
        assert_eq!(588 + 84 + 256 + SPARE, 1024);
        drop(open);
        assert!(slots.for_guest().is_some() && slots.for_grant().is_some());
        assert_eq!(granted.len() as u64, slots.used.load(Ordering::Relaxed));
        assert!(Slots::new(0).for_grant().is_none());
    }
}
