//! A published UDP port: a socket on the host that is bound for as long as its container runs. Unlike TCP's, it cannot tell clients
//! that nothing in the container takes what they send: a socket that keeps a port also takes what comes to it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use coracle_agent_api::ports::ContainerPort;
use nix::{
    libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg,
        sendmsg, setsockopt, sockopt,
    },
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with};
use tokio::{io::Interest, net::UdpSocket};

use super::{
    bind::{NotBound, not_bound},
    datagrams::Session,
};

/// The longest datagram.
const LONGEST: usize = 65_535;

/// See the module.
#[derive(Debug)]
pub(super) struct BoundUdp {
    socket: UdpSocket,
    address: SocketAddr,
}

/// A client, and which of the host's addresses it has sent to: answers must come from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Peer {
    pub(super) client: SocketAddr,
    local: Local,
}

/// One of the host's own addresses; for one that counts on a link only, with the link's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Local {
    address: IpAddr,
    interface: u32,
}

#[cfg(test)]
impl Peer {
    pub(super) fn new(client: SocketAddr) -> Self {
        Self { client, local: Local { address: client.ip(), interface: 0 } }
    }
}

impl BoundUdp {
    /// Takes the port; called on the daemon's runtime.
    pub(super) fn new(address: SocketAddr) -> Result<Self, NotBound> {
        let open = || -> rustix::io::Result<OwnedFd> {
            let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(family, SocketType::DGRAM, flags, Some(ipproto::UDP))?;
            let told = match address {
                SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true),
                SocketAddr::V6(_) => {
                    rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
                    setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)
                }
            };
            told.map_err(|error| rustix::io::Errno::from_raw_os_error(error as i32))?;
            bind(&socket, &address)?;
            Ok(socket)
        };
        let socket = open().map_err(|error| not_bound(&address, error))?;
        let socket = UdpSocket::from_std(socket.into());
        let socket = socket.map_err(|error| {
            not_bound(&address, rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))
        })?;
        Ok(Self { socket, address })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes what comes, for ever.
    pub(super) async fn receive(self: Arc<Self>, to: ContainerPort, session: Session) {
        let mut buffer = vec![0; LONGEST];
        loop {
            let received =
                self.socket.async_io(Interest::READABLE, || receive(&self.socket, &mut buffer)).await;
            match received {
                Ok(Some((peer, len))) => session.arrived(&self, &to, peer, &buffer[..len]),
                Ok(None) => {}
                // It is about an answer of ours that did not arrive.
                Err(error) => tracing::debug!(%error, host = %self.address, "a datagram cannot be taken"),
            }
        }
    }

    /// Answers a client. What there is no room for is lost, as datagrams are.
    pub(super) fn answer(&self, peer: &Peer, data: &[u8]) {
        if let Err(error) = send(&self.socket, peer, data) {
            tracing::debug!(%error, client = %peer.client, "an answer cannot be sent");
        }
    }
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<(Peer, usize)>> {
    let mut space = nix::cmsg_space!(in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
    let client: Option<SocketAddr> = message.address.as_ref().and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| SocketAddrV4::from(*v4).into());
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into()))
    });
    let local = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            let address = IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
            Some(Local { address, interface: 0 })
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            let address = std::net::Ipv6Addr::from(info.ipi6_addr.s6_addr);
            let of_link = address.is_unicast_link_local();
            Some(Local { address: address.into(), interface: if of_link { info.ipi6_ifindex } else { 0 } })
        }
        _ => None,
    });
    Ok(client.zip(local).map(|(client, local)| (Peer { client, local }, message.bytes)))
}

fn send(socket: &UdpSocket, peer: &Peer, data: &[u8]) -> nix::Result<()> {
    let parts = [IoSlice::new(data)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let fd = socket.as_raw_fd();
    match (peer.client, peer.local.address) {
        (SocketAddr::V4(client), IpAddr::V4(local)) => {
            let from = in_addr { s_addr: u32::from_ne_bytes(local.octets()) };
            let info = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: from, ipi_addr: in_addr { s_addr: 0 } };
            let to = SockaddrIn::from(client);
            sendmsg(fd, &parts, &[ControlMessage::Ipv4PacketInfo(&info)], flags, Some(&to)).map(drop)
        }
        (SocketAddr::V6(client), IpAddr::V6(local)) => {
            let info = in6_pktinfo {
                ipi6_addr: in6_addr { s6_addr: local.octets() },
                ipi6_ifindex: peer.local.interface,
            };
            let to = SockaddrIn6::from(client);
            sendmsg(fd, &parts, &[ControlMessage::Ipv6PacketInfo(&info)], flags, Some(&to)).map(drop)
        }
        _ => Err(nix::Error::EAFNOSUPPORT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_comes_from_the_address_that_was_asked() {
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let bound = BoundUdp::new(SocketAddr::new([0, 0, 0, 0].into(), free)).unwrap();
        assert!(matches!(BoundUdp::new(bound.address()), Err(NotBound::Taken(_))));
        for asked in ["127.0.0.1", "127.0.0.9"] {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let asked = SocketAddr::new(asked.parse().unwrap(), free);
            client.send_to(b"ask", asked).await.unwrap();
            let mut buffer = [0; 100];
            let received = bound.socket.async_io(Interest::READABLE, || receive(&bound.socket, &mut buffer));
            let (peer, len) = received.await.unwrap().unwrap();
            assert_eq!((peer.client, len), (client.local_addr().unwrap(), 3));
            bound.answer(&peer, b"told");
            assert_eq!(client.recv_from(&mut buffer).await.unwrap(), (4, asked));
        }
    }
}
