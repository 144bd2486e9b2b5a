//! A TCP socket on the host that is bound for as long as its container runs, and listened on only at times. The kernel keeps the
//! port for a socket that was listening and is shut down, so that no one else gets it in between.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use rustix::{
    fd::OwnedFd,
    io::Errno,
    net::{
        AddressFamily, Shutdown, SocketFlags, SocketType, bind, ipproto, listen, shutdown, socket_with,
        sockopt,
    },
};

use crate::error::{Error, Kind};

const BACKLOG: i32 = 4096;

/// See the module.
pub(super) struct Bound {
    socket: OwnedFd,
    address: SocketAddr,
}

/// Why there is no socket.
#[derive(Debug)]
pub(super) enum NotBound {
    /// Someone else has the port; another one may be free.
    Taken(Error),
    /// The host has no such family of addresses.
    NoFamily(Error),
    /// Another port would not do either.
    Refused(Error),
}

impl From<NotBound> for Error {
    fn from(not_bound: NotBound) -> Self {
        let (NotBound::Taken(error) | NotBound::NoFamily(error) | NotBound::Refused(error)) = not_bound;
        error
    }
}

/// Docker's words for a port that someone else has.
pub(super) fn in_use(address: &SocketAddr) -> NotBound {
    NotBound::Taken(Error::internal(format!("Bind for {address} failed: port is already allocated")))
}

/// What the kernel said, in words.
pub(super) fn not_bound(address: &SocketAddr, error: Errno) -> NotBound {
    match error {
        Errno::ADDRINUSE => in_use(address),
        Errno::ACCESS | Errno::PERM => NotBound::Refused(Error::new(
            Kind::Denied,
            format!(
                "Bind for {address} failed: permission denied: ports below 1024 are root's on this host. Publish the port as one from 1024 on, or let everyone have it: sudo sysctl net.ipv4.ip_unprivileged_port_start={}",
                address.port()
            ),
        )),
        Errno::ADDRNOTAVAIL => NotBound::Refused(Error::invalid(format!(
            "Bind for {address} failed: cannot assign requested address: the host does not have it"
        ))),
        Errno::AFNOSUPPORT => NotBound::NoFamily(Error::new(
            Kind::Unavailable,
            format!("Bind for {address} failed: the host has no IPv6"),
        )),
        error => NotBound::Refused(Error::internal(format!("Bind for {address} failed: {error}"))),
    }
}

impl Bound {
    pub(super) fn new(address: SocketAddr) -> Result<Self, NotBound> {
        Self::open(address).map_err(|error| not_bound(&address, error))
    }

    fn open(address: SocketAddr) -> rustix::io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        // At once: a child that is started in between would keep the port.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        // Connections of an earlier run that have just ended are no reason to fail.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        bind(&socket, &address)?;
        let bound = Self { socket, address };
        // Until a socket has listened once, Linux lets others that reuse addresses have its port as well.
        listen(&bound.socket, 0)?;
        bound.refuse();
        Ok(bound)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts from now on.
    pub(super) fn listen(&self) -> io::Result<TcpListener> {
        // While its connections live, a port can be listened on again by those alone who reuse addresses.
        sockopt::set_socket_reuseaddr(&self.socket, true)?;
        listen(&self.socket, BACKLOG)?;
        Ok(TcpListener::from(self.socket.try_clone()?))
    }

    /// Refuses from now on; who was not accepted yet is reset.
    pub(super) fn refuse(&self) {
        // One that is not listening has nothing to stop.
        let _ = shutdown(&self.socket, Shutdown::Both);
        // Nor does anyone else get the port who reuses addresses.
        let _ = sockopt::set_socket_reuseaddr(&self.socket, false);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_port_is_kept_and_refuses_until_it_is_listened_on() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let bound = Bound::new(free).unwrap();
        let refused = || TcpStream::connect(free).unwrap_err().kind() == io::ErrorKind::ConnectionRefused;
        for _ in 0..2 {
            assert!(refused());
            let listener = bound.listen().unwrap();
            listener.set_nonblocking(false).unwrap();
            let _client = TcpStream::connect(free).unwrap();
            let (_served, _) = listener.accept().unwrap();
            assert!(Bound::new(free).is_err());
            drop(listener);
            bound.refuse();
            assert!(Bound::new(free).is_err() && TcpListener::bind(free).is_err());
        }
        assert!(refused());
    }
}
