//! Open files: reading, writing, and what else is done with their content.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fuse_backend_rs::api::filesystem::{Context, Entry, OpenOptions, ZeroCopyReader, ZeroCopyWriter};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::owners::Version;
use super::resolve::component;
use super::slots::Slot;
use super::sys::{self, Transfer};
use super::table::{Node, ROOT};
use super::{Exported, create::Parent};

/// What comes with a request to make and open a file.
pub(super) struct Create {
    /// `open(2)` flags.
    pub(super) flags: u32,
    pub(super) mode: u32,
    pub(super) kill_set_id: bool,
}

impl Exported {
    pub(super) fn open_node(&self, id: u64, flags: u32, kill_set_id: bool) -> io::Result<(u64, OpenOptions)> {
        if id == ROOT {
            return Err(Errno::ISDIR.into());
        }
        let node = self.tables.node(id)?;
        let slot = self.tables.slot()?;
        let fd = self.fd(&node)?;
        self.open_found(&node, fd.as_fd(), flags, kill_set_id, slot)
    }

    /// Opens the node's file, to which `fd` leads.
    fn open_found(
        &self,
        node: &std::sync::Arc<Node>,
        fd: BorrowedFd<'_>,
        flags: u32,
        kill_set_id: bool,
        slot: Slot,
    ) -> io::Result<(u64, OpenOptions)> {
        let flags = host_flags(flags)?;
        let changes = flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC);
        if changes && !node.is_writable() {
            return Err(Errno::ROFS.into());
        }
        let file = self.open_regular(node, fd, flags)?;
        let status = sys::status(file.as_fd(), c"")?;
        if kill_set_id && flags.contains(OFlags::TRUNC) {
            self.kill_set_id(node, file.as_fd())?;
        }
        let version = Version::of(&status);
        let same = node.told().is_some_and(|told| version.is_same_as(&told));
        if !same {
            node.tell(version);
        }
        let options = if same { OpenOptions::KEEP_CACHE } else { OpenOptions::empty() };
        Ok((self.tables.add_handle(node, file, slot), options))
    }

    /// Opens a regular file to which `fd` leads.
    pub(super) fn open_regular(&self, node: &Node, fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR.into()),
            FileType::Symlink => return Err(Errno::LOOP.into()),
            _ => return Err(Errno::NXIO.into()),
        }
        match self.with_room(|| sys::reopen(self.proc, fd, flags)) {
            Err(Errno::ACCESS) => {
                self.take_over(node, fd)?;
                Ok(self.with_room(|| sys::reopen(self.proc, fd, flags))?)
            }
            result => Ok(result?),
        }
    }

    /// A file of the server's user that he may not read or write himself: inside it keeps its mode, outside he may from now on.
    fn take_over(&self, node: &Node, fd: BorrowedFd<'_>) -> io::Result<()> {
        let status = sys::status(fd, c"")?;
        let (shown, record) = self.shown(node.owners, fd, c"", &status);
        let mode = u32::from(status.stx_mode);
        let lacks = mode & 0o600 != 0o600;
        if node.owners == crate::control::Owners::Real
            || status.stx_uid != self.identity.uid
            || !lacks
            || !node.is_writable()
        {
            return Err(Errno::ACCESS.into());
        }
        let ceiling = record.map_or(mode & 0o077, |record| record.ceiling);
        self.keep(node.owners, fd, &status, shown, ceiling, record.is_some())
    }

    pub(super) fn create_and_open(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        create: &Create,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let parent = self.parent(parent)?;
        let slot = self.tables.slot()?;
        let name = component(name)?;
        let flags = host_flags(create.flags)?;
        let mode = libc::S_IFREG | (create.mode & 0o7777);
        let file = match self.create_file(&parent, name, mode, flags & OFlags::ACCMODE) {
            Ok(file) => file,
            Err(Errno::EXIST) if create.flags & libc::O_EXCL as u32 == 0 => {
                return self.open_existing(&parent, name, create, slot);
            }
            Err(errno) => return Err(errno.into()),
        };
        if let Err(error) = self.own_new(context, &parent, file.as_fd(), mode, 0) {
            let _ = rustix::fs::unlinkat(&parent.fd, name, rustix::fs::AtFlags::empty());
            return Err(error);
        }
        let status = sys::status(file.as_fd(), c"")?;
        let (shown, _) = self.shown(parent.node.owners, file.as_fd(), c"", &status);
        let node = self.tables.look_up(&parent.node, name, &status);
        let entry = self.entry(&node, &status, shown);
        Ok((entry, self.tables.add_handle(&node, file, slot), OpenOptions::KEEP_CACHE))
    }

    /// Opens a file that was there after all.
    fn open_existing(
        &self,
        parent: &Parent,
        name: &CStr,
        create: &Create,
        slot: Slot,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.with_room(|| rustix::fs::openat(&parent.fd, name, flags, Mode::empty()))?;
        let status = sys::status(fd.as_fd(), c"")?;
        let node = self.tables.look_up(&parent.node, name, &status);
        let opened =
            self.open_found(&node, fd.as_fd(), create.flags, create.kill_set_id, slot).and_then(|opened| {
                let status = sys::status(fd.as_fd(), c"")?;
                let (shown, _) = self.shown(node.owners, fd.as_fd(), c"", &status);
                Ok((self.entry(&node, &status, shown), opened.0, opened.1))
            });
        if opened.is_err() {
            self.forget_node(node.id, 1);
        }
        opened
    }

    pub(super) fn read_file(
        &self,
        id: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        let handle = self.tables.handle(handle, id)?;
        to.write_from(&mut Transfer::new(handle.as_fd()), size as usize, offset)
    }

    pub(super) fn write_file(
        &self,
        id: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        how: Write,
    ) -> io::Result<usize> {
        let handle = self.tables.handle(handle, id)?;
        if !handle.node.is_writable() {
            return Err(Errno::ROFS.into());
        }
        let mut transfer =
            if how.append { Transfer::appending(handle.as_fd()) } else { Transfer::new(handle.as_fd()) };
        let mut written = 0;
        while written < size as usize {
            let at = offset.checked_add(written as u64).ok_or(Errno::FBIG)?;
            match from.read_to(&mut transfer, size as usize - written, at) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What was written stays so; the error comes again with the rest.
                Err(_) if written > 0 => break,
                Err(error) => return Err(error),
            }
        }
        if how.kill_set_id {
            self.kill_set_id(&handle.node, handle.as_fd())?;
        }
        Ok(written)
    }

    pub(super) fn sync_file(&self, id: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.tables.handle(handle, id)?;
        Ok(if data_only { rustix::fs::fdatasync(&*handle) } else { rustix::fs::fsync(&*handle) }?)
    }

    pub(super) fn allocate(&self, id: u64, handle: u64, mode: u32, offset: u64, len: u64) -> io::Result<()> {
        let handle = self.tables.handle(handle, id)?;
        if !handle.node.is_writable() {
            return Err(Errno::ROFS.into());
        }
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode =
            FallocateFlags::from_bits(mode).filter(|mode| known.contains(*mode)).ok_or(Errno::OPNOTSUPP)?;
        Ok(rustix::fs::fallocate(&*handle, mode, offset, len)?)
    }

    pub(super) fn seek_file(&self, id: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let handle = self.tables.handle(handle, id)?;
        let to = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(rustix::fs::seek(&*handle, to)?)
    }
}

