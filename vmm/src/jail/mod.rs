//! The process gives up what it does not need: all the layers of [`coracle_worker::jail`].
//!
//! Each layer holds by itself: where one is missing, the others stand. The system call filter has a list for each kind of thread,
//! beside the reasons for it; a thread can only ever narrow what its parent had. A process id namespace is not made: it would need a
//! second process, and no thread may signal, trace or look at another process anyway.

mod filter;

use std::io;
use std::os::fd::RawFd;

use coracle_worker::jail;
use rustix::thread::CapabilitySet;

pub(crate) use coracle_worker::jail::{inherited_control, is_control_socket, number};
pub(crate) use filter::{Role, narrow};

/// Enough for every connection that the vsock device can have, twice, and for the rest.
const MAX_DESCRIPTORS: u64 = 16 * 1024;

/// Confines the process for the rest of its life, except for the descriptors to keep. It must have one thread only.
///
/// # Errors
/// Where a layer that every supported kernel has cannot be put up.
pub fn enter(keep: &[RawFd]) -> io::Result<()> {
    enter_unfiltered(keep)?;
    narrow(Role::Main)
}

/// All layers but the system call filter, so that a test can see that they hold without it.
#[doc(hidden)]
pub fn enter_unfiltered(keep: &[RawFd]) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    jail::close_others(keep)?;
    jail::limit_resources(MAX_DESCRIPTORS)?;
    if let Err(error) = jail::leave_namespaces(jail::Users::Leave) {
        tracing::info!(%error, "the host allows no namespaces: the VMM does without");
    }
    jail::keep_capabilities(CapabilitySet::empty())?;
    jail::forbid_paths_and_ports()
}
