//! Several jobs at a time by io_uring. The ring is restricted to the few operations that a disk needs before it is used, so that
//! it cannot be a way around the thread's system call filter.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};

use super::job::Job;

/// Jobs that are under way at a time.
pub(super) const DEPTH: usize = 128;

pub(super) struct Ring {
    ring: IoUring,
}

impl Ring {
    /// Fails where the host has no io_uring, or does not let us have it.
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(DEPTH as u32)?;
        let mut allowed =
            [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE]
                .map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self { ring })
    }

    /// Readable when something is complete.
    pub(super) fn completions(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor and is borrowed for the result's lifetime.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Queues the job's next system call. It starts with [`Ring::submit`].
    ///
    /// # Safety
    /// The job must not change, and neither it nor the memory of its buffers go away, until the result with this number was taken.
    pub(super) unsafe fn push(&mut self, job: &Job<'_>, number: u64) -> io::Result<()> {
        let entry = job.entry().user_data(number);
        // SAFETY: the entry's pointers stay valid by the caller's promise.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit()?;
        }
        Ok(())
    }

    /// Starts what was queued, without waiting for any of it.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until at least one call is complete.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A number and its result.
    pub(super) fn next(&mut self) -> Option<(u64, i32)> {
        self.ring.completion().next().map(|entry| (entry.user_data(), entry.result()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the host refuses the ring, that is all there is to say of it; the disk then does without.
    #[test]
    fn the_ring_takes_no_operation_that_a_disk_does_not_need() {
        let mut ring = match Ring::new() {
            Ok(ring) => ring,
            Err(error) => {
                let code = error.raw_os_error();
                assert!(matches!(code, Some(libc::ENOSYS | libc::EPERM | libc::ENOMEM)), "{error}");
                return eprintln!("there is no io_uring here: {error}");
            }
        };
        let nothing = opcode::Nop::new().build().user_data(7);
        // SAFETY: the entry points to nothing.
        unsafe { ring.ring.submission().push(&nothing) }.unwrap();
        ring.wait().unwrap();
        assert_eq!(ring.next(), Some((7, -libc::EACCES)));
    }
}
