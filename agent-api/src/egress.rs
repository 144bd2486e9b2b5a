//! What containers ask of the world outside: connections, datagrams, echoes and names. The guest has no way out of its own; the
//! agent asks, and the daemon does it with sockets of its own, under the host's rules.
//!
//! The daemon opens one connection (`GET /v1/egress`, upgrade to [`EGRESS_PROTOCOL`]); the newest one counts. Over it the
//! agent sends [`Request`]s and the daemon [`Reply`]s, each in a frame:
//!
//! ```text
//!  0      1            4                8                12
//! ┌──────┬────────────┬────────────────┬────────────────┬─────────
//! │ kind │ 0  0  0    │ id, u32 BE     │ length, u32 BE │ payload
//! └──────┴────────────┴────────────────┴────────────────┴─────────
//! ```
//!
//! The agent chooses ids, [`FIRST_ID`] to [`LAST_ID`], one for each thing that is under way. A reply that has an id that
//! nothing is under way for is ignored: it may have come too late.
//!
//! A [`Request::Connect`] or [`Request::Engine`] that succeeds has no reply. Instead the connected socket itself is handed to whatever stands between
//! host and guest, and appears in the guest as a stream to port [`STREAM_PORT`] whose other end has the id as its port: the
//! daemon is no relay. The end of one direction is a half-close; a stream that is closed without one was reset.
//!
//! Addresses are 16 bytes (IPv4 as `::ffff:a.b.c.d`) and a port, big endian.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::ProcessId;

/// `Upgrade:` token of the connection.
pub const EGRESS_PROTOCOL: &str = "coracle-egress";
/// The guest's port at which connected streams arrive.
pub const STREAM_PORT: u32 = 1025;
/// Length of a frame's header in bytes.
pub const HEADER_LEN: usize = 12;
/// The longest payload: the longest datagram or DNS message, and who it is from.
pub const MAX_PAYLOAD: usize = 64 * 1024 + 1 + CONTAINER_LEN;
/// The smallest id. Ports of the host below are used for other things.
pub const FIRST_ID: u32 = 0x1000_0000;
/// The largest id; above, the VMM chooses ports.
pub const LAST_ID: u32 = 0x3fff_ffff;

/// The IPv4 address by which containers reach the host's own loopback: `host.docker.internal`.
pub const HOST_V4: std::net::Ipv4Addr = std::net::Ipv4Addr::new(192, 168, 65, 254);
/// The same for IPv6.
pub const HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfdc4, 0xf303, 0x9324, 0, 0, 0, 0, 0x254);
/// Names of the host, in lower case.
pub const HOST_NAMES: [&str; 2] = ["host.docker.internal", "gateway.docker.internal"];

const ADDRESS_LEN: usize = 18;
/// A container's id, in hexadecimal digits.
pub(crate) const CONTAINER_LEN: usize = 64;
const CONNECT: u8 = 1;
const DATAGRAM: u8 = 2;
const ECHO: u8 = 3;
const QUESTION: u8 = 4;
const ENGINE: u8 = 5;
const FAILED: u8 = 1;
const DATAGRAM_BACK: u8 = 2;
const ECHO_BACK: u8 = 3;
const ANSWER: u8 = 4;

/// From whom, to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The container's address, as the agent says.
    pub source: SocketAddr,
    /// The address that the container wants to reach.
    pub destination: SocketAddr,
}

/// How a question came, and is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A datagram: the answer may be cut short, and then says so.
    Udp,
    /// A stream: the answer is whole.
    Tcp,
}

/// What the agent asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// A TCP connection.
    Connect(Flow),
    /// Send a datagram. All datagrams of a flow have the same id; the first makes the flow.
    Datagram(Flow, Vec<u8>),
    /// Send an ICMP echo request; the ports are its identifier and its sequence number.
    Echo(Flow, Vec<u8>),
    /// Ask the host's name servers for this container; the question is a whole DNS message.
    Question(ProcessId, Transport, Vec<u8>),
    /// A connection to the daemon's own API, for a container that has its socket. Like a [`Request::Connect`], it is answered by a stream.
    Engine(ProcessId),
}

