//! A tree in a container as a tar stream. The tree is hostile and may change while it is read: everything is opened relative to
//! its directory without following links, and looked at only when it is open.

use std::collections::HashMap;
use std::io::{self, BufWriter};
use std::os::fd::{AsFd, OwnedFd};

use coracle_agent_api::ErrorKind;
use coracle_agent_api::files::FilesKind;
use coracle_tarball::{Entry, EntryKind, Mtime, TarWriter};
use rustix::fs::{FileType, OFlags, Stat};

use super::super::root_dir::RootDir;
use super::{Data, Frames, MAX_DEPTH, names, open_in, permissions, stat, tar_writer, too_deep};
use crate::error::{AtStep, Result};

/// The longest extended attribute that is carried over; the kernel's own limit.
const MAX_ATTRIBUTE: usize = 64 * 1024;
/// Attributes of a container's files that mean something outside it.
const ATTRIBUTES: [&[u8]; 2] = [b"security.capability", b"user."];
/// Kinds of file systems that are the system's and not the container's files.
const SYSTEM: [u32; 6] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x1cd1,      // devpts
    0x1980_0202, // mqueue
    0x0102_1994, // tmpfs
];

/// `docker cp` from a container: what the path is, then the tree.
pub(super) fn archive(root: &RootDir, path: &str, frames: &mut Frames) -> Result<()> {
    let split = stat::split(path);
    let top = stat::find(root, path, &split)?;
    let described = stat::describe(root, path)?;
    frames.send_json(FilesKind::Stat, &described).at_kind(ErrorKind::Internal, "answer")?;
    let parent = root.find_directory(&split.parent).map_err(|error| stat::failure(path, &error))?;
    drop(top);
    let mut packer = Packer::new(frames);
    packer.pack(parent.as_fd(), &split.last, split.name, 0)?;
    packer.finish()
}

/// `docker export`: everything below the root.
pub(super) fn export(root: &RootDir, frames: &mut Frames) -> Result<()> {
    let top = open_in(root.as_fd(), b".", OFlags::RDONLY | OFlags::DIRECTORY).at("open the root")?;
    let mut packer = Packer::new(frames);
    for name in names(&top).at("read the root")? {
        packer.pack(top.as_fd(), &name, name.clone(), 1)?;
    }
    packer.finish()
}

/// Puts trees into one stream.
pub(super) struct Packer<'a> {
    writer: TarWriter<BufWriter<Data<'a>>>,
    /// The first name of each file that has several.
    linked: HashMap<(u64, u64), Vec<u8>>,
    /// The file system that the walk is on.
    device: Option<u64>,
}

impl<'a> Packer<'a> {
    pub(super) fn new(frames: &'a mut Frames) -> Self {
        Self { writer: tar_writer(frames), linked: HashMap::new(), device: None }
    }

    pub(super) fn finish(self) -> Result<()> {
        self.writer.finish().map(drop).at_kind(ErrorKind::Internal, "send the archive")
    }

