//! Links, addresses, routes and rules (rtnetlink(7)).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use coracle_agent_api::Mac;
use ipnet::IpNet;

use super::netlink::{self, CREATE, EXCLUSIVE, Message, REPLACE, Socket};

// linux/if_link.h, linux/veth.h, linux/if_addr.h, linux/fib_rules.h: what libc lacks or has in other types.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_GROUP: u16 = 27;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FR_ACT_TO_TBL: u8 = 1;
const UP: u32 = libc::IFF_UP as u32;

/// What a bridge has that is not told (`ETH_DATA_LEN`).
const ETHERNET_MTU: u16 = 1500;

/// The loopback interface's number in every namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// An interface's number in its namespace.
pub(crate) type Index = u32;

/// What a new pair of interfaces is like.
pub(crate) struct Veth<'a> {
    /// Name of the end on the bridge.
    pub name: &'a str,
    /// The bridge.
    pub bridge: Index,
    /// Name, hardware address and namespace of the end in the container.
    pub peer: &'a str,
    pub peer_mac: Mac,
    pub peer_namespace: BorrowedFd<'a>,
    pub mtu: Option<u16>,
}

fn family(address: &IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// `struct ifinfomsg`.
fn link_header(index: Index, flags: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..].copy_from_slice(&flags.to_ne_bytes());
    header
}

/// `struct rtmsg`, which begins as `struct fib_rule_hdr` does.
fn route_header(family: u8, prefix: u8, table: u8, scope: u8, kind: u8) -> [u8; 12] {
    [family, prefix, 0, 0, table, libc::RTPROT_STATIC, scope, kind, 0, 0, 0, 0]
}

/// The number of the interface of this name, if there is one.
pub(crate) fn index_of(socket: &mut Socket, name: &str) -> io::Result<Option<Index>> {
    let all = socket.dump(Message::new(libc::RTM_GETLINK, 0, &link_header(0, 0)))?;
    let wanted = |body: &[u8]| {
        let own = netlink::attributes(body.get(16..)?).find(|(kind, _)| *kind == IFLA_IFNAME)?.1;
        (own.strip_suffix(&[0])? == name.as_bytes()).then(|| body.get(4..8)?.first_chunk().copied())?
    };
    Ok(all.iter().find_map(|(_, body)| wanted(body)).map(u32::from_ne_bytes))
}

/// Makes a bridge that is up. Its hardware address stays whatever comes and goes on it.
pub(crate) fn add_bridge(
    socket: &mut Socket,
    name: &str,
    mac: Mac,
    group: u32,
    mtu: Option<u16>,
) -> io::Result<()> {
    let message = Message::new(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, &link_header(0, UP))
        .with_text(IFLA_IFNAME, name)
        .with(IFLA_ADDRESS, mac.0)
        .with(IFLA_GROUP, group.to_ne_bytes());
    socket
        .request(with_mtu(message, mtu).nest(IFLA_LINKINFO, |info| info.with_text(IFLA_INFO_KIND, "bridge")))
}

/// Changes what a bridge is like.
pub(crate) fn change_bridge(
    socket: &mut Socket,
    index: Index,
    group: u32,
    mtu: Option<u16>,
) -> io::Result<()> {
    let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, 0));
    let mtu = mtu.unwrap_or(ETHERNET_MTU);
    socket.request(with_mtu(message.with(IFLA_GROUP, group.to_ne_bytes()), Some(mtu)))
}

/// Makes a pair of interfaces: one on a bridge, up; the other, down yet, in a container's namespace.
pub(crate) fn add_veth(socket: &mut Socket, veth: &Veth<'_>) -> io::Result<()> {
    let message = Message::new(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, &link_header(0, UP))
        .with_text(IFLA_IFNAME, veth.name)
        .with(IFLA_MASTER, veth.bridge.to_ne_bytes());
    let peer = |data: Message| {
        data.nest(VETH_INFO_PEER, |peer| {
            let peer = peer
                .raw(link_header(0, 0))
                .with_text(IFLA_IFNAME, veth.peer)
                .with(IFLA_ADDRESS, veth.peer_mac.0)
                .with(IFLA_NET_NS_FD, veth.peer_namespace.as_fd().as_raw_fd().to_ne_bytes());
            with_mtu(peer, veth.mtu)
        })
    };
    socket.request(
        with_mtu(message, veth.mtu)
            .nest(IFLA_LINKINFO, |info| info.with_text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, peer)),
    )
}

