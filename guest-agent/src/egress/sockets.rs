//! Sockets with addresses that are not the guest's: those that containers' connections and datagrams are led to, and those
//! from which answers come.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use coracle_agent_api::egress::Flow;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sockopt};
use tokio::net::UdpSocket;

use super::connections::plain;
use crate::sys;

/// Connections that wait for being accepted.
const BACKLOG: i32 = 4096;

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn socket(ip: IpAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family(ip), kind, flags, None)?;
    if ip.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    sys::set_transparent(&socket, ip.is_ipv6())?;
    Ok(socket)
}

/// The loopback address that packets are led to.
pub(super) fn loopback(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}

/// A listener for connections to any address, and its port.
pub(super) fn listener(v6: bool) -> io::Result<(OwnedFd, u16)> {
    let socket = socket(loopback(v6), SocketType::STREAM)?;
    rustix::net::bind(&socket, &SocketAddr::new(loopback(v6), 0))?;
    rustix::net::listen(&socket, BACKLOG)?;
    let port = port(&socket)?;
    Ok((socket, port))
}

/// A socket for datagrams to any address, and its port.
pub(super) fn datagrams(v6: bool) -> io::Result<(OwnedFd, u16)> {
    let socket = socket(loopback(v6), SocketType::DGRAM)?;
    sys::tell_original_destination(&socket, v6)?;
    rustix::net::bind(&socket, &SocketAddr::new(loopback(v6), 0))?;
    let port = port(&socket)?;
    Ok((socket, port))
}

fn port(socket: &OwnedFd) -> io::Result<u16> {
    let address: SocketAddr = rustix::net::getsockname(socket)?.try_into()?;
    Ok(address.port())
}

/// The socket from which a flow's answers come, and which takes its further datagrams.
pub(crate) fn answering(flow: &Flow) -> io::Result<UdpSocket> {
    let socket = socket(flow.source.ip(), SocketType::DGRAM)?;
    // Another container may talk to the same address.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &flow.destination)?;
    rustix::net::connect(&socket, &flow.source)?;
    UdpSocket::from_std(socket.into())
}

/// Takes a datagram from whomever to whomever; `None` if the kernel does not say to whom.
pub(super) fn receive_from_anyone(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<(Flow, usize)>> {
    let mut space = nix::cmsg_space!(libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
    let Some(source) = message.address.as_ref().and_then(address) else { return Ok(None) };
    let destination = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => {
            Some(SocketAddr::from(SocketAddrV4::from(nix::sys::socket::SockaddrIn::from(to))))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(to) => {
            Some(SocketAddr::from(SocketAddrV6::from(nix::sys::socket::SockaddrIn6::from(to))))
        }
        _ => None,
    });
    let flow = destination.map(|destination| Flow { source: plain(source), destination: plain(destination) });
    Ok(flow.map(|flow| (flow, message.bytes)))
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddrV4::from(*v4).into()),
        (_, Some(v6)) => Some(SocketAddrV6::from(*v6).into()),
        _ => None,
    }
}

/// Sockets for whole packets.
pub(super) struct Raw {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
}

impl Raw {
    pub(super) fn new() -> io::Result<Self> {
        let open = |family| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            rustix::net::socket_with(family, SocketType::RAW, flags, Some(rustix::net::ipproto::RAW))
        };
        Ok(Self { v4: open(AddressFamily::INET)?, v6: open(AddressFamily::INET6).ok() })
    }

    /// Sends a packet, IP header and all, to a container. One that cannot be sent is lost, as packets are.
    pub(super) fn send(&self, to: IpAddr, packet: &[u8]) {
        let socket = if to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        let sent = socket
            .map(|socket| rustix::net::sendto(socket, packet, SendFlags::DONTWAIT, &SocketAddr::new(to, 0)));
        if let Some(Err(error)) = sent {
            tracing::debug!("a packet to {to} could not be sent: {error}");
        }
    }
}
