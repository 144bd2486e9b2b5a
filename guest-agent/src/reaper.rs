//! Reaps orphans: processes that were given to the agent because their parent ended. What the agent started itself is
//! reaped where it is waited for, and never here.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::sys;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// Which children are awaited elsewhere.
#[derive(Default)]
pub(crate) struct Reaper {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    awaited: HashSet<u32>,
    /// Starts whose process may exist already, without its number being known.
    starting: usize,
}

/// While it exists, no child is taken for an orphan.
pub(crate) struct Starting<'a>(&'a Reaper);

impl Reaper {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process is about to be made.
    pub(crate) fn starting(&self) -> Starting<'_> {
        self.inner().starting += 1;
        Starting(self)
    }

    /// Someone waits for this child.
    pub(crate) fn is_awaited(&self, pid: u32) {
        self.inner().awaited.insert(pid);
    }

    /// This child was reaped by who waited for it.
    pub(crate) fn was_reaped(&self, pid: u32) {
        self.inner().awaited.remove(&pid);
        self.reap();
    }

    /// Reaps every orphan that has ended.
    pub(crate) fn reap(&self) {
        let inner = self.inner();
        if inner.starting > 0 {
            return;
        }
        loop {
            // One that is awaited hides those behind it until it was reaped; then this runs again.
            let Some(pid) = sys::peek_ended_child().filter(|pid| !inner.awaited.contains(pid)) else {
                return;
            };
            let Some(id) = Pid::from_raw(pid as i32) else { return };
            if waitid(WaitId::Pid(id), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).is_err() {
                return;
            }
        }
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.inner().starting -= 1;
        self.0.reap();
    }
}
