//! The ends of files that will stand behind their inodes, until the inodes are written: in memory while they are few,
//! then in a temporary file that has no name.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use tempfile::SpooledTempFile;

use super::tree::NodeId;

/// As much stays in memory.
const IN_MEMORY: usize = 4 << 20;
const BUFFER: usize = 64 * 1024;

/// An end in the spool.
#[derive(Debug, Clone, Copy)]
struct Tail {
    node: NodeId,
    length: u16,
}

pub(super) struct Spool {
    file: SpooledTempFile,
    /// While writing: what is not in the file yet. While reading: what was read ahead.
    buffer: Vec<u8>,
    /// Where the buffer's content stands in the file.
    buffered_at: u64,
    tails: Vec<Tail>,
}

impl Spool {
    pub(super) fn new(scratch: &Path) -> Self {
        let file = tempfile::spooled_tempfile_in(IN_MEMORY, scratch);
        Self { file, buffer: Vec::with_capacity(BUFFER), buffered_at: 0, tails: Vec::new() }
    }

    /// Keeps an end; its place in the spool.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<u64> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        let place = self.buffered_at + self.buffer.len() as u64;
        self.buffer.extend_from_slice(bytes);
        Ok(place)
    }

    /// Says whose end was the last that was kept.
    pub(super) fn belongs_to(&mut self, node: NodeId, length: u16) {
        self.tails.push(Tail { node, length });
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffered_at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// From now on it is read.
    pub(super) fn seal(&mut self) -> io::Result<()> {
        self.flush()
    }

    /// An end by its place.
    pub(super) fn read(&mut self, place: u64, length: usize) -> io::Result<&[u8]> {
        let is_buffered = |place: u64| {
            let start = usize::try_from(place.checked_sub(self.buffered_at)?).ok()?;
            (start + length <= self.buffer.len()).then_some(start)
        };
        if let Some(start) = is_buffered(place) {
            return Ok(&self.buffer[start..start + length]);
        }
        self.file.seek(SeekFrom::Start(place))?;
        self.buffer.clear();
        self.buffered_at = place;
        (&mut self.file).take(BUFFER as u64).read_to_end(&mut self.buffer)?;
        self.buffer.get(..length).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// The ends in the order in which they came: the node, its end's place and length.
    pub(super) fn tails(&self) -> impl Iterator<Item = (NodeId, u64, usize)> + use<> {
        let mut place = 0;
        // Eight bytes each, and the image is complete: the copy is small beside the tree.
        self.tails.clone().into_iter().map(move |tail| {
            let start = place;
            place += u64::from(tail.length);
            (tail.node, start, usize::from(tail.length))
        })
    }
}