/// What the daemon says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It could not be done; for datagrams: one that was sent was not received, or the flow is over.
    Failed(Failure),
    /// A datagram came back.
    Datagram(Vec<u8>),
    /// An echo came back, with what was sent.
    Echo(Vec<u8>),
    /// The name server's DNS message.
    Answer(Vec<u8>),
}

/// Why something could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Failure {
    /// The other side refused: TCP reset, ICMP port unreachable.
    Refused = 1,
    /// There is no way to that host.
    HostUnreachable = 2,
    /// There is no way to that network.
    NetworkUnreachable = 3,
    /// Nobody answered in time.
    TimedOut = 4,
    /// It is not allowed.
    Prohibited = 5,
    /// The host has too much of it under way, or could not do it for reasons of its own.
    Exhausted = 6,
    /// Nothing was sent for so long that the flow was given up.
    Idle = 7,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// One of the kinds of [`Request`] or [`Reply`].
    pub kind: u8,
    /// What it is about.
    pub id: u32,
    /// Length of the payload, at most [`MAX_PAYLOAD`].
    pub len: usize,
}

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EgressError {
    /// The kind is none.
    #[error("unknown kind {0} of a frame about the outside")]
    Kind(u8),
    /// Reserved bytes are set.
    #[error("reserved bytes of a frame are not zero")]
    Reserved,
    /// The payload is longer than [`MAX_PAYLOAD`].
    #[error("a frame of {0} bytes is longer than {MAX_PAYLOAD}")]
    TooLong(u32),
    /// The id is out of range.
    #[error("a frame has the id {0}, which is out of range")]
    Id(u32),
    /// The payload does not have the form that its kind says.
    #[error("the payload of a frame of kind {0} is malformed")]
    Payload(u8),
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// If reserved bytes are set, or the id or the length is out of range.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, EgressError> {
        let [kind, r0, r1, r2, i0, i1, i2, i3, l0, l1, l2, l3] = *bytes;
        if [r0, r1, r2] != [0; 3] {
            return Err(EgressError::Reserved);
        }
        let id = u32::from_be_bytes([i0, i1, i2, i3]);
        if !(FIRST_ID..=LAST_ID).contains(&id) {
            return Err(EgressError::Id(id));
        }
        let long = u32::from_be_bytes([l0, l1, l2, l3]);
        let len = usize::try_from(long).ok().filter(|len| *len <= MAX_PAYLOAD);
        Ok(Self { kind, id, len: len.ok_or(EgressError::TooLong(long))? })
    }
}

/// A frame of these parts. A payload that is too long is the caller's mistake, and is cut.
pub(crate) fn frame(kind: u8, id: u32, parts: &[&[u8]]) -> Vec<u8> {
    let len = parts.iter().map(|part| part.len()).sum::<usize>().min(MAX_PAYLOAD);
    let mut bytes = Vec::with_capacity(HEADER_LEN + len);
    bytes.extend([kind, 0, 0, 0]);
    bytes.extend(id.to_be_bytes());
    // At most MAX_PAYLOAD.
    bytes.extend((len as u32).to_be_bytes());
    parts.iter().for_each(|part| bytes.extend(*part));
    bytes.truncate(HEADER_LEN + len);
    bytes
}

impl Flow {
    fn encode(&self) -> [u8; 2 * ADDRESS_LEN] {
        let mut bytes = [0; 2 * ADDRESS_LEN];
        for (address, into) in [self.source, self.destination].iter().zip(bytes.chunks_exact_mut(ADDRESS_LEN))
        {
            into.copy_from_slice(&address_bytes(*address));
        }
        bytes
    }

    /// The flow at the beginning of a payload, and the rest. Both ends are of one family.
    fn decode(payload: &[u8]) -> Option<(Self, &[u8])> {
        let (source, rest) = address(payload)?;
        let (destination, rest) = address(rest)?;
        (source.is_ipv4() == destination.is_ipv4()).then_some((Self { source, destination }, rest))
    }
}

pub(crate) fn address_bytes(address: SocketAddr) -> [u8; ADDRESS_LEN] {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ADDRESS_LEN];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&address.port().to_be_bytes());
    bytes
}

