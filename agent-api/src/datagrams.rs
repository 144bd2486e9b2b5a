//! Datagrams to published UDP ports. The daemon has the sockets that clients send to; what comes goes into the guest with the
//! client's address, from which the agent sends it on, and what the container sends back there goes the same way back.
//!
//! Over one connection (`GET /v1/datagrams`, upgrade to [`DATAGRAMS_PROTOCOL`]) the daemon sends [`Inward`]s and the agent
//! [`Outward`]s, in frames as in [`crate::egress`]. The daemon chooses ids, one for each flow: a client, and the port that it sends to.
//! Either end forgets a flow when it likes to: with the next datagram it begins anew. A connection's end is that of its flows.

use std::net::SocketAddr;

use crate::{
    ProcessId,
    egress::{self, CONTAINER_LEN, EgressError, frame},
    ports::ContainerPort,
};

/// `Upgrade:` token of the connection.
pub const DATAGRAMS_PROTOCOL: &str = "coracle-datagrams";

const DATAGRAM: u8 = 1;
const FORGET: u8 = 2;

/// What the daemon says of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inward {
    /// A datagram has come.
    Datagram {
        /// For whom.
        to: ContainerPort,
        /// From whom, as the host sees it.
        client: SocketAddr,
        /// What it holds.
        data: Vec<u8>,
    },
    /// The flow is over.
    Forget,
}

/// What the agent says of a flow: a datagram that the container has sent to its client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outward(
    /// What it holds.
    pub Vec<u8>,
);

impl Inward {
    /// The frame of a datagram.
    #[must_use]
    pub fn datagram(id: u32, to: &ContainerPort, client: SocketAddr, data: &[u8]) -> Vec<u8> {
        let container = to.container.as_str().as_bytes();
        frame(DATAGRAM, id, &[container, &to.port.to_be_bytes(), &egress::address_bytes(client), data])
    }

    /// The frame.
    #[must_use]
    pub fn encode(&self, id: u32) -> Vec<u8> {
        match self {
            Self::Datagram { to, client, data } => Self::datagram(id, to, *client, data),
            Self::Forget => frame(FORGET, id, &[]),
        }
    }

    /// Reads what a header of this kind announced.
    ///
    /// # Errors
    /// If the kind is unknown or the payload does not have its form.
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, EgressError> {
        match kind {
            DATAGRAM => datagram(payload).ok_or(EgressError::Payload(kind)),
            FORGET if payload.is_empty() => Ok(Self::Forget),
            FORGET => Err(EgressError::Payload(kind)),
            kind => Err(EgressError::Kind(kind)),
        }
    }
}

fn datagram(payload: &[u8]) -> Option<Inward> {
    let (container, rest) = payload.split_at_checked(CONTAINER_LEN)?;
    let container: ProcessId = std::str::from_utf8(container).ok()?.parse().ok()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (client, data) = egress::address(rest)?;
    let to = ContainerPort { container, port: u16::from_be_bytes(*port) };
    Some(Inward::Datagram { to, client, data: data.to_vec() })
}

impl Outward {
    /// The frame.
    #[must_use]
    pub fn encode(id: u32, data: &[u8]) -> Vec<u8> {
        frame(DATAGRAM, id, &[data])
    }

    /// Reads what a header of this kind announced.
    ///
    /// # Errors
    /// If the kind is unknown.
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, EgressError> {
        match kind {
            DATAGRAM => Ok(Self(payload.to_vec())),
            kind => Err(EgressError::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::egress::{FIRST_ID, HEADER_LEN, Header, LAST_ID};

    fn split(bytes: &[u8]) -> (Header, &[u8]) {
        let (header, payload) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = Header::decode(header).unwrap();
        assert_eq!(header.len, payload.len());
        (header, payload)
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(
            container in "[0-9a-f]{64}",
            port: u16,
            ip: [u8; 4],
            from: u16,
            data in proptest::collection::vec(any::<u8>(), 0..100),
            id in FIRST_ID..=LAST_ID,
        ) {
            let to = ContainerPort { container: container.parse().unwrap(), port };
            let said = Inward::Datagram { to, client: SocketAddr::new(ip.into(), from), data: data.clone() };
            let bytes = said.encode(id);
            let (header, payload) = split(&bytes);
            prop_assert_eq!(header.id, id);
            prop_assert_eq!(Inward::decode(header.kind, payload), Ok(said));
            let bytes = Outward::encode(id, &data);
            let (header, payload) = split(&bytes);
            prop_assert_eq!(Outward::decode(header.kind, payload), Ok(Outward(data)));
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(kind in 0_u8..4, payload: Vec<u8>) {
            if let Ok(said) = Inward::decode(kind, &payload) {
                prop_assert_eq!(Inward::decode(kind, split(&said.encode(FIRST_ID)).1), Ok(said));
            }
            let _ = Outward::decode(kind, &payload);
        }
    }

    #[test]
    fn the_longest_datagram_fits() {
        let to = ContainerPort { container: "a".repeat(64).parse().unwrap(), port: 53 };
        let client = "[fd00::1]:4000".parse().unwrap();
        let said = Inward::Datagram { to, client, data: vec![7; 65_507] };
        let bytes = said.encode(FIRST_ID);
        let (header, payload) = split(&bytes);
        assert_eq!(Inward::decode(header.kind, payload), Ok(said));
        let forget = Inward::Forget.encode(LAST_ID);
        assert_eq!(Inward::decode(split(&forget).0.kind, &[]), Ok(Inward::Forget));
        assert!(Inward::decode(2, &[0]).is_err());
    }
}
