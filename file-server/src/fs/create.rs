//! What makes, moves and removes names.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Statx, Uid};
use rustix::io::Errno;

use crate::control::Owners;

use super::owners::{self, Shown};
use super::resolve::component;
use super::table::{Node, ROOT};
use super::{Exported, sys};

/// A directory in which names may be changed.
pub(super) struct Parent {
    pub(super) node: Arc<Node>,
    pub(super) fd: Arc<OwnedFd>,
}

impl Exported {
    pub(super) fn parent(&self, id: u64) -> io::Result<Parent> {
        if id == ROOT {
            return Err(Errno::ROFS.into());
        }
        let node = self.tables.node(id)?;
        let fd = self.directory(&node)?;
        if !node.is_writable() {
            return Err(Errno::ROFS.into());
        }
        Ok(Parent { node, fd })
    }

    pub(super) fn make_directory(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
    ) -> io::Result<Entry> {
        let parent = self.parent(parent)?;
        let name = component(name)?;
        let mode = libc::S_IFDIR | (mode & 0o7777);
        rustix::fs::mkdirat(&parent.fd, name, self.first_mode(parent.node.owners, mode))?;
        let flags = OFlags::DIRECTORY;
        self.finish_new(context, &parent, name, mode, 0, flags)
    }

    pub(super) fn make_node(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
    ) -> io::Result<Entry> {
        let parent = self.parent(parent)?;
        let name = component(name)?;
        let kind = FileType::from_raw_mode(mode);
        let real = parent.node.owners == Owners::Real;
        match kind {
            FileType::RegularFile => {}
            FileType::Fifo | FileType::Socket if real => {
                rustix::fs::mknodat(&parent.fd, name, kind, self.first_mode(parent.node.owners, mode), 0)?;
                return self.finish_new(context, &parent, name, mode, 0, OFlags::empty());
            }
            // A device of the guest's must not become one of the host's.
            FileType::CharacterDevice | FileType::BlockDevice if real => return Err(Errno::PERM.into()),
            FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice => {}
            _ => return Err(Errno::INVAL.into()),
        }
        drop(self.create_file(&parent, name, mode, OFlags::WRONLY)?);
        self.finish_new(context, &parent, name, mode, rdev, OFlags::empty())
    }

    /// Makes a regular file that was not there and opens it.
    pub(super) fn create_file(
        &self,
        parent: &Parent,
        name: &CStr,
        mode: u32,
        access: OFlags,
    ) -> Result<OwnedFd, Errno> {
        let flags =
            access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        let mode = self.first_mode(parent.node.owners, mode);
        self.with_room(|| rustix::fs::openat(&parent.fd, name, flags, mode))
    }

    /// The mode to make a file with: never more than it will have in the end.
    fn first_mode(&self, owners: Owners, mode: u32) -> Mode {
        Mode::from_raw_mode(match owners {
            Owners::Real => mode & 0o700,
            Owners::Kept { .. } => owners::outside(mode, owners::ceiling_of_new(&self.identity)),
        })
    }