/// The address at the beginning of some bytes, and the rest.
pub(crate) fn address(bytes: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let (ip, rest) = bytes.split_first_chunk::<16>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    // An address in IPv6's clothes is the IPv4 address, for every later check too.
    Some((SocketAddr::new(Ipv6Addr::from(*ip).to_canonical(), u16::from_be_bytes(*port)), rest))
}

impl Request {
    /// The frame.
    pub fn encode(&self, id: u32) -> Vec<u8> {
        match self {
            Self::Connect(flow) => frame(CONNECT, id, &[&flow.encode()]),
            Self::Datagram(flow, data) => frame(DATAGRAM, id, &[&flow.encode(), data]),
            Self::Echo(flow, data) => frame(ECHO, id, &[&flow.encode(), data]),
            Self::Question(container, transport, message) => {
                let tcp = u8::from(*transport == Transport::Tcp);
                frame(QUESTION, id, &[&[tcp], container.as_str().as_bytes(), message])
            }
            Self::Engine(container) => frame(ENGINE, id, &[container.as_str().as_bytes()]),
        }
    }

    /// Reads what a header of this kind announced.
    ///
    /// # Errors
    /// If the kind is unknown or the payload does not have its form.
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, EgressError> {
        let malformed = EgressError::Payload(kind);
        let flow = || Flow::decode(payload);
        match kind {
            CONNECT => match flow() {
                Some((flow, [])) => Ok(Self::Connect(flow)),
                _ => Err(malformed),
            },
            DATAGRAM => flow().map(|(flow, data)| Self::Datagram(flow, data.to_vec())).ok_or(malformed),
            ECHO => flow().map(|(flow, data)| Self::Echo(flow, data.to_vec())).ok_or(malformed),
            QUESTION => question(payload).ok_or(malformed),
            ENGINE => container(payload).map(Self::Engine).ok_or(malformed),
            kind => Err(EgressError::Kind(kind)),
        }
    }
}

fn question(payload: &[u8]) -> Option<Request> {
    let (tcp, rest) = payload.split_first()?;
    let (container, message) = rest.split_at_checked(CONTAINER_LEN)?;
    let transport = match tcp {
        0 => Transport::Udp,
        1 => Transport::Tcp,
        _ => return None,
    };
    Some(Request::Question(self::container(container)?, transport, message.to_vec()))
}

fn container(id: &[u8]) -> Option<ProcessId> {
    std::str::from_utf8(id).ok()?.parse().ok()
}

impl Reply {
    /// The frame.
    pub fn encode(&self, id: u32) -> Vec<u8> {
        match self {
            Self::Failed(failure) => frame(FAILED, id, &[&[*failure as u8]]),
            Self::Datagram(data) => frame(DATAGRAM_BACK, id, &[data]),
            Self::Echo(data) => frame(ECHO_BACK, id, &[data]),
            Self::Answer(message) => frame(ANSWER, id, &[message]),
        }
    }

    /// Reads what a header of this kind announced.
    ///
    /// # Errors
    /// If the kind is unknown or the payload does not have its form.
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, EgressError> {
        match kind {
            FAILED => match payload {
                [code] => Failure::from_code(*code).map(Self::Failed).ok_or(EgressError::Payload(kind)),
                _ => Err(EgressError::Payload(kind)),
            },
            DATAGRAM_BACK => Ok(Self::Datagram(payload.to_vec())),
            ECHO_BACK => Ok(Self::Echo(payload.to_vec())),
            ANSWER => Ok(Self::Answer(payload.to_vec())),
            kind => Err(EgressError::Kind(kind)),
        }
    }
}

impl Failure {
    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Refused,
            2 => Self::HostUnreachable,
            3 => Self::NetworkUnreachable,
            4 => Self::TimedOut,
            5 => Self::Prohibited,
            6 => Self::Exhausted,
            7 => Self::Idle,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flows() -> impl Strategy<Value = Flow> {
        let v4 = any::<([u8; 4], u16, [u8; 4], u16)>().prop_map(|(a, b, c, d)| Flow {
            source: SocketAddr::new(a.into(), b),
            destination: SocketAddr::new(c.into(), d),
        });
        let v6 = any::<([u8; 16], u16, [u8; 16], u16)>().prop_map(|(mut a, b, mut c, d)| {
            (a[0], c[0]) = (0xfd, 0x20);
            Flow { source: SocketAddr::new(a.into(), b), destination: SocketAddr::new(c.into(), d) }
        });
        prop_oneof![v4, v6]
    }

