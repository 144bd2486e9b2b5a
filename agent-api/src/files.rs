//! Work on a container's files: what is asked for, and the frames of the answer.
//!
//! The request (`POST /v1/containers/{id}/files`, JSON, upgrade to [`FILES_PROTOCOL`]) is answered by frames: for a
//! [`FilesOperation::Read`] first [`FilesKind::Stat`], then any number of [`FilesKind::Data`]; and at the end always one of
//! [`FilesKind::Done`] and [`FilesKind::Failed`]. A stream that ends without them was cut short. For a
//! [`FilesOperation::Write`] the host sends a plain tar stream and half-closes.
//!
//! A frame is a header of eight bytes (kind, three zeros, length as u32, big endian) and that many bytes.

use serde::{Deserialize, Serialize};

use crate::{Layer, VolumeMount};

/// `Upgrade:` token of work on files.
pub const FILES_PROTOCOL: &str = "coracle-files";
/// Length of a frame's header.
pub const HEADER_LEN: usize = 8;
/// The longest payload of a frame.
pub const MAX_PAYLOAD: u32 = 256 * 1024;

/// Body of the request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesRequest {
    /// The container's layers, lowest first, for a container that does not run.
    pub layers: Vec<Layer>,
    /// The volumes of a container that does not run: work on paths finds in them what it finds when the container runs.
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// What to do.
    pub operation: FilesOperation,
}

/// What to do with a container's files. Paths are absolute in the container; links in them never lead out of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum FilesOperation {
    /// What is at a path; a link at its end counts itself, unless a `/` or `/.` follows.
    Stat {
        /// The path.
        path: String,
    },
    /// What is at a path, as a tar stream whose names begin with the path's last part.
    Read {
        /// The path.
        path: String,
    },
    /// Unpacks a tar stream into a directory.
    Write {
        /// The directory.
        path: String,
        /// Refuse to replace a directory by something else, and the reverse.
        keep_kinds: bool,
        /// Everything becomes this user's (as in `docker run --user`) instead of the stream's.
        #[serde(default)]
        owner: Option<String>,
    },
    /// The whole root file system as a tar stream, without what is mounted in it.
    Export,
    /// What the container changed in its root file system, as [`FilesKind::Changes`].
    Changes {
        /// Files that the daemon has mounted over: their mount points are no change of the container's.
        injected: Vec<String>,
    },
    /// The same as a layer: a tar stream with whiteouts.
    Diff {
        /// As in [`FilesOperation::Changes`].
        injected: Vec<String>,
    },
    /// How much the container's writable layer holds, as [`FilesKind::Size`].
    Size,
}

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilesKind {
    /// JSON, a [`PathStat`].
    Stat = 1,
    /// A piece of a tar stream.
    Data = 2,
    /// JSON, an array of [`FileChange`]s, sorted by path over all frames.
    Changes = 3,
    /// JSON, a number of bytes.
    Size = 4,
    /// Nothing: everything was done.
    Done = 5,
    /// JSON, a [`crate::ApiError`]: it could not be done, or not to its end.
    Failed = 6,
}

/// Why a frame's header makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FilesFrameError {
    /// No such kind.
    #[error("there is no frame of kind {0}")]
    Kind(u8),
    /// The payload is too long.
    #[error("a frame of {0} bytes is longer than {MAX_PAYLOAD}")]
    Length(u32),
    /// Bytes that must be zero are not.
    #[error("the frame's header is malformed")]
    Padding,
}

/// A frame's header.
#[must_use]
pub fn encode_header(kind: FilesKind, len: u32) -> [u8; HEADER_LEN] {
    let [a, b, c, d] = len.to_be_bytes();
    [kind as u8, 0, 0, 0, a, b, c, d]
}

/// Reads a frame's header: its kind and the length of what follows.
///
/// # Errors
/// If it makes no sense.
pub fn decode_header(bytes: &[u8; HEADER_LEN]) -> Result<(FilesKind, u32), FilesFrameError> {
    let [kind, zeros @ .., a, b, c, d] = *bytes;
    let kind = match kind {
        1 => FilesKind::Stat,
        2 => FilesKind::Data,
        3 => FilesKind::Changes,
        4 => FilesKind::Size,
        5 => FilesKind::Done,
        6 => FilesKind::Failed,
        other => return Err(FilesFrameError::Kind(other)),
    };
    let len = u32::from_be_bytes([a, b, c, d]);
    match () {
        () if zeros != [0; 3] => Err(FilesFrameError::Padding),
        () if len > MAX_PAYLOAD => Err(FilesFrameError::Length(len)),
        () => Ok((kind, len)),
    }
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathStat {
    /// The path's last part.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// As in `st_mode`: kind and permissions.
    pub mode: u32,
    /// Nanoseconds since 1970.
    pub modified_unix_nanos: i64,
    /// Where a link leads, as an absolute path in the container; otherwise empty.
    pub link_target: String,
}

/// A path that differs from the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileChange {
    /// Absolute.
    pub path: String,
    /// How.
    pub kind: ChangeKind,
}

/// How a path differs from the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    /// It was changed, or something in it.
    Modified,
    /// It was not there.
    Added,
    /// It is gone.
    Deleted,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_they_were_written_and_no_others() {
        for kind in [FilesKind::Stat, FilesKind::Data, FilesKind::Changes, FilesKind::Size, FilesKind::Done] {
            for len in [0, 1, MAX_PAYLOAD] {
                assert_eq!(decode_header(&encode_header(kind, len)), Ok((kind, len)));
            }
        }
        assert_eq!(decode_header(&[7, 0, 0, 0, 0, 0, 0, 0]), Err(FilesFrameError::Kind(7)));
        assert_eq!(decode_header(&[1, 0, 1, 0, 0, 0, 0, 0]), Err(FilesFrameError::Padding));
        assert_eq!(decode_header(&[1, 0, 0, 0, 255, 0, 0, 0]), Err(FilesFrameError::Length(0xff00_0000)));
    }
}