/// How to write.
#[derive(Debug, Clone, Copy)]
pub(super) struct Write {
    /// To wherever the file's end is.
    pub(super) append: bool,
    /// The writer has no privileges.
    pub(super) kill_set_id: bool,
}

/// The flags to open a file on the host with. `O_APPEND` is a matter of each write, `O_DIRECT` of the guest's cache, and a guest's kernel that
/// wants `O_SYNC` syncs.
fn host_flags(flags: u32) -> io::Result<OFlags> {
    let flags = OFlags::from_bits_retain(flags);
    let access = flags & OFlags::ACCMODE;
    if access == OFlags::ACCMODE {
        return Err(Errno::INVAL.into());
    }
    Ok(access | flags & OFlags::TRUNC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_access_and_truncation_reach_the_host() {
        let flags = |flags: i32| host_flags(flags as u32).map(|flags| flags.bits() as i32).ok();
        assert_eq!(flags(libc::O_RDWR | libc::O_APPEND | libc::O_DIRECT | libc::O_PATH), Some(libc::O_RDWR));
        assert_eq!(
            flags(libc::O_WRONLY | libc::O_TRUNC | libc::O_CREAT),
            Some(libc::O_WRONLY | libc::O_TRUNC)
        );
        assert_eq!(flags(libc::O_RDWR | libc::O_WRONLY), None);
    }
}
