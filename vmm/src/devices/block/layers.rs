//! The layers disk: a large, read-only, mostly empty disk whose segments are files that come and go while the machine
//! runs. What lies in no segment cannot be read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};

use super::super::buffers::Buffers;
use super::DiskError;
use super::job::Job;
use super::request::Backend;

const ALIGNMENT: u64 = 4096;

#[derive(Debug, Clone)]
struct Segment {
    len: u64,
    /// Where the file ends; the rest of its last block reads as zeroes.
    file_len: u64,
    file: Arc<File>,
}

/// The segments by their first byte, shared between the disk and whoever adds and removes them.
#[derive(Debug, Clone)]
pub(crate) struct Segments {
    capacity: u64,
    map: Arc<RwLock<BTreeMap<u64, Segment>>>,
}

impl Segments {
    pub(crate) fn new(capacity: u64) -> Result<Self, DiskError> {
        // The last position must be one that files have too.
        if capacity == 0 || !capacity.is_multiple_of(ALIGNMENT) || i64::try_from(capacity).is_err() {
            return Err(DiskError::Capacity(capacity));
        }
        Ok(Self { capacity, map: Arc::default() })
    }

    /// Adds a segment; it can be read as soon as this returns.
    pub(crate) fn attach(&self, offset: u64, len: u64, file: OwnedFd) -> Result<(), DiskError> {
        let bounds = DiskError::SegmentBounds { offset, len };
        let end = offset.checked_add(len).filter(|end| *end <= self.capacity);
        let (Some(end), true, true) =
            (end, offset.is_multiple_of(ALIGNMENT), len > 0 && len.is_multiple_of(ALIGNMENT))
        else {
            return Err(bounds);
        };
        let file = File::from(file);
        let file_len = file.metadata().map_err(DiskError::Size)?.len();
        if file_len.next_multiple_of(ALIGNMENT) < len {
            return Err(DiskError::TooShort { file: file_len, capacity: len });
        }
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let before = map.range(..end).next_back();
        if before.is_some_and(|(begin, segment)| begin + segment.len > offset) {
            return Err(DiskError::SegmentOverlap { offset });
        }
        map.insert(offset, Segment { len, file_len, file: Arc::new(file) });
        Ok(())
    }

    /// Removes the segment that begins here. A read that is under way still ends well.
    pub(crate) fn detach(&self, offset: u64) -> Result<(), DiskError> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.remove(&offset).map(drop).ok_or(DiskError::NoSegment { offset })
    }

    /// The segment around a position, and where it begins.
    fn find(&self, position: u64) -> Option<(u64, Segment)> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let (begin, segment) = map.range(..=position).next_back()?;
        (position < begin + segment.len).then(|| (*begin, segment.clone()))
    }
}

/// The disk made of the segments.
#[derive(Debug)]
pub(crate) struct LayersDisk {
    segments: Segments,
}

impl LayersDisk {
    pub(crate) fn new(segments: Segments) -> Self {
        Self { segments }
    }
}

impl Backend for LayersDisk {
    fn name(&self) -> &'static str {
        "layers-disk"
    }

    fn capacity(&self) -> u64 {
        self.segments.capacity
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read<'m>(&self, mut position: u64, mut into: Buffers<'m>) -> io::Result<Vec<Job<'m>>> {
        let mut jobs = Vec::new();
        while into.len() > 0 {
            let missing = || io::Error::new(io::ErrorKind::NotFound, "no segment is attached there");
            let (begin, segment) = self.segments.find(position).ok_or_else(missing)?;
            let inside = position - begin;
            let mut part = take(&mut into, segment.len - inside);
            position += part.len() as u64;
            let stored = take(&mut part, segment.file_len.saturating_sub(inside));
            part.fill_zero();
            jobs.push(Job::read(segment.file, inside, stored));
        }
        Ok(jobs)
    }

    fn write<'m>(&self, _: u64, _: Buffers<'m>) -> io::Result<Job<'m>> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush<'m>(&self) -> Option<Job<'m>> {
        None
    }

    fn discard<'m>(&self, _: u64, _: u64) -> io::Result<Job<'m>> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn write_zeroes<'m>(&self, _: u64, _: u64, _: bool) -> io::Result<Job<'m>> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// Takes at most `most` bytes off the front.
fn take<'m>(buffers: &mut Buffers<'m>, most: u64) -> Buffers<'m> {
    let count = buffers.len().min(usize::try_from(most).unwrap_or(usize::MAX));
    // There are that many bytes.
    buffers.split_front(count).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file.into()
    }

    #[test]
    fn segments_may_touch_but_not_overlap() {
        let segments = Segments::new(1 << 30).unwrap();
        segments.attach(8192, 8192, file(8192)).unwrap();
        segments.attach(16384, 4096, file(1)).unwrap();
        segments.attach(4096, 4096, file(4096)).unwrap();
        for (offset, len) in [(4096, 4096), (0, 8192), (12288, 4096), (0, 1 << 20)] {
            let result = segments.attach(offset, len, file(len));
            assert!(matches!(result, Err(DiskError::SegmentOverlap { .. })), "{offset} {len}");
        }
        segments.detach(8192).unwrap();
        assert!(matches!(segments.detach(8192), Err(DiskError::NoSegment { .. })));
        segments.attach(12288, 4096, file(4096)).unwrap();
    }

    #[test]
    fn impossible_segments_are_refused() {
        let segments = Segments::new(1 << 20).unwrap();
        for (offset, len) in [(1, 4096), (0, 1), (0, 0), (1 << 20, 4096), (u64::MAX - 4095, 4096)] {
            let result = segments.attach(offset, len, file(1 << 21));
            assert!(matches!(result, Err(DiskError::SegmentBounds { .. })), "{offset} {len}");
        }
        assert!(matches!(segments.attach(0, 8192, file(4096)), Err(DiskError::TooShort { .. })));
    }
}
