//! The writable disk: a sparse file of the host's. A flush is `fdatasync`; discarded space goes back to the host.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::super::buffers::Buffers;
use super::DiskError;
use super::job::Job;
use super::request::Backend;

/// The file and how much of it is the disk.
#[derive(Debug)]
pub(crate) struct DataDisk {
    file: Arc<File>,
    capacity: u64,
}

impl DataDisk {
    pub(crate) fn new(file: OwnedFd, capacity: u64) -> Result<Self, DiskError> {
        let file = File::from(file);
        if capacity == 0 || !capacity.is_multiple_of(4096) || i64::try_from(capacity).is_err() {
            return Err(DiskError::Capacity(capacity));
        }
        let size = file.metadata().map_err(DiskError::Size)?.len();
        if size < capacity {
            return Err(DiskError::TooShort { file: size, capacity });
        }
        Ok(Self { file: Arc::new(file), capacity })
    }
}

impl Backend for DataDisk {
    fn name(&self) -> &'static str {
        "data-disk"
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read<'m>(&self, position: u64, into: Buffers<'m>) -> io::Result<Vec<Job<'m>>> {
        Ok(vec![Job::read(Arc::clone(&self.file), position, into)])
    }

    fn write<'m>(&self, position: u64, from: Buffers<'m>) -> io::Result<Job<'m>> {
        Ok(Job::write(Arc::clone(&self.file), position, from))
    }

    fn flush<'m>(&self) -> Option<Job<'m>> {
        Some(Job::sync(Arc::clone(&self.file)))
    }

    fn discard<'m>(&self, position: u64, len: u64) -> io::Result<Job<'m>> {
        Ok(Job::discard(Arc::clone(&self.file), position, len))
    }

    fn write_zeroes<'m>(&self, position: u64, len: u64, unmap: bool) -> io::Result<Job<'m>> {
        Ok(Job::write_zeroes(Arc::clone(&self.file), position, len, unmap))
    }
}
