//! Headers of packets: what is read of those that wait for the agent, and the ICMP messages that it answers datagrams and
//! echo requests with. Containers choose every byte that is read here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use coracle_agent_api::egress::Flow;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP_V4: u8 = 1;
const ICMP_V6: u8 = 58;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const HOP_LIMIT: u8 = 64;

/// A packet that asks for something outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// The first packet of a TCP connection.
    Connection(Flow),
    /// An echo request: the ports are its identifier and sequence number.
    Echo(Flow, Vec<u8>),
}

/// Reads a packet that waits, from its IP header on.
pub(super) fn parse(packet: &[u8]) -> Option<Asked> {
    let (source, destination, protocol, rest) = match packet.first()? >> 4 {
        4 => parse_v4(packet)?,
        6 => parse_v6(packet)?,
        _ => return None,
    };
    let address = |ip, bytes: &[u8; 2]| SocketAddr::new(ip, u16::from_be_bytes(*bytes));
    match protocol {
        TCP => {
            let (source_port, rest) = rest.split_first_chunk()?;
            let destination_port = rest.first_chunk()?;
            let flow = Flow {
                source: address(source, source_port),
                destination: address(destination, destination_port),
            };
            Some(Asked::Connection(flow))
        }
        ICMP_V4 | ICMP_V6 => {
            // Type, code, checksum, identifier, sequence number.
            let ([kind, 0, _, _], rest) = rest.split_first_chunk()? else { return None };
            if !matches!((protocol, kind), (ICMP_V4, 8) | (ICMP_V6, 128)) {
                return None;
            }
            let (identifier, rest) = rest.split_first_chunk()?;
            let (sequence, data) = rest.split_first_chunk()?;
            let flow =
                Flow { source: address(source, identifier), destination: address(destination, sequence) };
            Some(Asked::Echo(flow, data.to_vec()))
        }
        _ => None,
    }
}

type Parsed<'a> = (IpAddr, IpAddr, u8, &'a [u8]);

fn parse_v4(packet: &[u8]) -> Option<Parsed<'_>> {
    let header = packet.first_chunk::<IPV4_LEN>()?;
    let start = usize::from(header[0] & 0x0f) * 4;
    let end = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    if start < IPV4_LEN || fragment != 0 {
        return None;
    }
    let ip = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?)));
    Some((ip(12)?, ip(16)?, header[9], packet.get(start..end.min(packet.len()))?))
}

/// Packets with extension headers are not taken: nothing that a connection or an echo begins with has any.
fn parse_v6(packet: &[u8]) -> Option<Parsed<'_>> {
    let header = packet.first_chunk::<IPV6_LEN>()?;
    let end = IPV6_LEN + usize::from(u16::from_be_bytes([header[4], header[5]]));
    let ip = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?)));
    Some((ip(8)?, ip(24)?, header[6], packet.get(IPV6_LEN..end.min(packet.len()))?))
}

/// Why a datagram was not delivered, as ICMP's type and code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Undelivered {
    Port,
    Host,
    Network,
    Prohibited,
}

/// The ICMP error for a datagram of `flow`, as a whole IP packet from its destination.
pub(super) fn undelivered(flow: &Flow, why: Undelivered) -> Vec<u8> {
    let mut udp = Vec::with_capacity(8);
    udp.extend(flow.source.port().to_be_bytes());
    udp.extend(flow.destination.port().to_be_bytes());
    udp.extend(8_u16.to_be_bytes());
    udp.extend([0; 2]);
    let original = ip_packet(flow.source.ip(), flow.destination.ip(), UDP, &udp);
    let (kind, code) = match (flow.source.is_ipv4(), why) {
        (true, Undelivered::Port) => (3, 3),
        (true, Undelivered::Host) => (3, 1),
        (true, Undelivered::Network) => (3, 0),
        (true, Undelivered::Prohibited) => (3, 13),
        (false, Undelivered::Port) => (1, 4),
        (false, Undelivered::Host) => (1, 3),
        (false, Undelivered::Network) => (1, 0),
        (false, Undelivered::Prohibited) => (1, 1),
    };
    icmp(flow, kind, code, [0; 4], &original)
}

