//! Framing: one message is one `SOCK_SEQPACKET` record of JSON with at most [`MAX_FDS`] descriptors.
//! A record that is too long, or came with more descriptors than that, is refused whole and its descriptors are closed.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// The longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most descriptors with one message.
pub const MAX_FDS: usize = 8;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The system refused.
    #[error("cannot {action} the control socket")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Nothing to read or no room to write now (only on a non-blocking socket).
    #[error("the control socket is not ready")]
    WouldBlock,
    /// A record longer than [`MAX_MESSAGE`].
    #[error("a control message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// More descriptors than [`MAX_FDS`].
    #[error("a control message has more than {MAX_FDS} descriptors")]
    TooManyFds,
}

impl SocketError {
    fn system(action: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| match errno {
            Errno::AGAIN => Self::WouldBlock,
            errno => Self::System { action, source: errno.into() },
        }
    }
}

/// What [`receive`] found.
#[derive(Debug)]
pub enum Received {
    /// A record and its descriptors.
    Message(Vec<u8>, Vec<OwnedFd>),
    /// The other end is gone.
    Closed,
}

/// Binds a listening control socket at `path`, for its owner only. The path must not exist.
pub fn listen(path: &Path) -> Result<OwnedFd, SocketError> {
    let socket = new_socket()?;
    let address = SocketAddrUnix::new(path).map_err(SocketError::system("name"))?;
    rustix::net::bind(&socket, &address).map_err(SocketError::system("bind"))?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(SocketError::system("protect"))?;
    rustix::net::listen(&socket, 4).map_err(SocketError::system("listen on"))?;
    Ok(socket)
}

/// Connects to a listening control socket.
pub fn connect(path: &Path) -> Result<OwnedFd, SocketError> {
    let socket = new_socket()?;
    let address = SocketAddrUnix::new(path).map_err(SocketError::system("name"))?;
    rustix::net::connect(&socket, &address).map_err(SocketError::system("connect to"))?;
    Ok(socket)
}

/// Accepts a client; the new socket does not block.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, SocketError> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        .map_err(SocketError::system("accept on"))
}

fn new_socket() -> Result<OwnedFd, SocketError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(SocketError::system("create"))
}

/// Sends one message.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(SocketError::TooLong);
    }
    if fds.len() > MAX_FDS {
        return Err(SocketError::TooManyFds);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(SocketError::TooManyFds);
    }
    loop {
        match rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(SocketError::system("send on")(errno)),
        }
    }
}

/// Receives one message.
pub fn receive(socket: impl AsFd) -> Result<Received, SocketError> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(&socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(Received::Closed),
            Err(errno) => return Err(SocketError::system("receive from")(errno)),
        }
    };
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(SocketError::TooLong);
    }
    // The buffer's alignment may leave room for one descriptor more than it was made for.
    if message.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
        return Err(SocketError::TooManyFds);
    }
    if message.bytes == 0 {
        return Ok(Received::Closed);
    }
    bytes.truncate(message.bytes);
    Ok(Received::Message(bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap()
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (left, right) = pair();
        let file = tempfile::tempfile().unwrap();
        send(&left, b"hello", &[file.as_fd(), file.as_fd()]).unwrap();
        let Received::Message(bytes, fds) = receive(&right).unwrap() else { panic!("closed") };
        assert_eq!((bytes.as_slice(), fds.len()), (b"hello".as_slice(), 2));
    }

    #[test]
    fn too_much_is_refused_on_both_sides() {
        let (left, right) = pair();
        assert!(matches!(send(&left, &vec![0; MAX_MESSAGE + 1], &[]), Err(SocketError::TooLong)));
        rustix::net::send(&left, &vec![b' '; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        assert!(matches!(receive(&right), Err(SocketError::TooLong)));
        let file = tempfile::tempfile().unwrap();
        let many = [file.as_fd(); MAX_FDS + 1];
        let mut space = vec![MaybeUninit::uninit(); 1024];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        rustix::net::sendmsg(&left, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(receive(&right), Err(SocketError::TooManyFds)));
    }

    #[test]
    fn a_closed_peer_is_closed() {
        let (left, right) = pair();
        drop(left);
        assert!(matches!(receive(&right), Ok(Received::Closed)));
    }
}
