//! Work on a container's files through the agent: frames come back, a tar stream may go in.
//!
//! Frames come from the guest: kinds, lengths and JSON are checked, and an end without a word is an error.

use std::io::{self, Cursor};

use bytes::Bytes;
use coracle_agent_api::{
    ApiError,
    files::{FileChange, FilesKind, HEADER_LEN, PathStat, decode_header},
};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, Chain},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::AgentError;

const BUFFER: usize = 128 * 1024;

/// A frame, checked.
#[derive(Debug)]
pub(crate) enum FilesFrame {
    /// What a path is.
    Stat(PathStat),
    /// A piece of a tar stream.
    Data(Bytes),
    /// Some of the changed paths.
    Changes(Vec<FileChange>),
    /// Bytes in the writable layer.
    Size(u64),
    /// Everything was done.
    Done,
}

/// What the agent answers.
pub(crate) struct FilesAnswer {
    reader: BufReader<Chain<Cursor<Bytes>, OwnedReadHalf>>,
}

/// Where a tar stream goes.
pub(crate) struct FilesInput {
    writer: OwnedWriteHalf,
}

pub(super) fn split(stream: UnixStream, buffered: Bytes) -> (FilesAnswer, FilesInput) {
    let (reader, writer) = stream.into_split();
    let reader = BufReader::with_capacity(BUFFER, Cursor::new(buffered).chain(reader));
    (FilesAnswer { reader }, FilesInput { writer })
}

impl FilesAnswer {
    /// The next frame; what the agent could not do is an error.
    pub(crate) async fn next(&mut self) -> Result<FilesFrame, AgentError> {
        let mut header = [0; HEADER_LEN];
        self.reader.read_exact(&mut header).await.map_err(cut_short)?;
        let (kind, len) = decode_header(&header).map_err(|error| broken(error.to_string()))?;
        // At most MAX_PAYLOAD: decode has checked it.
        let mut payload = vec![0; len as usize];
        self.reader.read_exact(&mut payload).await.map_err(cut_short)?;
        Ok(match kind {
            FilesKind::Stat => FilesFrame::Stat(parse(&payload)?),
            FilesKind::Data => FilesFrame::Data(payload.into()),
            FilesKind::Changes => FilesFrame::Changes(parse(&payload)?),
            FilesKind::Size => FilesFrame::Size(parse(&payload)?),
            FilesKind::Done => FilesFrame::Done,
            FilesKind::Failed => return Err(AgentError::Refused(parse::<ApiError>(&payload)?)),
        })
    }
}

impl FilesInput {
    /// Sends a piece of the stream.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        self.writer.write_all(bytes).await.map_err(AgentError::Stream)
    }

    /// Says that the stream is at its end. The connection stays until this is dropped with the answer.
    pub(crate) async fn finish(&mut self) -> Result<(), AgentError> {
        self.writer.shutdown().await.map_err(AgentError::Stream)
    }
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, AgentError> {
    serde_json::from_slice(payload).map_err(|error| broken(error.to_string()))
}

fn cut_short(error: io::Error) -> AgentError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return broken(
            "the work on the container's files was cut off: it was started, removed or has ended".to_owned(),
        );
    }
    AgentError::Stream(error)
}

fn broken(reason: String) -> AgentError {
    AgentError::Stream(io::Error::new(io::ErrorKind::InvalidData, reason))
}
