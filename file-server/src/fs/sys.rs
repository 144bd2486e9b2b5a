//! The few system calls that need more than their safe names: transfers between files and guest memory, and paths through `/proc/self/fd`,
//! which is how a descriptor that was opened with `O_PATH` becomes one for reading or writing, and how its extended attributes are reached.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use rustix::io::Errno;

/// Status of `name` in `directory`, or of the descriptor itself if the name is empty. Links are not followed.
pub(super) fn status(directory: BorrowedFd<'_>, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(directory, name, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

/// What kind of file it is.
pub(super) fn kind(status: &Statx) -> FileType {
    FileType::from_raw_mode(status.stx_mode.into())
}

/// Where `/proc/self/fd` is.
#[derive(Debug, Clone, Copy)]
pub struct Proc {
    prefix: &'static str,
}

impl Proc {
    /// As an absolute path.
    pub const ABSOLUTE: Self = Self { prefix: "/proc/self/fd/" };
    /// As the working directory: for a process that has entered the jail.
    pub const WORKING_DIRECTORY: Self = Self { prefix: "" };

    /// A path that leads to the descriptor's file.
    pub(super) fn path(self, fd: BorrowedFd<'_>) -> CString {
        self.beneath(fd, c"")
    }

    /// A path that leads to `name` in the descriptor's directory.
    pub(super) fn beneath(self, fd: BorrowedFd<'_>, name: &CStr) -> CString {
        use std::io::Write;
        let mut path = Vec::with_capacity(self.prefix.len() + 16 + name.count_bytes());
        // Writing to a vector cannot fail.
        let _ = write!(path, "{}{}", self.prefix, fd.as_raw_fd());
        if !name.is_empty() {
            path.push(b'/');
            path.extend_from_slice(name.to_bytes());
        }
        // There is no NUL in a number or a C string, so that nothing is lost here.
        CString::new(path).unwrap_or_default()
    }
}

/// A file to read from and write to at positions, without owning it.
pub(super) struct Transfer<'a> {
    file: BorrowedFd<'a>,
    append: bool,
}

impl<'a> Transfer<'a> {
    pub(super) fn new(file: BorrowedFd<'a>) -> Self {
        Self { file, append: false }
    }

    /// Writes go to the file's end, wherever that is by then.
    pub(super) fn appending(file: BorrowedFd<'a>) -> Self {
        Self { file, append: true }
    }
}

fn vectors(slices: &[FileVolatileSlice<'_>]) -> Vec<libc::iovec> {
    slices.iter().map(|slice| libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }).collect()
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| Errno::FBIG.into())
}

fn transferred(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The most buffers in one call (`IOV_MAX`).
const MOST_VECTORS: usize = 1024;

impl FileReadWriteVolatile for Transfer<'_> {
    fn read_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        let vectors = vectors(&slices[..slices.len().min(MOST_VECTORS)]);
        let position = position(offset)?;
        // SAFETY: the slices are memory that stays valid for the call and that everybody accesses volatilely; the count fits.
        transferred(unsafe {
            libc::preadv64(self.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, position)
        })
    }

    fn write_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        let vectors = vectors(&slices[..slices.len().min(MOST_VECTORS)]);
        let position = position(offset)?;
        let flags = if self.append { libc::RWF_APPEND } else { 0 };
        // SAFETY: as above.
        transferred(unsafe {
            libc::pwritev2(self.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, position, flags)
        })
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        self.read_vectored_at_volatile(&[slice], offset)
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        self.write_vectored_at_volatile(&[slice], offset)
    }

    fn read_volatile(&mut self, _: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_volatile(&mut self, _: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Real time in nanoseconds, as coarse as the times of files are.
pub(super) fn now() -> i128 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// The user and group that the process acts as, and the mask of modes that it inherited.
pub(super) fn credentials() -> io::Result<(u32, u32, u32)> {
    let umask = std::fs::read_to_string("/proc/self/status")?
        .lines()
        .find_map(|line| u32::from_str_radix(line.strip_prefix("Umask:")?.trim(), 8).ok())
        .ok_or(io::ErrorKind::NotFound)?;
    Ok((rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw(), umask))
}

/// Opens the file behind an `O_PATH` descriptor that is known to be a regular file or directory.
pub(super) fn reopen(
    proc: Proc,
    fd: impl AsFd,
    flags: rustix::fs::OFlags,
) -> Result<std::os::fd::OwnedFd, Errno> {
    use rustix::fs::{CWD, Mode, OFlags};
    rustix::fs::openat(CWD, proc.path(fd.as_fd()), flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
}

/// A file system's status with nothing in it.
pub(super) fn zeroed_status() -> libc::statvfs64 {
    // SAFETY: it consists of numbers only, for which zero is a value.
    unsafe { std::mem::zeroed() }
}