    fn pack(
        &mut self,
        directory: std::os::fd::BorrowedFd<'_>,
        name: &[u8],
        path: Vec<u8>,
        depth: usize,
    ) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        let Some(opened) = self.pack_one(directory, name, &path)? else { return Ok(()) };
        let stat = rustix::fs::fstat(&opened).at("look at a directory")?;
        let entered = *self.device.get_or_insert(stat.st_dev) != stat.st_dev;
        if entered && is_system(&opened) {
            return Ok(());
        }
        let prefix = if path == b"/" { path } else { [path.as_slice(), b"/"].concat() };
        for name in names(&opened).at("read a directory")? {
            self.pack(opened.as_fd(), &name, [prefix.as_slice(), &name].concat(), depth + 1)?;
        }
        Ok(())
    }

    /// Puts one thing into the stream; gives it back, opened, if it is a directory. What has gone meanwhile is left out.
    pub(super) fn pack_one(
        &mut self,
        directory: std::os::fd::BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<Option<OwnedFd>> {
        let shown = || format!("read {}", String::from_utf8_lossy(path));
        let handle = match open_in(directory, name, OFlags::PATH) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            handle => handle.at(shown())?,
        };
        let stat = rustix::fs::fstat(&handle).at(shown())?;
        let mut entry = entry(path, &stat);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let opened = open_in(&handle, b".", OFlags::RDONLY | OFlags::DIRECTORY).at(shown())?;
                if !path.ends_with(b"/") {
                    entry.path.push(b'/');
                }
                entry.xattrs = attributes(&opened);
                self.append(&entry, io::empty())?;
                return Ok(Some(opened));
            }
            FileType::RegularFile => {
                if stat.st_nlink > 1 {
                    match self.linked.get(&(stat.st_dev, stat.st_ino)) {
                        Some(first) => {
                            entry.kind = EntryKind::HardLink;
                            entry.link.clone_from(first);
                            self.append(&entry, io::empty())?;
                            return Ok(None);
                        }
                        None => drop(self.linked.insert((stat.st_dev, stat.st_ino), path.to_vec())),
                    }
                }
                let opened = open_in(directory, name, OFlags::RDONLY | OFlags::NONBLOCK).at(shown())?;
                let now = rustix::fs::fstat(&opened).at(shown())?;
                if (now.st_dev, now.st_ino) != (stat.st_dev, stat.st_ino) {
                    // It was replaced in this moment, by something that was not looked at.
                    return Ok(None);
                }
                entry.xattrs = attributes(&opened);
                entry.size = u64::try_from(stat.st_size).unwrap_or(0);
                self.append(&entry, std::fs::File::from(opened))?;
            }
            FileType::Symlink => {
                entry.kind = EntryKind::Symlink;
                entry.link = rustix::fs::readlinkat(&handle, "", Vec::new()).at(shown())?.into_bytes();
                self.append(&entry, io::empty())?;
            }
            kind @ (FileType::CharacterDevice | FileType::BlockDevice) => {
                let is_character = kind == FileType::CharacterDevice;
                entry.kind = if is_character { EntryKind::CharDevice } else { EntryKind::BlockDevice };
                entry.device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
                self.append(&entry, io::empty())?;
            }
            FileType::Fifo => {
                entry.kind = EntryKind::Fifo;
                self.append(&entry, io::empty())?;
            }
            // Sockets cannot be carried.
            _ => {}
        }
        Ok(None)
    }

    /// Puts the mark of a deleted file into a layer's stream.
    pub(super) fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => path.split_at(at + 1),
            None => (b"".as_slice(), path),
        };
        let path = [parent, b".wh.", name].concat();
        let entry = Entry { path, ..empty_entry() };
        self.append(&entry, io::empty())
    }

    fn append(&mut self, entry: &Entry, data: impl io::Read) -> Result<()> {
        let shown = || format!("send {}", String::from_utf8_lossy(&entry.path));
        self.writer.append(entry, data).at_kind(ErrorKind::Internal, shown())
    }
}

fn is_system(directory: &OwnedFd) -> bool {
    rustix::fs::fstatfs(directory).is_ok_and(|stat| SYSTEM.contains(&(stat.f_type as u32)))
}

fn empty_entry() -> Entry {
    Entry {
        path: Vec::new(),
        link: Vec::new(),
        kind: EntryKind::Regular,
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: Mtime::default(),
        device: (0, 0),
        size: 0,
        xattrs: Vec::new(),
        sparse: None,
    }
}

fn entry(path: &[u8], stat: &Stat) -> Entry {
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    Entry {
        path: path.to_vec(),
        kind: if is_directory { EntryKind::Directory } else { EntryKind::Regular },
        mode: permissions(stat.st_mode),
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: Mtime { seconds: stat.st_mtime, nanoseconds: 0 },
        ..empty_entry()
    }
}

/// The attributes that are carried over; a file system without any has none.
fn attributes(file: &OwnedFd) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0; MAX_ATTRIBUTE];
    let Ok(len) = rustix::fs::flistxattr(file, list.as_mut_slice()) else { return Vec::new() };
    let wanted = |name: &&[u8]| ATTRIBUTES.iter().any(|prefix| name.starts_with(prefix));
    let mut found = Vec::new();
    for name in list[..len].split(|byte| *byte == 0).filter(wanted) {
        let mut value = vec![0; MAX_ATTRIBUTE];
        if let Ok(len) = rustix::fs::fgetxattr(file, name, value.as_mut_slice()) {
            value.truncate(len);
            found.push((name.to_vec(), value));
        }
    }
    found
}
