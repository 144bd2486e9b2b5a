//! Unpacks a tar stream into a directory of a container, by Docker's rules. The stream is hostile, and so is what is in the
//! container: every place is resolved within the container's root, and nothing is made through a link at its end. What the
//! stream may fill is bounded by the disk alone; a file that does not fit is taken away again.

use std::ffi::OsStr;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use coracle_agent_api::{ApiError, ErrorKind};
use coracle_tarball::{Entry, EntryKind, TarError, TarStream};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::super::identity::Identity;
use super::super::root_dir::{Kind, RootDir};
use super::{MAX_DEPTH, names, open_in, stat, too_deep};
use crate::error::{AtStep, Result, from_io, invalid};

/// What the client wants.
pub(super) struct Wanted<'a> {
    pub path: &'a str,
    /// Refuse to replace a directory by something else, and the reverse.
    pub keep_kinds: bool,
    /// Whose everything becomes, instead of the stream's owners.
    pub owner: Option<&'a str>,
}

/// Unpacks.
pub(super) fn unpack(root: &RootDir, wanted: &Wanted<'_>, input: std::fs::File) -> Result<()> {
    // A link at the end counts as what it leads to.
    let target = root.find(wanted.path).map_err(|error| stat::failure(wanted.path, &error))?;
    let found = rustix::fs::fstat(&target).map_err(|error| stat::failure(wanted.path, &error.into()))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
        return Err(invalid("extraction point is not a directory"));
    }
    let owner = match wanted.owner.filter(|user| !user.is_empty()) {
        Some(user) => Some(Identity::look_up(root, user, &[]).map(|who| (who.uid, who.gid))?),
        None => None,
    };
    let mut unpacker = Unpacker { root, wanted, owner, directories: Vec::new() };
    let mut stream = TarStream::new(std::io::BufReader::with_capacity(64 * 1024, input));
    while let Some(entry) = stream.next_entry().map_err(bad_stream)? {
        unpacker.unpack(&entry, &mut stream)?;
    }
    // What a client sends behind the end is taken, so that it can finish.
    stream.drain().map_err(bad_stream)?;
    unpacker.finish()
}

fn bad_stream(error: TarError) -> ApiError {
    let kind = if matches!(error, TarError::Read(_)) { ErrorKind::Internal } else { ErrorKind::Invalid };
    ApiError::new(kind, format!("the archive cannot be unpacked: {error}"))
}

struct Unpacker<'a> {
    root: &'a RootDir,
    wanted: &'a Wanted<'a>,
    owner: Option<(u32, u32)>,
    /// Directories and their times, which are set when nothing is put into them any more.
    directories: Vec<(PathBuf, Timestamps)>,
}

