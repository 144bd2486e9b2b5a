//! What a disk request needs of the host's files: jobs, each a system call that is repeated until all of it is done. The same job
//! can be given to an io_uring or be run at once.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;

use super::super::buffers::Buffers;

/// One thing to do with a file.
#[derive(Debug)]
pub(crate) struct Job<'m> {
    file: Arc<File>,
    kind: Kind<'m>,
}

#[derive(Debug)]
enum Kind<'m> {
    Read {
        position: u64,
        into: Buffers<'m>,
        vectors: Vec<libc::iovec>,
    },
    Write {
        position: u64,
        from: Buffers<'m>,
        vectors: Vec<libc::iovec>,
    },
    /// Makes everything that was written durable.
    Sync,
    /// Gives space back or makes it zero, in the first of these ways that the file system knows.
    Clear {
        position: u64,
        len: u64,
        ways: VecDeque<FallocateFlags>,
        must_be_zero: bool,
    },
}

impl<'m> Job<'m> {
    /// Fills the buffers from a position on; it fails where the file ends too early.
    pub(super) fn read(file: Arc<File>, position: u64, into: Buffers<'m>) -> Self {
        let vectors = into.vectors();
        Self { file, kind: Kind::Read { position, into, vectors } }
    }

    pub(super) fn write(file: Arc<File>, position: u64, from: Buffers<'m>) -> Self {
        let vectors = from.vectors();
        Self { file, kind: Kind::Write { position, from, vectors } }
    }

    pub(super) fn sync(file: Arc<File>) -> Self {
        Self { file, kind: Kind::Sync }
    }

    /// Gives the space back, where the file system can.
    pub(super) fn discard(file: Arc<File>, position: u64, len: u64) -> Self {
        let ways = [FallocateFlags::PUNCH_HOLE].into();
        Self { file, kind: Kind::Clear { position, len, ways, must_be_zero: false } }
    }

    /// Makes a range read as zeroes, and gives its space back if `unmap`.
    pub(super) fn write_zeroes(file: Arc<File>, position: u64, len: u64, unmap: bool) -> Self {
        let (hole, zero) = (FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE);
        let ways = if unmap { [hole, zero] } else { [zero, hole] }.into();
        Self { file, kind: Kind::Clear { position, len, ways, must_be_zero: true } }
    }

    /// Whether there is nothing to call the system for.
    pub(super) fn is_empty(&self) -> bool {
        match &self.kind {
            Kind::Read { into, .. } => into.len() == 0,
            Kind::Write { from, .. } => from.len() == 0,
            Kind::Clear { len, .. } => *len == 0,
            Kind::Sync => false,
        }
    }

    /// The next system call, for an io_uring. The job must live, and the memory of its buffers stay, until the call is complete.
    pub(super) fn entry(&self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        match &self.kind {
            Kind::Read { position, vectors, .. } => {
                opcode::Readv::new(fd, vectors.as_ptr(), vectors.len() as u32).offset(*position).build()
            }
            Kind::Write { position, vectors, .. } => {
                opcode::Writev::new(fd, vectors.as_ptr(), vectors.len() as u32).offset(*position).build()
            }
            Kind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Kind::Clear { position, len, ways, .. } => {
                let flags = ways.front().copied().unwrap_or(FallocateFlags::PUNCH_HOLE);
                let mode = (flags | FallocateFlags::KEEP_SIZE).bits() as i32;
                opcode::Fallocate::new(fd, *len).offset(*position).mode(mode).build()
            }
        }
    }

