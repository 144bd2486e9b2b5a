//! Vectored I/O that never waits. `O_NONBLOCK` belongs to a descriptor's open file, which its other holders can change at any
//! time, so that each call says for itself that it must not wait. Only what has no such calls (terminals) relies on the flag.
#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{FileType, fstat};

/// Which calls there are for a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Socket,
    Pipe,
    Other,
}

/// What kind of descriptor this is.
pub(crate) fn kind_of(fd: BorrowedFd<'_>) -> io::Result<Kind> {
    Ok(match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::Socket => Kind::Socket,
        FileType::Fifo => Kind::Pipe,
        _ => Kind::Other,
    })
}

/// Reads into the vectors what is there now.
///
/// # Safety
/// The vectors must be valid for writes, and nobody may rely on what stands in them.
pub(crate) unsafe fn receive(fd: BorrowedFd<'_>, kind: Kind, vectors: &[libc::iovec]) -> io::Result<usize> {
    let (fd, count) = (fd.as_raw_fd(), vectors.len() as libc::c_int);
    match kind {
        Kind::Socket => {
            let mut message = message(vectors);
            // SAFETY: the message is valid, and so are its vectors by this function's contract.
            retry(|| unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) })
        }
        Kind::Pipe => {
            // SAFETY: as above.
            let now = retry(|| unsafe { libc::preadv2(fd, vectors.as_ptr(), count, -1, libc::RWF_NOWAIT) });
            match now {
                // SAFETY: as above.
                Err(error) if lacks(&error) => unsafe { receive_plainly(fd, vectors) },
                result => result,
            }
        }
        // SAFETY: as above.
        Kind::Other => unsafe { receive_plainly(fd, vectors) },
    }
}

/// Writes from the vectors what there is room for now.
///
/// # Safety
/// The vectors must be valid for reads.
pub(crate) unsafe fn send(fd: BorrowedFd<'_>, kind: Kind, vectors: &[libc::iovec]) -> io::Result<usize> {
    let (fd, count) = (fd.as_raw_fd(), vectors.len() as libc::c_int);
    match kind {
        Kind::Socket => {
            let message = message(vectors);
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the message is valid, and so are its vectors by this function's contract; the kernel only reads them.
            retry(|| unsafe { libc::sendmsg(fd, &raw const message, flags) })
        }
        Kind::Pipe => {
            // SAFETY: as above.
            let now = retry(|| unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, -1, libc::RWF_NOWAIT) });
            match now {
                // SAFETY: as above.
                Err(error) if lacks(&error) => unsafe { send_plainly(fd, vectors) },
                result => result,
            }
        }
        // SAFETY: as above.
        Kind::Other => unsafe { send_plainly(fd, vectors) },
    }
}

/// As [`send`], from memory of our own.
pub(crate) fn send_slices(fd: BorrowedFd<'_>, kind: Kind, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: an `IoSlice` is guaranteed to have the layout of an `iovec`, and borrows what it names.
    unsafe { send(fd, kind, std::slice::from_raw_parts(parts.as_ptr().cast(), parts.len())) }
}

/// Kernels before 6.4 cannot say so for pipes.
fn lacks(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// # Safety
/// As for [`receive`].
unsafe fn receive_plainly(fd: libc::c_int, vectors: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: the caller's promise.
    retry(|| unsafe { libc::readv(fd, vectors.as_ptr(), vectors.len() as libc::c_int) })
}

/// # Safety
/// As for [`send`].
unsafe fn send_plainly(fd: libc::c_int, vectors: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: the caller's promise.
    retry(|| unsafe { libc::writev(fd, vectors.as_ptr(), vectors.len() as libc::c_int) })
}

/// A message without an address or anything but these vectors.
fn message(vectors: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_ptr().cast_mut();
    message.msg_iovlen = vectors.len() as _;
    message
}

/// Calls until a signal does not interrupt it.
pub(crate) fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// Neither has the flag that makes it not wait.
    #[test]
    fn an_empty_or_full_stream_does_not_block_whatever_its_flags() {
        let sockets = std::os::unix::net::UnixStream::pair().unwrap();
        let pipe = std::io::pipe().unwrap();
        let ends: [(BorrowedFd<'_>, BorrowedFd<'_>, Kind); 2] = [
            (sockets.0.as_fd(), sockets.1.as_fd(), Kind::Socket),
            (pipe.0.as_fd(), pipe.1.as_fd(), Kind::Pipe),
        ];
        for (read, write, kind) in ends {
            assert_eq!((kind_of(read).unwrap(), kind_of(write).unwrap()), (kind, kind));
            let mut bytes = [7u8; 4096];
            let vectors = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
            let would_block = |result: io::Result<usize>| result.unwrap_err().kind();
            // SAFETY: the vector is the array, which nobody else uses.
            unsafe {
                assert_eq!(would_block(receive(read, kind, &vectors)), io::ErrorKind::WouldBlock);
                let full = loop {
                    if let Err(error) = send(write, kind, &vectors) {
                        break error;
                    }
                };
                assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
                assert_eq!(receive(read, kind, &vectors).unwrap(), 4096);
            }
        }
    }
}