impl Unpacker<'_> {
    fn unpack(&mut self, entry: &Entry, data: &mut impl Read) -> Result<()> {
        let Some(place) = self.place(&entry.path)? else { return Ok(()) };
        let shown = || format!("unpack {}", String::from_utf8_lossy(&entry.path));
        let (Some(above), Some(name)) = (place.parent(), place.file_name()) else { return Ok(()) };
        let parent = self.root.find_or_make(above, Kind::Directory).map_err(|error| {
            let kind = if error.raw_os_error() == Some(libc::ENOTDIR) {
                ErrorKind::Invalid
            } else {
                ErrorKind::Internal
            };
            from_io(kind, shown(), &error)
        })?;
        let parent =
            open_in(&parent, b".", OFlags::PATH | OFlags::DIRECTORY).at_kind(ErrorKind::Invalid, shown())?;
        let name = Path::new(name);
        self.make_way(&parent, name, &place, entry)?;
        let made = self.make(&parent, name, entry, data);
        made.map_err(|error| from_io(ErrorKind::Internal, shown(), &error))?;
        if entry.kind == EntryKind::Directory {
            self.directories.push((place, times(entry)));
        }
        Ok(())
    }

    /// The path in the container that an entry's name means; `None` for the directory itself.
    fn place(&self, name: &[u8]) -> Result<Option<PathBuf>> {
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in name.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." if parts.pop().is_none() => {
                    let shown = String::from_utf8_lossy(name).into_owned();
                    return Err(invalid(format!("{shown:?} is outside of {:?}", self.wanted.path)));
                }
                b".." => {}
                part if part.contains(&0) => {
                    return Err(invalid("a name in the archive has a zero byte in it"));
                }
                part => parts.push(part),
            }
        }
        if parts.len() > MAX_DEPTH {
            return Err(too_deep());
        }
        let base = Path::new(self.wanted.path);
        Ok((!parts.is_empty()).then(|| base.join(OsStr::from_bytes(&parts.join(&b'/')))))
    }

    /// Takes away what is in an entry's place, unless both are directories.
    fn make_way(&self, parent: &OwnedFd, name: &Path, place: &Path, entry: &Entry) -> Result<()> {
        let step = || format!("replace {}", place.display());
        let existing = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            existing => existing.at_kind(ErrorKind::Internal, step())?,
        };
        let is_directory = FileType::from_raw_mode(existing.st_mode) == FileType::Directory;
        let comes = entry.kind == EntryKind::Directory;
        let (path, into) = (place.display(), self.wanted.path);
        match (is_directory, comes) {
            (true, true) => return Ok(()),
            (true, false) if self.wanted.keep_kinds => {
                return Err(invalid(format!(
                    "cannot overwrite directory \"{path}\" with non-directory \"{into}\""
                )));
            }
            (false, true) if self.wanted.keep_kinds => {
                return Err(invalid(format!(
                    "cannot overwrite non-directory \"{path}\" with directory \"{into}\""
                )));
            }
            _ => {}
        }
        remove(parent.as_fd(), name, 0).at_kind(ErrorKind::Internal, step())
    }

    fn make(
        &self,
        parent: &OwnedFd,
        name: &Path,
        entry: &Entry,
        data: &mut impl Read,
    ) -> std::io::Result<()> {
        match entry.kind {
            EntryKind::Regular => self.make_file(parent, name, entry, data),
            EntryKind::Directory => {
                match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
                    Err(Errno::EXIST) => {}
                    made => made?,
                }
                let bytes = name.as_os_str().as_bytes();
                let opened = open_in(parent, bytes, OFlags::RDONLY | OFlags::DIRECTORY)?;
                self.dress(&opened, entry)
            }
            EntryKind::Symlink => {
                rustix::fs::symlinkat(entry.link.as_slice(), parent, name)?;
                self.dress_link(parent, name, entry)
            }
            EntryKind::HardLink => {
                let (directory, target) = self.link_target(&entry.link)?;
                Ok(rustix::fs::linkat(directory, target.as_slice(), parent, name, AtFlags::empty())?)
            }
            EntryKind::Fifo => self.make_node(parent, name, entry, FileType::Fifo),
            EntryKind::CharDevice => self.make_node(parent, name, entry, FileType::CharacterDevice),
            EntryKind::BlockDevice => self.make_node(parent, name, entry, FileType::BlockDevice),
            EntryKind::Other(flag) => Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                format!("unhandled tar header type {flag}"),
            )),
        }
    }

    fn make_file(
        &self,
        parent: &OwnedFd,
        name: &Path,
        entry: &Entry,
        data: &mut impl Read,
    ) -> std::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = std::fs::File::from(file);
        if let Err(error) = fill(&mut file, entry, data) {
            // Half a file helps no one, least of all a full disk.
            let _ = rustix::fs::unlinkat(parent, name, AtFlags::empty());
            return Err(error);
        }
        let file = OwnedFd::from(file);
        self.dress(&file, entry)?;
        Ok(rustix::fs::futimens(&file, &times(entry))?)
    }

    fn make_node(&self, parent: &OwnedFd, name: &Path, entry: &Entry, kind: FileType) -> std::io::Result<()> {
        let device = rustix::fs::makedev(entry.device.0, entry.device.1);
        rustix::fs::mknodat(parent, name, kind, Mode::from_raw_mode(entry.mode.into()), device)?;
        self.dress_link(parent, name, entry)
    }

    /// Gives an open file or directory its owner, attributes and mode, in this order: a change of owner takes the others away.
    fn dress(&self, file: &OwnedFd, entry: &Entry) -> std::io::Result<()> {
        let (uid, gid) = self.owner_of(entry);
        rustix::fs::fchown(file, Some(uid), Some(gid))?;
        for (name, value) in &entry.xattrs {
            match rustix::fs::fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
                // What this file system or this place does not take.
                Err(Errno::OPNOTSUPP | Errno::PERM) => {}
                set => set?,
            }
        }
        Ok(rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode.into()))?)
    }

    /// The same for what is not opened: links, pipes, devices.
    fn dress_link(&self, parent: &OwnedFd, name: &Path, entry: &Entry) -> std::io::Result<()> {
        let (uid, gid) = self.owner_of(entry);
        rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(rustix::fs::utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn owner_of(&self, entry: &Entry) -> (Uid, Gid) {
        let (uid, gid) = self.owner.unwrap_or((entry.uid, entry.gid));
        (Uid::from_raw(uid), Gid::from_raw(gid))
    }

    /// Where another name of a file is, which counts from the directory that is unpacked into.
    fn link_target(&self, name: &[u8]) -> std::io::Result<(OwnedFd, Vec<u8>)> {
        let outside = |error: ApiError| std::io::Error::new(std::io::ErrorKind::InvalidInput, error.message);
        let place = self.place(name).map_err(outside)?.ok_or(std::io::ErrorKind::InvalidInput)?;
        let parent = self.root.find_directory(place.parent().unwrap_or(Path::new("/")))?;
        let name = place.file_name().unwrap_or_default();
        Ok((parent, name.as_bytes().to_vec()))
    }

    fn finish(self) -> Result<()> {
        for (path, times) in self.directories.iter().rev() {
            // One that is gone meanwhile needs no times.
            if let Ok(directory) = self.root.find_directory(path)
                && let Ok(opened) = open_in(&directory, b".", OFlags::RDONLY | OFlags::DIRECTORY)
            {
                let _ = rustix::fs::futimens(opened, times);
            }
        }
        Ok(())
    }
}

fn fill(file: &mut std::fs::File, entry: &Entry, data: &mut impl Read) -> std::io::Result<()> {
    let Some(map) = &entry.sparse else {
        std::io::copy(data, file)?;
        return Ok(());
    };
    for (offset, length) in &map.ranges {
        file.seek(SeekFrom::Start(*offset))?;
        std::io::copy(&mut data.take(*length), file)?;
    }
    file.set_len(map.real_size)?;
    file.flush()
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec { tv_sec: entry.mtime.seconds, tv_nsec: i64::from(entry.mtime.nanoseconds) };
    Timestamps { last_access: time, last_modification: time }
}

/// Removes a tree without following links.
fn remove(parent: BorrowedFd<'_>, name: &Path, depth: usize) -> std::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        result => return Ok(result?),
    }
    if depth > MAX_DEPTH {
        return Err(std::io::Error::other("the tree is too deep"));
    }
    let opened = open_in(parent, name.as_os_str().as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY)?;
    for child in names(&opened)? {
        remove(opened.as_fd(), Path::new(OsStr::from_bytes(&child)), depth + 1)?;
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}