fn with_mtu(message: Message, mtu: Option<u16>) -> Message {
    match mtu {
        Some(mtu) => message.with(IFLA_MTU, u32::from(mtu).to_ne_bytes()),
        None => message,
    }
}

/// Keeps a port of a bridge from talking to other such ports; it still talks to the bridge itself.
pub(crate) fn isolate_port(socket: &mut Socket, port: Index) -> io::Result<()> {
    let mut header = link_header(port, 0);
    header[0] = libc::AF_BRIDGE as u8;
    let message = Message::new(libc::RTM_SETLINK, 0, &header);
    socket.request(message.nest(IFLA_PROTINFO, |port| port.with(IFLA_BRPORT_ISOLATED, [1])))
}

/// Brings an interface up.
pub(crate) fn bring_up(socket: &mut Socket, index: Index) -> io::Result<()> {
    socket.request(Message::new(libc::RTM_NEWLINK, 0, &link_header(index, UP)))
}

/// Deletes an interface, and with it its other end.
pub(crate) fn delete(socket: &mut Socket, name: &str) -> io::Result<()> {
    socket.request(Message::new(libc::RTM_DELLINK, 0, &link_header(0, 0)).with_text(IFLA_IFNAME, name))
}

/// Gives an interface an address, which counts at once: whoever gives it knows that no one else has it.
pub(crate) fn add_address(socket: &mut Socket, index: Index, address: IpNet) -> io::Result<()> {
    let ip = address.addr();
    let mut header = [family(&ip), address.prefix_len(), libc::IFA_F_NODAD as u8, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    let message = Message::new(libc::RTM_NEWADDR, CREATE | REPLACE, &header)
        .with(libc::IFA_LOCAL, octets(&ip))
        .with(libc::IFA_ADDRESS, octets(&ip));
    socket.request(match address.broadcast() {
        IpAddr::V4(broadcast) if address.prefix_len() < 31 => {
            message.with(libc::IFA_BROADCAST, broadcast.octets())
        }
        _ => message,
    })
}

/// Takes an address away, if it is there.
pub(crate) fn remove_address(socket: &mut Socket, index: Index, address: IpNet) -> io::Result<()> {
    let ip = address.addr();
    let mut header = [family(&ip), address.prefix_len(), 0, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    match socket.request(Message::new(libc::RTM_DELADDR, 0, &header).with(libc::IFA_LOCAL, octets(&ip))) {
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        other => other,
    }
}

/// Sends what has no other way through a gateway.
pub(crate) fn set_default_route(socket: &mut Socket, index: Index, gateway: IpAddr) -> io::Result<()> {
    let header =
        route_header(family(&gateway), 0, libc::RT_TABLE_MAIN, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST);
    let message = Message::new(libc::RTM_NEWROUTE, CREATE | REPLACE, &header)
        .with(libc::RTA_GATEWAY, octets(&gateway))
        .with(libc::RTA_OIF, index.to_ne_bytes());
    socket.request(message)
}

/// Lets the namespace take in packets with this mark, whomever they are for.
pub(crate) fn deliver_marked(socket: &mut Socket, mark: u32, table: u8) -> io::Result<()> {
    let unspecified = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    for family in unspecified.iter().map(family) {
        let header = route_header(family, 0, table, libc::RT_SCOPE_HOST, libc::RTN_LOCAL);
        let route = Message::new(libc::RTM_NEWROUTE, CREATE | REPLACE, &header);
        socket.request(route.with(libc::RTA_OIF, LOOPBACK.to_ne_bytes()))?;
        let header = route_header(family, 0, table, 0, FR_ACT_TO_TBL);
        let rule = Message::new(libc::RTM_NEWRULE, CREATE | EXCLUSIVE, &header)
            .with(FRA_PRIORITY, u32::from(table).to_ne_bytes())
            .with(FRA_FWMARK, mark.to_ne_bytes())
            .with(FRA_FWMASK, mark.to_ne_bytes())
            .with(FRA_TABLE, u32::from(table).to_ne_bytes());
        match socket.request(rule) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => other?,
        }
    }
    Ok(())
}
