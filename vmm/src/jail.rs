//! The process gives up what it does not need: descriptors that strayed in, and the way to new privileges. It must be
//! called before anything else in the process owns descriptors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};

/// Descriptor of the control socket by convention.
const CONTROL_FD: RawFd = 3;

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

/// Closes every descriptor but the standard ones and those to keep, and forbids new privileges.
pub(crate) fn enter(keep: &[RawFd]) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
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
    // SAFETY: closes descriptors that nothing in this process owns: those that it owns are excepted by the caller, and
    // this runs before any others are opened.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The descriptor's number, for [`enter`].
pub(crate) fn number(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
}
