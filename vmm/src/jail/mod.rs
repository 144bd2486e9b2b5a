//! The process gives up what it does not need. In this order: descriptors that strayed in, the way to new privileges, core dumps,
//! the view of the host's files, networks and users (namespaces, where the host allows them), capabilities, every path and port
//! (Landlock, where the kernel has it), and all system calls but those that the code here makes (seccomp, on every kernel).
//!
//! Each layer holds by itself: where one is missing, the others stand. The system call filter has a list for each kind of thread,
//! beside the reasons for it; a thread can only ever narrow what its parent had. A process id namespace is not made: it would need a
//! second process, and no thread may signal, trace or look at another process anyway.
#![allow(unsafe_code)]

mod filter;
mod namespaces;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

pub(crate) use filter::{Role, narrow};

/// Descriptor of the control socket by convention.
const CONTROL_FD: RawFd = 3;
/// Enough for every connection that the vsock device can have, twice, and for the rest.
const MAX_DESCRIPTORS: u64 = 16 * 1024;

/// Takes the control socket that the process was started with.
pub(crate) fn inherited_control() -> io::Result<OwnedFd> {
    // SAFETY: fcntl only looks whether the descriptor is open.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the caller promises by calling this first that nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) })
}

/// Whether this is a listening socket for whole messages.
pub(crate) fn is_control_socket(socket: BorrowedFd<'_>) -> bool {
    matches!(socket_type(socket), Ok(SocketType::SEQPACKET)) && matches!(socket_acceptconn(socket), Ok(true))
}

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
    let mut keep: Vec<_> = keep.iter().copied().filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        close_from_to(first, fd - 1)?;
        first = fd + 1;
    }
    close_from_to(first, RawFd::MAX)?;
    limit_resources()?;
    if let Err(error) = namespaces::leave() {
        tracing::info!(%error, "the host allows no namespaces: the VMM does without");
    }
    let nothing = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: nothing, permitted: nothing, inheritable: nothing })?;
    forbid_paths_and_ports().map_err(io::Error::other)
}

/// The guest's memory must not end up in a core file; the vsock device may need many descriptors.
fn limit_resources() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(MAX_DESCRIPTORS).min(MAX_DESCRIPTORS);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) })?)
}

/// What the kernel knows of these is forbidden; what it does not know, it cannot forbid.
fn forbid_paths_and_ports() -> Result<(), landlock::RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()
        .map(drop)
}

fn close_from_to(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: closes descriptors that nothing in this process owns: those that it owns are excepted by the caller, and
    // this runs before any others are opened.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The descriptor's number, for [`enter`].
pub(crate) fn number(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
}
