//! Small bridges between crates that name descriptors differently, and the few system calls that have no safe name.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// An event's descriptor, borrowed for as long as the event is.
pub(crate) fn borrow_event(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns its descriptor and is borrowed for the result's lifetime.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Stacks of the threads that serve processors and devices: nothing there is deep. The usual 2 MiB would also be just what the host
/// likes to fill with a huge page.
pub(crate) const STACK: usize = 256 * 1024;
