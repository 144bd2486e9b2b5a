//! Copies a tree as it is: kinds, owners, modes, times, extended attributes, hard links, holes. The source is a hostile image, so no
//! name in it is resolved twice and no symbolic link is followed; the target is empty and nobody else's.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

/// Deeper trees are refused: each level costs descriptors and stack.
const MAX_DEPTH: u32 = 500;
const NOT_THROUGH_LINKS: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC);
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(NOT_THROUGH_LINKS);

/// Copies what is in one directory, and its own attributes, to another.
pub(super) fn tree(source: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let source = rustix::fs::openat(source, ".", DIRECTORY, Mode::empty())?;
    let target = rustix::fs::openat(target, ".", DIRECTORY, Mode::empty())?;
    let mut copy = Copy { top: target.as_fd(), links: HashMap::new() };
    copy.directory(source, &target, Path::new(""), 0)
}

/// Gives one directory the attributes of another.
pub(super) fn attributes(source: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let source = rustix::fs::openat(source, ".", DIRECTORY, Mode::empty())?;
    let target = rustix::fs::openat(target, ".", DIRECTORY, Mode::empty())?;
    give_attributes(&rustix::fs::fstat(&source)?, &source, &target)
}

struct Copy<'a> {
    top: BorrowedFd<'a>,
    /// Files with several names, by device and inode, and the first of their names in the target.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Copy<'_> {
    fn directory(&mut self, source: OwnedFd, target: &OwnedFd, path: &Path, depth: u32) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other(format!("a directory is more than {MAX_DEPTH} levels deep")));
        }
        let stat = rustix::fs::fstat(&source)?;
        for entry in Dir::read_from(&source)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let below = path.join(OsStr::from_bytes(name.to_bytes()));
            self.entry(source.as_fd(), target, name, below, depth)?;
        }
        give_attributes(&stat, &source, target)
    }

    fn entry(
        &mut self,
        source: BorrowedFd<'_>,
        target: &OwnedFd,
        name: &CStr,
        path: PathBuf,
        depth: u32,
    ) -> io::Result<()> {
        let stat = rustix::fs::statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let inner = rustix::fs::openat(source, name, DIRECTORY, Mode::empty())?;
                rustix::fs::mkdirat(target, name, Mode::RWXU)?;
                let made = rustix::fs::openat(target, name, DIRECTORY, Mode::empty())?;
                return self.directory(inner, &made, &path, depth + 1);
            }
            FileType::RegularFile => {
                if stat.st_nlink > 1 {
                    if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                        return Ok(rustix::fs::linkat(self.top, first, target, name, AtFlags::empty())?);
                    }
                    self.links.insert((stat.st_dev, stat.st_ino), path);
                }
                return file(source, target, name);
            }
            FileType::Symlink => {
                let to = rustix::fs::readlinkat(source, name, Vec::new())?;
                rustix::fs::symlinkat(to, target, name)?;
            }
            kind
            @ (FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice) => {
                rustix::fs::mknodat(
                    target,
                    name,
                    kind,
                    Mode::from_raw_mode(stat.st_mode & 0o7777),
                    stat.st_rdev,
                )?;
            }
            FileType::Unknown => return Err(io::Error::other("a file is of no kind that is known")),
        }
        owner(&stat, target, name)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            rustix::fs::chmodat(target, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
        }
        Ok(rustix::fs::utimensat(target, name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

fn file(source: BorrowedFd<'_>, target: &OwnedFd, name: &CStr) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | NOT_THROUGH_LINKS;
    let from = rustix::fs::openat(source, name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&from)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("a file became something else while it was copied"));
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | NOT_THROUGH_LINKS;
    let to = rustix::fs::openat(target, name, flags, Mode::RUSR | Mode::WUSR)?;
    let (mut from, mut to) = (File::from(from), File::from(to));
    let size = stat.st_size.cast_unsigned();
    let mut at = 0;
    while at < size {
        // Only what is there; the rest are holes.
        let begin = match rustix::fs::seek(&from, rustix::fs::SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&from, rustix::fs::SeekFrom::Hole(begin))?.min(size);
        from.seek(SeekFrom::Start(begin))?;
        to.seek(SeekFrom::Start(begin))?;
        let length = end.saturating_sub(begin);
        if length == 0 || io::copy(&mut (&mut from).take(length), &mut to)? < length {
            break;
        }
        at = end;
    }
    to.set_len(size)?;
    give_attributes(&stat, from.as_fd(), to.as_fd())
}

/// Owner, mode, extended attributes and times; in this order, since a change of the owner takes privileges away and everything changes
/// the times.
fn give_attributes(stat: &Stat, source: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let (uid, gid) = ids(stat);
    rustix::fs::fchown(&target, Some(uid), Some(gid))?;
    rustix::fs::fchmod(&target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let names = sized(|buffer| rustix::fs::flistxattr(&source, buffer))?;
    for name in names.split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        let value = match sized(|buffer| rustix::fs::fgetxattr(&source, name, buffer)) {
            // Gone meanwhile, or not for us.
            Err(error) if error.raw_os_error() == Some(libc::ENODATA) => continue,
            value => value?,
        };
        rustix::fs::fsetxattr(&target, name, &value, XattrFlags::empty())?;
    }
    Ok(rustix::fs::futimens(&target, &times(stat))?)
}

/// What a call writes whose result's length is asked for first.
fn sized(call: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    match call(&mut []) {
        Ok(0) | Err(Errno::NOTSUP) => Ok(Vec::new()),
        Ok(length) => {
            let mut buffer = vec![0; length];
            let length = call(&mut buffer)?;
            buffer.truncate(length);
            Ok(buffer)
        }
        Err(error) => Err(error.into()),
    }
}

fn owner(stat: &Stat, target: &OwnedFd, name: &CStr) -> io::Result<()> {
    let (uid, gid) = ids(stat);
    Ok(rustix::fs::chownat(target, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn ids(stat: &Stat) -> (Uid, Gid) {
    (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid))
}

fn times(stat: &Stat) -> Timestamps {
    let time =
        |seconds: i64, nanos: u64| Timespec { tv_sec: seconds, tv_nsec: i64::try_from(nanos).unwrap_or(0) };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}
