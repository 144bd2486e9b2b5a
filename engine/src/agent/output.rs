//! The stream of a process's output from the agent, with acknowledgements in the other direction.
//!
//! Frames come from the guest: kinds, lengths and the order of sequence numbers and times are checked.

use std::io::{self, Cursor};

use bytes::Bytes;
use coracle_agent_api::{
    ExitStatus,
    frame::{self, Ack, HEADER_LEN, Header, Kind},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, Chain},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::AgentError;
use crate::{logs::Stream, time::UnixNanos};

/// Acknowledge at the latest after so many frames; earlier when nothing more is waiting to be read.
const FRAMES_PER_ACK: u64 = 8;
const BUFFER: usize = 128 * 1024;

/// A frame, checked.
#[derive(Debug)]
pub(crate) enum Frame {
    /// Output of the process.
    Output { stream: Stream, time: UnixNanos, bytes: Bytes },
    /// How it ended; output may still follow.
    Exit(ExitStatus),
    /// Nothing follows.
    End,
}

/// See the module.
pub(crate) struct OutputStream {
    reader: BufReader<Chain<Cursor<Bytes>, OwnedReadHalf>>,
    writer: OwnedWriteHalf,
    sequence: u64,
    time: u64,
    acknowledged: u64,
}

impl OutputStream {
    pub(super) fn new(stream: UnixStream, buffered: Bytes, after: u64) -> Self {
        let (reader, writer) = stream.into_split();
        let reader = BufReader::with_capacity(BUFFER, Cursor::new(buffered).chain(reader));
        Self { reader, writer, sequence: after, time: 0, acknowledged: after }
    }

    /// Sequence number of the newest frame that was read.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The next frame.
    pub(crate) async fn next(&mut self) -> Result<Frame, AgentError> {
        let mut bytes = [0; HEADER_LEN];
        self.reader.read_exact(&mut bytes).await.map_err(AgentError::Stream)?;
        let header = Header::decode(&bytes).map_err(|error| broken(error.to_string()))?;
        if header.sequence != self.sequence.wrapping_add(1) {
            return Err(broken(format!("frame {} follows frame {}", header.sequence, self.sequence)));
        }
        if header.unix_nanos <= self.time {
            return Err(broken(format!(
                "the time of frame {} is not later than the one before",
                header.sequence
            )));
        }
        // At most MAX_PAYLOAD: decode has checked it.
        let mut payload = vec![0; header.len as usize];
        self.reader.read_exact(&mut payload).await.map_err(AgentError::Stream)?;
        self.sequence = header.sequence;
        self.time = header.unix_nanos;
        let output = |stream, payload: Vec<u8>| Frame::Output {
            stream,
            time: UnixNanos::from_u64(header.unix_nanos),
            bytes: payload.into(),
        };
        Ok(match header.kind {
            Kind::Stdout => output(Stream::Stdout, payload),
            Kind::Stderr => output(Stream::Stderr, payload),
            Kind::Exit => {
                Frame::Exit(frame::decode_exit(&payload).map_err(|error| broken(error.to_string()))?)
            }
            Kind::End => Frame::End,
        })
    }

    /// Says that everything read so far is safe. The word is sent at once only if nothing more waits to be read.
    pub(crate) async fn acknowledge(&mut self) -> Result<(), AgentError> {
        let waiting = self.reader.buffer().len() >= HEADER_LEN;
        if self.sequence == self.acknowledged || waiting && self.sequence - self.acknowledged < FRAMES_PER_ACK
        {
            return Ok(());
        }
        self.writer.write_all(&Ack(self.sequence).encode()).await.map_err(AgentError::Stream)?;
        self.writer.flush().await.map_err(AgentError::Stream)?;
        self.acknowledged = self.sequence;
        Ok(())
    }
}

fn broken(reason: String) -> AgentError {
    AgentError::Stream(io::Error::new(io::ErrorKind::InvalidData, reason))
}
