//! Frames of a process's output stream.
//!
//! The agent keeps what a process wrote until the daemon has acknowledged it, so that a daemon that was killed can go on
//! where its log ends. Frames of one process have sequence numbers that rise by one from 1, and times that rise strictly.
//!
//! ```text
//!  0      1            4                8                      16                     24
//! ┌──────┬────────────┬────────────────┬──────────────────────┬──────────────────────┬─────────
//! │ kind │ 0  0  0    │ length, u32 BE │ sequence, u64 BE     │ Unix time ns, u64 BE │ payload
//! └──────┴────────────┴────────────────┴──────────────────────┴──────────────────────┴─────────
//! ```

use crate::ExitStatus;

/// Length of a frame's header in bytes.
pub const HEADER_LEN: usize = 24;
/// The longest payload in bytes; a longer one is an error.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Length of an acknowledgement in bytes.
pub const ACK_LEN: usize = 8;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Bytes from standard output, or from the terminal.
    Stdout = 1,
    /// Bytes from standard error.
    Stderr = 2,
    /// The process has ended; the payload is an [`ExitStatus`] as JSON. Output can still follow it, from processes that
    /// inherited the pipes.
    Exit = 3,
    /// Nothing follows: the process has ended and no one holds its output any more.
    End = 4,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// The payload's length in bytes, at most [`MAX_PAYLOAD`].
    pub len: u32,
    /// Rises by one from 1.
    pub sequence: u64,
    /// When the agent read the bytes: nanoseconds since 1970, strictly rising within one process.
    pub unix_nanos: u64,
}

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The first byte is none of [`Kind`].
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// Reserved bytes are set.
    #[error("reserved bytes of a frame are not zero")]
    Reserved,
    /// The payload is longer than [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes is longer than {MAX_PAYLOAD}")]
    TooLong(u32),
}

impl Header {
    /// The bytes of the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.len.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[16..].copy_from_slice(&self.unix_nanos.to_be_bytes());
        bytes
    }

    /// Reads a header; whatever the other end sent, the length it returns is within [`MAX_PAYLOAD`].
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [kind, r0, r1, r2, l0, l1, l2, l3, rest @ ..] = *bytes;
        let kind = match kind {
            1 => Kind::Stdout,
            2 => Kind::Stderr,
            3 => Kind::Exit,
            4 => Kind::End,
            other => return Err(FrameError::Kind(other)),
        };
        if [r0, r1, r2] != [0; 3] {
            return Err(FrameError::Reserved);
        }
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        if len as usize > MAX_PAYLOAD {
            return Err(FrameError::TooLong(len));
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, t0, t1, t2, t3, t4, t5, t6, t7] = rest;
        Ok(Self {
            kind,
            len,
            sequence: u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            unix_nanos: u64::from_be_bytes([t0, t1, t2, t3, t4, t5, t6, t7]),
        })
    }
}

/// Sent by the daemon: everything up to and with this sequence number is safe in its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ack(pub u64);

impl Ack {
    /// The bytes on the wire.
    pub fn encode(self) -> [u8; ACK_LEN] {
        self.0.to_be_bytes()
    }

    /// Reads an acknowledgement.
    pub fn decode(bytes: [u8; ACK_LEN]) -> Self {
        Self(u64::from_be_bytes(bytes))
    }
}

/// The payload of an [`Kind::Exit`] frame.
pub fn encode_exit(status: &ExitStatus) -> Vec<u8> {
    serde_json::to_vec(status).expect("an exit status has no map with odd keys")
}

/// Reads the payload of an [`Kind::Exit`] frame.
pub fn decode_exit(payload: &[u8]) -> Result<ExitStatus, serde_json::Error> {
    serde_json::from_slice(payload)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_header_survives_the_wire(kind in 1u8..=4, len in 0u32..=MAX_PAYLOAD as u32, sequence: u64, unix_nanos: u64) {
            let kind = [Kind::Stdout, Kind::Stderr, Kind::Exit, Kind::End][usize::from(kind) - 1];
            let header = Header { kind, len, sequence, unix_nanos };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn no_bytes_decode_to_an_illegal_header(bytes: [u8; HEADER_LEN]) {
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.len as usize <= MAX_PAYLOAD);
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