    /// Gives a file that was made just now its owner and mode, and looks it up.
    fn finish_new(
        &self,
        context: &Context,
        parent: &Parent,
        name: &CStr,
        mode: u32,
        rdev: u32,
        flags: OFlags,
    ) -> io::Result<Entry> {
        let flags = flags | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let finished = self
            .with_room(|| rustix::fs::openat(&parent.fd, name, flags, Mode::empty()))
            .map_err(io::Error::from)
            .and_then(|fd| self.own_new(context, parent, fd.as_fd(), mode, rdev));
        if let Err(error) = finished {
            // What could not be finished must not stay behind half made. If it is gone already, so much the better.
            let flags =
                if mode & libc::S_IFMT == libc::S_IFDIR { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let _ = rustix::fs::unlinkat(&parent.fd, name, flags);
            return Err(error);
        }
        self.find_in(&parent.node, parent.fd.as_fd(), name)
    }

    /// Gives a file that was made just now its owner and mode.
    pub(super) fn own_new(
        &self,
        context: &Context,
        parent: &Parent,
        fd: BorrowedFd<'_>,
        mode: u32,
        rdev: u32,
    ) -> io::Result<()> {
        let status = sys::status(fd, c"")?;
        let above = sys::status(parent.fd.as_fd(), c"")?;
        let (above, _) = self.shown(parent.node.owners, parent.fd.as_fd(), c"", &above);
        let (gid, mode) = inherit(context, &above, mode);
        match parent.node.owners {
            Owners::Real => self.own_new_real(fd, &status, context.uid, gid, mode),
            Owners::Kept { .. } => {
                let wanted = Shown { uid: context.uid, gid, mode, rdev };
                self.own_new_kept(parent.node.owners, fd, &status, wanted)
            }
        }
    }

    fn own_new_real(
        &self,
        fd: BorrowedFd<'_>,
        status: &Statx,
        uid: u32,
        gid: u32,
        mode: u32,
    ) -> io::Result<()> {
        if (status.stx_uid, status.stx_gid) != (uid, gid) {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if sys::kind(status) != FileType::Symlink && u32::from(status.stx_mode) != mode {
            self.set_host_mode(sys::kind(status), fd, mode)?;
        }
        Ok(())
    }

    fn own_new_kept(
        &self,
        owners: Owners,
        fd: BorrowedFd<'_>,
        status: &Statx,
        wanted: Shown,
    ) -> io::Result<()> {
        if !owners::can_have_record(sys::kind(status)) {
            return Ok(());
        }
        let ceiling = owners::ceiling_of_new(&self.identity);
        // A later change inside may give what this mode lacks: that takes a record.
        let narrow = owners::outside(wanted.mode | 0o066, ceiling) != owners::outside(wanted.mode, ceiling);
        let plain = owners::shown(owners, &self.identity, status, None);
        match self.keep(owners, fd, status, wanted, ceiling, narrow) {
            // Where nothing can be kept, files are shown as their owner's, as anybody's would be; but a device is no file.
            Err(error)
                if error.raw_os_error() == Some(libc::EPERM)
                    && plain.mode & libc::S_IFMT == wanted.mode & libc::S_IFMT =>
            {
                Ok(())
            }
            result => result,
        }
    }

    pub(super) fn make_symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        let parent = self.parent(parent)?;
        let name = component(name)?;
        rustix::fs::symlinkat(target, &parent.fd, name)?;
        self.finish_new(context, &parent, name, libc::S_IFLNK | 0o777, 0, OFlags::empty())
    }

    pub(super) fn read_symlink(&self, id: u64) -> io::Result<Vec<u8>> {
        let node = self.tables.node(id)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL.into());
        }
        let fd = self.fd(&node)?;
        Ok(rustix::fs::readlinkat(&fd, c"", Vec::new())?.into_bytes())
    }

    pub(super) fn make_link(&self, id: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let node = self.tables.node(id)?;
        let parent = self.parent(parent)?;
        let name = component(name)?;
        if !node.shares_writable_grant(&parent.node) {
            return Err(Errno::XDEV.into());
        }
        let fd = self.fd(&node)?;
        rustix::fs::linkat(CWD, self.proc.path(fd.as_fd()), &parent.fd, name, AtFlags::SYMLINK_FOLLOW)?;
        self.find_in(&parent.node, parent.fd.as_fd(), name)
    }

    pub(super) fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        let parent = self.parent(parent)?;
        Ok(rustix::fs::unlinkat(&parent.fd, component(name)?, flags)?)
    }

    pub(super) fn move_name(
        &self,
        (old_parent, old_name): (u64, &CStr),
        (new_parent, new_name): (u64, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        let (old, new) = (self.parent(old_parent)?, self.parent(new_parent)?);
        let (old_name, new_name) = (component(old_name)?, component(new_name)?);
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        // Only these two: whiteouts are device nodes.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL.into());
        }
        if !old.node.shares_writable_grant(&new.node) {
            return Err(Errno::XDEV.into());
        }
        if flags.is_empty() {
            rustix::fs::renameat(&old.fd, old_name, &new.fd, new_name)?;
        } else {
            rustix::fs::renameat_with(&old.fd, old_name, &new.fd, new_name, flags)?;
        }
        self.moved(&new.node, new.fd.as_fd(), new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.moved(&old.node, old.fd.as_fd(), old_name);
        }
        Ok(())
    }
}

/// Group and mode of a new file: a directory with the set-group-id bit gives its own.
fn inherit(context: &Context, above: &Shown, mode: u32) -> (u32, u32) {
    if above.mode & libc::S_ISGID == 0 {
        return (context.gid, mode);
    }
    let bit = if mode & libc::S_IFMT == libc::S_IFDIR { libc::S_ISGID } else { 0 };
    (above.gid, mode | bit)
}
