//! The pieces of a jail. Each process puts up those that fit what it does, in this order: descriptors that strayed in, the way to new
//! privileges, core dumps, the view of the host's files, networks and users (namespaces, where the host allows them), capabilities, paths
//! and ports (Landlock, where the kernel has it), and all system calls but those that its code makes (seccomp, on every kernel).
//!
//! All of it is for life, and for a process that still has one thread only.
#![allow(unsafe_code)]

pub mod filter;
mod namespaces;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

pub use namespaces::{Users, leave as leave_namespaces};

/// Descriptor of the control socket by convention.
const CONTROL_FD: RawFd = 3;

/// Takes the control socket that the process was started with, as descriptor 3. To be called once, before anything else owns descriptors.
///
/// # Errors
/// Where there is no such descriptor.
pub fn inherited_control() -> io::Result<OwnedFd> {
    // SAFETY: fcntl only looks whether the descriptor is open.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the caller promises by calling this first that nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) })
}

/// Whether this is a listening socket for whole messages.
pub fn is_control_socket(socket: BorrowedFd<'_>) -> bool {
    matches!(socket_type(socket), Ok(SocketType::SEQPACKET)) && matches!(socket_acceptconn(socket), Ok(true))
}

/// The descriptor's number, for [`close_others`].
pub fn number(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
}

/// Closes all descriptors but the standard ones and these. Nothing in the process may own any of the others.
///
/// # Errors
/// Where the kernel has no `close_range`.
pub fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<_> = keep.iter().copied().filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        close_from_to(first, fd - 1)?;
        first = fd + 1;
    }
    close_from_to(first, RawFd::MAX)
}

fn close_from_to(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: closes descriptors that nothing in this process owns, as the caller promises.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// No core files, and as many descriptors as the host allows, up to `descriptors`; gives how many those are.
///
/// # Errors
/// Where the system refuses.
pub fn limit_resources(descriptors: u64) -> io::Result<u64> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(descriptors).min(descriptors);
    setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) })?;
    Ok(most)
}

/// Gives up all capabilities but these, as far as it has them.
///
/// # Errors
/// Where the system refuses.
pub fn keep_capabilities(keep: CapabilitySet) -> io::Result<()> {
    let has = rustix::thread::capabilities(None)?.permitted;
    let inheritable = CapabilitySet::empty();
    let left = has & keep;
    Ok(set_capabilities(None, CapabilitySets { effective: left, permitted: left, inheritable })?)
}

/// Forbids every path and port. What the kernel does not know, it cannot forbid.
///
/// # Errors
/// Where a kernel that knows it refuses.
pub fn forbid_paths_and_ports() -> io::Result<()> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(ABI::V4)))
        .and_then(|rules| rules.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map(drop)
        .map_err(io::Error::other)
}

/// Forbids every port, sockets and signals of other processes, and to look at those. Paths stay as they are: Landlock knows only
/// hierarchies that are named beforehand, and forbids to move files between directories of all others.
///
/// # Errors
/// Where a kernel that knows it refuses.
pub fn forbid_ports() -> io::Result<()> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessNet::from_all(ABI::V4))
        .and_then(|rules| rules.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map(drop)
        .map_err(io::Error::other)
}