    /// Makes the next system call here and now; the result is like an io_uring's.
    fn call(&self) -> i32 {
        let fd = self.file.as_raw_fd();
        let result = match &self.kind {
            // SAFETY: the vectors point into guest memory that the job borrows, which is only accessed as volatile memory.
            Kind::Read { position, vectors, .. } => unsafe {
                libc::preadv64(fd, vectors.as_ptr(), vectors.len() as libc::c_int, *position as i64)
            },
            // SAFETY: as above; the kernel only reads it.
            Kind::Write { position, vectors, .. } => unsafe {
                libc::pwritev64(fd, vectors.as_ptr(), vectors.len() as libc::c_int, *position as i64)
            },
            Kind::Sync => return of(rustix::fs::fdatasync(&self.file)),
            Kind::Clear { position, len, ways, .. } => {
                let flags = ways.front().copied().unwrap_or(FallocateFlags::PUNCH_HOLE);
                let flags = flags | FallocateFlags::KEEP_SIZE;
                return of(rustix::fs::fallocate(self.file.as_fd(), flags, *position, *len));
            }
        };
        // The kernel moves less than 2 GiB at once.
        i32::try_from(result)
            .ok()
            .filter(|count| *count >= 0)
            .unwrap_or_else(|| -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }

    /// Takes the result of the system call: true if the job is done, false if there is more to call for.
    pub(super) fn advance(&mut self, result: i32) -> io::Result<bool> {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            return Ok(false);
        }
        let count = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        match &mut self.kind {
            Kind::Read { position, into: buffers, vectors }
            | Kind::Write { position, from: buffers, vectors } => {
                let count = count?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *position += count as u64;
                // More than was asked for cannot have been moved.
                buffers.split_front(count.min(buffers.len()));
                *vectors = buffers.vectors();
                Ok(buffers.len() == 0)
            }
            Kind::Sync => count.map(|_| true),
            Kind::Clear { position, len, ways, must_be_zero } => match count {
                Ok(_) => Ok(true),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                    ways.pop_front();
                    if ways.is_empty() && *must_be_zero {
                        write_zeroes(&self.file, *position, *len)?;
                    }
                    Ok(ways.is_empty())
                }
                Err(error) => Err(error),
            },
        }
    }

    /// Does all of it now.
    pub(super) fn run(mut self) -> io::Result<()> {
        while !self.is_empty() && !self.advance(self.call())? {}
        Ok(())
    }
}

fn of(result: rustix::io::Result<()>) -> i32 {
    result.map_or_else(|errno| -errno.raw_os_error(), |()| 0)
}

/// For file systems without holes.
fn write_zeroes(file: &File, position: u64, len: u64) -> io::Result<()> {
    let zeroes = vec![0; 1 << 16];
    let mut done = 0;
    while done < len {
        let part = usize::try_from(len - done).unwrap_or(usize::MAX).min(zeroes.len());
        file.write_all_at(&zeroes[..part], position + done)?;
        done += part as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, Memory};
    use vm_memory::{Bytes, GuestAddress, GuestMemory};

    fn buffers(memory: &Memory) -> Buffers<'_> {
        let mut all = Buffers::default();
        for (at, len) in [(0, 512), (0x800, 1024), (0x400, 512)] {
            let part = memory.get_slice(GuestAddress(at), len).unwrap();
            assert!(all.append(&Buffers::of(part)));
        }
        all
    }

    #[test]
    fn a_short_result_is_followed_by_a_call_for_the_rest() {
        let memory = memory::allocate(&[(GuestAddress(0), 0x1000)]).unwrap();
        let content: Vec<u8> = (0..2048u32).map(|i| (i % 251) as u8).collect();
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(&content, 4096).unwrap();
        let mut job = Job::read(Arc::clone(&file), 4096, buffers(&memory));
        // As if the first call had brought 700 bytes.
        let mut first = vec![0; 700];
        file.read_exact_at(&mut first, 4096).unwrap();
        memory.write_slice(&first[..512], GuestAddress(0)).unwrap();
        memory.write_slice(&first[512..], GuestAddress(0x800)).unwrap();
        assert!(!job.advance(700).unwrap());
        assert!(!job.advance(-libc::EINTR).unwrap());
        job.run().unwrap();
        let mut found = vec![0; 2048];
        buffers(&memory).copy_to(&mut found).unwrap();
        assert_eq!(found, content);
    }

    #[test]
    fn an_error_and_an_early_end_are_errors() {
        let memory = memory::allocate(&[(GuestAddress(0), 0x1000)]).unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        for result in [-libc::EIO, 0] {
            assert!(Job::read(Arc::clone(&file), 0, buffers(&memory)).advance(result).is_err());
            assert!(Job::write(Arc::clone(&file), 0, buffers(&memory)).advance(result).is_err());
        }
        assert!(Job::sync(Arc::clone(&file)).advance(-libc::EIO).is_err());
        assert!(Job::discard(file, 0, 512).advance(-libc::ENOSPC).is_err());
    }

    #[test]
    fn without_holes_zeroes_are_written_and_discards_forgotten() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(&[1; 200_000], 0).unwrap();
        let mut job = Job::write_zeroes(Arc::clone(&file), 1000, 150_000, true);
        assert!(!job.advance(-libc::EOPNOTSUPP).unwrap());
        assert!(job.advance(-libc::EOPNOTSUPP).unwrap());
        let mut found = vec![0; 200_000];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found[..1000].iter().chain(&found[151_000..]).all(|&byte| byte == 1));
        assert!(found[1000..151_000].iter().all(|&byte| byte == 0));
        assert!(Job::discard(file, 0, 512).advance(-libc::EOPNOTSUPP).unwrap());
    }
}