    fn requests() -> impl Strategy<Value = Request> {
        let data = || proptest::collection::vec(any::<u8>(), 0..100);
        let transport = any::<bool>().prop_map(|tcp| if tcp { Transport::Tcp } else { Transport::Udp });
        prop_oneof![
            flows().prop_map(Request::Connect),
            (flows(), data()).prop_map(|(flow, data)| Request::Datagram(flow, data)),
            (flows(), data()).prop_map(|(flow, data)| Request::Echo(flow, data)),
            ("[0-9a-f]{64}", transport, data()).prop_map(|(id, transport, data)| {
                Request::Question(id.parse().unwrap(), transport, data)
            }),
            "[0-9a-f]{64}".prop_map(|id| Request::Engine(id.parse().unwrap())),
        ]
    }

    fn split(bytes: &[u8]) -> (Header, &[u8]) {
        let (header, payload) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = Header::decode(header).unwrap();
        assert_eq!(header.len, payload.len());
        (header, payload)
    }

    proptest! {
        #[test]
        fn requests_come_out_as_they_went_in(request in requests(), id in FIRST_ID..=LAST_ID) {
            let bytes = request.encode(id);
            let (header, payload) = split(&bytes);
            prop_assert_eq!(header.id, id);
            prop_assert_eq!(Request::decode(header.kind, payload), Ok(request));
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(header: [u8; HEADER_LEN], kind in 0_u8..8, payload: Vec<u8>) {
            let _ = Header::decode(&header);
            if let Ok(request) = Request::decode(kind, &payload) {
                let bytes = request.encode(FIRST_ID);
                prop_assert_eq!(Request::decode(kind, split(&bytes).1), Ok(request));
            }
            let _ = Reply::decode(kind, &payload);
        }
    }

    #[test]
    fn replies_come_out_as_they_went_in() {
        let failures = (1..=7).filter_map(Failure::from_code).map(Reply::Failed);
        let others = [Reply::Datagram(vec![1]), Reply::Echo(vec![]), Reply::Answer(vec![2; 65535])];
        for reply in failures.chain(others) {
            let bytes = reply.encode(LAST_ID);
            let (header, payload) = split(&bytes);
            assert_eq!(Reply::decode(header.kind, payload), Ok(reply));
        }
    }

    #[test]
    fn an_ipv4_address_cannot_hide_in_an_ipv6_one() {
        let mut bytes = Vec::new();
        for host in [[10, 0, 0, 1], [127, 0, 0, 1]] {
            bytes.extend(std::net::Ipv4Addr::from(host).to_ipv6_mapped().octets());
            bytes.extend(80_u16.to_be_bytes());
        }
        let Ok(Request::Connect(flow)) = Request::decode(CONNECT, &bytes) else { panic!("no flow") };
        assert_eq!(flow.destination, "127.0.0.1:80".parse().unwrap());
    }

    #[test]
    fn headers_out_of_range_are_refused() {
        let header = |id: u32, len: u32, reserved: u8| {
            let mut bytes = [0; HEADER_LEN];
            bytes[3] = reserved;
            bytes[4..8].copy_from_slice(&id.to_be_bytes());
            bytes[8..].copy_from_slice(&len.to_be_bytes());
            Header::decode(&bytes)
        };
        assert!(header(FIRST_ID, MAX_PAYLOAD as u32, 0).is_ok());
        assert_eq!(
            header(FIRST_ID, MAX_PAYLOAD as u32 + 1, 0),
            Err(EgressError::TooLong(MAX_PAYLOAD as u32 + 1))
        );
        assert_eq!(header(FIRST_ID - 1, 0, 0), Err(EgressError::Id(FIRST_ID - 1)));
        assert_eq!(header(LAST_ID + 1, 0, 0), Err(EgressError::Id(LAST_ID + 1)));
        assert_eq!(header(FIRST_ID, 0, 1), Err(EgressError::Reserved));
    }
}
