//! The writable disk: a sparse file of the host's. A flush is `fdatasync`; discarded space goes back to the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::super::buffers::Buffers;
use super::DiskError;
use super::request::Backend;

/// The file and how much of it is the disk.
#[derive(Debug)]
pub(crate) struct DataDisk {
    file: File,
    capacity: u64,
}

impl DataDisk {
    pub(crate) fn new(file: OwnedFd, capacity: u64) -> Result<Self, DiskError> {
        let file = File::from(file);
        if capacity == 0 || !capacity.is_multiple_of(4096) {
            return Err(DiskError::Capacity(capacity));
        }
        let size = file.metadata().map_err(DiskError::Size)?.len();
        if size < capacity {
            return Err(DiskError::TooShort { file: size, capacity });
        }
        Ok(Self { file, capacity })
    }

    /// Whether the file system could do it.
    fn allocate(&self, flags: FallocateFlags, position: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        match fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, position, len) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
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

    fn read(&self, position: u64, into: Buffers<'_>) -> io::Result<()> {
        into.read_file(self.file.as_fd(), position)
    }

    fn write(&self, position: u64, from: Buffers<'_>) -> io::Result<()> {
        from.write_file(self.file.as_fd(), position)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, position: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, position, len).map(drop)
    }

    fn write_zeroes(&self, position: u64, len: u64, unmap: bool) -> io::Result<()> {
        let order = match unmap {
            true => [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
            false => [FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE],
        };
        for flags in order {
            if self.allocate(flags, position, len)? {
                return Ok(());
            }
        }
        let zeroes = vec![0; 1 << 16];
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).unwrap_or(usize::MAX).min(zeroes.len());
            self.file.write_all_at(&zeroes[..part], position + done)?;
            done += part as u64;
        }
        Ok(())
    }
}