/// The answer to an echo request of `flow`, as a whole IP packet.
pub(super) fn echo_reply(flow: &Flow, data: &[u8]) -> Vec<u8> {
    let kind = if flow.source.is_ipv4() { 0 } else { 129 };
    let [i0, i1] = flow.source.port().to_be_bytes();
    let [s0, s1] = flow.destination.port().to_be_bytes();
    icmp(flow, kind, 0, [i0, i1, s0, s1], data)
}

/// An ICMP message back to the source of a flow.
fn icmp(flow: &Flow, kind: u8, code: u8, rest: [u8; 4], data: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    message.extend(data);
    let (from, to) = (flow.destination.ip(), flow.source.ip());
    let protocol = if from.is_ipv4() { ICMP_V4 } else { ICMP_V6 };
    let mut covered = Vec::new();
    if let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) {
        covered.extend(from.octets());
        covered.extend(to.octets());
        covered.extend((message.len() as u32).to_be_bytes());
        covered.extend([0, 0, 0, protocol]);
    }
    covered.extend(&message);
    let sum = checksum(&covered);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ip_packet(from, to, protocol, &message)
}

/// A packet whose payload is short enough for one: whoever makes it sees to that.
fn ip_packet(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(IPV6_LEN + payload.len());
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0]);
            packet.extend(((IPV4_LEN + payload.len()) as u16).to_be_bytes());
            packet.extend([0, 0, 0, 0, HOP_LIMIT, protocol, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (from, to) => {
            let octets = |ip| match ip {
                IpAddr::V4(ip) => Ipv4Addr::to_ipv6_mapped(&ip).octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((payload.len() as u16).to_be_bytes());
            packet.extend([protocol, HOP_LIMIT]);
            packet.extend(octets(from));
            packet.extend(octets(to));
        }
    }
    packet.extend(payload);
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |byte| u32::from(*byte) << 8);
    let mut sum = pairs.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum::<u32>() + last;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flow(source: &str, destination: &str) -> Flow {
        Flow { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
    }

    fn flows() -> [Flow; 2] {
        [flow("10.1.2.3:4000", "192.0.2.1:80"), flow("[fd00::3]:4000", "[2001:db8::1]:80")]
    }

    #[test]
    fn connections_are_recognised() {
        for flow in flows() {
            let mut tcp = [flow.source.port().to_be_bytes(), flow.destination.port().to_be_bytes()].concat();
            tcp.extend([0; 16]);
            let packet = ip_packet(flow.source.ip(), flow.destination.ip(), TCP, &tcp);
            assert_eq!(parse(&packet), Some(Asked::Connection(flow)));
            assert_eq!(parse(&packet[..packet.len() - 17]), None, "its ports are cut off");
        }
    }

    #[test]
    fn what_an_echo_request_asks_its_answer_says() {
        for flow in flows() {
            let kind = if flow.source.is_ipv4() { 8 } else { 128 };
            let [i0, i1] = flow.source.port().to_be_bytes();
            let [s0, s1] = flow.destination.port().to_be_bytes();
            let back = Flow { source: flow.destination, destination: flow.source };
            let request = icmp(&back, kind, 0, [i0, i1, s0, s1], b"ahoy");
            assert_eq!(parse(&request), Some(Asked::Echo(flow, b"ahoy".to_vec())));
            let reply = echo_reply(&flow, b"ahoy");
            assert_eq!(parse(&reply), None, "an answer is no request");
            assert!(reply.ends_with(&[i0, i1, s0, s1, b'a', b'h', b'o', b'y']));
        }
    }

    #[test]
    fn errors_hold_the_header_of_what_they_are_about() {
        for flow in flows() {
            let packet = undelivered(&flow, Undelivered::Port);
            let header = if flow.source.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
            let original = &packet[header + 8..];
            assert_eq!(original.len(), header + 8);
            assert!(original.ends_with(&[0x0f, 0xa0, 0, 80, 0, 8, 0, 0]));
        }
    }

    #[test]
    fn checksums_are_those_of_the_rfc() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[0xff]), !0xff00);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_packet_or_none(bytes: Vec<u8>, version in 4_u8..7) {
            let mut bytes = bytes;
            let _ = parse(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 0x0f;
            }
            let _ = parse(&bytes);
        }
    }
}
