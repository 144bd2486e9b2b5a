//! Reading directories. Positions are the host's own (`d_off`), so that they stay good while entries come and go.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::table::{Handle, ROOT, lock};
use super::{Exported, sys};

/// How much of a directory is read at once, in bytes.
const CHUNK: usize = 16 * 1024;

/// What was read and not yet given to the guest.
#[derive(Debug, Default)]
pub(super) struct Stream {
    entries: VecDeque<Item>,
    /// The position of the first of them.
    position: u64,
}

#[derive(Debug)]
struct Item {
    name: CString,
    inode: u64,
    kind: FileType,
    /// The position after it.
    next: u64,
}

impl Stream {
    /// Goes to a position that the guest names. One that makes no sense gives some entries or an error, by the host's file system.
    fn go_to(&mut self, handle: &Handle, position: u64) -> io::Result<()> {
        if position == self.position && position != 0 {
            return Ok(());
        }
        self.entries.clear();
        rustix::fs::seek(handle, SeekFrom::Start(position))?;
        self.position = position;
        Ok(())
    }

    fn fill(&mut self, handle: &Handle) -> io::Result<()> {
        let mut buffer = vec![MaybeUninit::uninit(); CHUNK];
        let mut raw = RawDir::new(handle, &mut buffer);
        while let Some(entry) = raw.next() {
            let entry = entry?;
            self.entries.push_back(Item {
                name: entry.file_name().to_owned(),
                inode: entry.ino(),
                kind: entry.file_type(),
                next: entry.next_entry_cookie(),
            });
            if raw.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

fn kind_number(kind: FileType) -> u32 {
    u32::from(match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        _ => libc::DT_UNKNOWN,
    })
}

fn is_dot(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// Gives an entry to the guest; nothing given means that there is no room for it.
pub(super) type Give<'a> = dyn FnMut(DirEntry<'_>, Option<Entry>) -> io::Result<usize> + 'a;

impl Exported {
    pub(super) fn open_directory(&self, id: u64) -> io::Result<u64> {
        if id == ROOT {
            return Ok(0);
        }
        let node = self.tables.node(id)?;
        let slot = self.tables.slot()?;
        let fd = self.directory(&node)?;
        let file =
            self.with_room(|| sys::reopen(self.proc, fd.as_fd(), OFlags::RDONLY | OFlags::DIRECTORY))?;
        Ok(self.tables.add_handle(&node, file, slot))
    }

    /// Lists a directory from a position on, with what a look-up of each entry would give if `plus`.
    pub(super) fn list(
        &self,
        id: u64,
        handle: u64,
        position: u64,
        plus: bool,
        give: &mut Give<'_>,
    ) -> io::Result<()> {
        if id == ROOT {
            // Grants are found by their names alone: who can mount the file system in the machine does not learn those of others.
            return Ok(());
        }
        let handle = self.tables.handle(handle, id)?;
        if handle.node.kind != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let mut stream = lock(&handle.stream);
        stream.go_to(&handle, position)?;
        let mut given = false;
        loop {
            if stream.entries.is_empty() {
                match stream.fill(&handle) {
                    // The guest gets what it has got, whose look-ups were counted; the error comes again.
                    Err(_) if given => return Ok(()),
                    result => result?,
                }
            }
            let Some(item) = stream.entries.front() else { return Ok(()) };
            match self.give_item(&handle, item, plus, give) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // As above.
                Err(_) if given => return Ok(()),
                Err(error) => return Err(error),
            }
            given = true;
            stream.position = item.next;
            stream.entries.pop_front();
        }
    }

    fn give_item(&self, handle: &Handle, item: &Item, plus: bool, give: &mut Give<'_>) -> io::Result<usize> {
        let mut shown = DirEntry {
            ino: self.tables.shown_inode_beside(handle.node.key, item.inode),
            offset: item.next,
            type_: kind_number(item.kind),
            name: item.name.to_bytes(),
        };
        if is_dot(&item.name) || !plus {
            return give(shown, plus.then(Entry::default));
        }
        match self.find_in(&handle.node, handle.as_fd(), &item.name) {
            Ok(entry) => {
                // What is kept of special files, and device numbers, are known now.
                shown.ino = entry.attr.st_ino;
                shown.type_ = (entry.attr.st_mode & libc::S_IFMT) >> 12;
                let given = give(shown, Some(entry));
                if !matches!(given, Ok(1..)) {
                    self.forget_node(entry.inode, 1);
                }
                given
            }
            // It is gone since, or cannot be looked at: it is listed without more.
            Err(_) => give(shown, Some(Entry::default())),
        }
    }

    pub(super) fn sync_directory(&self, id: u64, handle: u64) -> io::Result<()> {
        if id == ROOT {
            return Ok(());
        }
        Ok(rustix::fs::fsync(&*self.tables.handle(handle, id)?)?)
    }
}
