//! Status of files: what the guest is told, and what it changes.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Entry, SetattrValid};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Statx, StatxTimestamp, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::control::Owners;

use super::owners::{self, Record, Shown, Version};
use super::table::{Handle, Key, Node, ROOT};
use super::{Exported, VALID, sys};

impl Exported {
    /// What the guest is told of a file it has looked up.
    pub(super) fn entry(&self, node: &Node, status: &Statx, shown: Shown) -> Entry {
        node.tell(Version::of(status));
        Entry {
            inode: node.id,
            attr: self.attributes(status, shown),
            attr_timeout: VALID,
            entry_timeout: VALID,
            ..Entry::default()
        }
    }

    /// A file's status as the guest sees it.
    pub(super) fn attributes(&self, status: &Statx, shown: Shown) -> stat64 {
        let seconds = |time: StatxTimestamp| (time.tv_sec, i64::from(time.tv_nsec));
        let mut attributes = Entry::default().attr;
        attributes.st_ino = self.tables.shown_inode(Key::from(status));
        attributes.st_size = i64::try_from(status.stx_size).unwrap_or(i64::MAX);
        attributes.st_blocks = i64::try_from(status.stx_blocks).unwrap_or(i64::MAX);
        attributes.st_blksize = status.stx_blksize.into();
        attributes.st_nlink = status.stx_nlink.into();
        (attributes.st_atime, attributes.st_atime_nsec) = seconds(status.stx_atime);
        (attributes.st_mtime, attributes.st_mtime_nsec) = seconds(status.stx_mtime);
        (attributes.st_ctime, attributes.st_ctime_nsec) = seconds(status.stx_ctime);
        (attributes.st_uid, attributes.st_gid) = (shown.uid, shown.gid);
        attributes.st_mode = shown.mode;
        attributes.st_rdev = shown.rdev.into();
        attributes
    }

    /// What a file in a directory (or the descriptor's own, with an empty name) is shown as, and its record.
    pub(super) fn shown(
        &self,
        owners: Owners,
        fd: BorrowedFd<'_>,
        name: &CStr,
        status: &Statx,
    ) -> (Shown, Option<Record>) {
        let record = match owners {
            Owners::Kept { .. } if owners::can_have_record(sys::kind(status)) => self.record(fd, name),
            _ => None,
        };
        (owners::shown(owners, &self.identity, status, record.as_ref()), record)
    }

    fn record(&self, fd: BorrowedFd<'_>, name: &CStr) -> Option<Record> {
        let mut text = [0; Record::MAX_LEN];
        let path = self.proc.beneath(fd, name);
        // Without a name the path ends in a link to the file itself, which is to be followed.
        let len = if name.is_empty() {
            rustix::fs::getxattr(path, owners::RECORD, &mut text)
        } else {
            rustix::fs::lgetxattr(path, owners::RECORD, &mut text)
        };
        Record::parse(text.get(..len.ok()?)?)
    }

    /// Writes the record of a file of the server's user.
    pub(super) fn write_record(&self, fd: BorrowedFd<'_>, record: Record) -> Result<(), Errno> {
        let text = record.to_text();
        rustix::fs::setxattr(self.proc.path(fd), owners::RECORD, text.as_bytes(), XattrFlags::empty())
            .map_err(|errno| match errno {
                // A file system without such attributes, as a chown to somebody else is there for a user.
                Errno::OPNOTSUPP => Errno::PERM,
                errno => errno,
            })
    }

    /// Status of the exported root.
    fn root_attributes(&self) -> stat64 {
        let mut attributes = Entry::default().attr;
        attributes.st_ino = ROOT;
        attributes.st_mode = libc::S_IFDIR | 0o555;
        attributes.st_nlink = 2;
        attributes.st_blksize = 4096;
        attributes
    }

    pub(super) fn get_attributes(&self, id: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        if id == ROOT {
            return Ok((self.root_attributes(), VALID));
        }
        let node = self.tables.node(id)?;
        if let Some(handle) = handle.and_then(|handle| self.tables.handle(handle, id).ok()) {
            let status = sys::status(handle.as_fd(), c"")?;
            return Ok(self.told(&node, handle.as_fd(), c"", &status));
        }
        let (location, status) = self.locate(&node)?;
        Ok(self.told(&node, location.fd(), location.name(), &status))
    }

    fn told(&self, node: &Node, fd: BorrowedFd<'_>, name: &CStr, status: &Statx) -> (stat64, Duration) {
        let (shown, _) = self.shown(node.owners, fd, name, status);
        node.tell(Version::of(status));
        (self.attributes(status, shown), VALID)
    }

    pub(super) fn set_attributes(
        &self,
        id: u64,
        wanted: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        if id == ROOT {
            return Err(Errno::ROFS.into());
        }
        let node = self.tables.node(id)?;
        if !node.is_writable() {
            return Err(Errno::ROFS.into());
        }
        let handle = handle.and_then(|handle| self.tables.handle(handle, id).ok());
        let fd = self.fd(&node)?;
        let fd = fd.as_fd();
        // The size comes first: it takes the set-user-id bit away, which the mode may set again.
        if valid.contains(SetattrValid::SIZE) {
            self.set_size(&node, fd, handle.as_deref(), wanted.st_size)?;
        }
        match node.owners {
            Owners::Real => self.set_real_owner(&node, fd, wanted, valid)?,
            Owners::Kept { .. } => self.set_kept_owner(&node, fd, wanted, valid)?,
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = Timestamps {
                last_access: time(
                    valid,
                    [SetattrValid::ATIME, SetattrValid::ATIME_NOW],
                    (wanted.st_atime, wanted.st_atime_nsec),
                ),
                last_modification: time(
                    valid,
                    [SetattrValid::MTIME, SetattrValid::MTIME_NOW],
                    (wanted.st_mtime, wanted.st_mtime_nsec),
                ),
            };
            rustix::fs::utimensat(CWD, self.proc.path(fd), &times, AtFlags::empty())?;
        }
        let status = sys::status(fd, c"")?;
        Ok(self.told(&node, fd, c"", &status))
    }

    fn set_size(
        &self,
        node: &Node,
        fd: BorrowedFd<'_>,
        handle: Option<&Handle>,
        size: i64,
    ) -> io::Result<()> {
        let size = u64::try_from(size).map_err(|_| Errno::INVAL)?;
        if node.kind != FileType::RegularFile {
            return Err(if node.kind == FileType::Directory { Errno::ISDIR } else { Errno::INVAL }.into());
        }
        // A handle that is only for reading says EINVAL.
        if let Some(handle) = handle
            && rustix::fs::ftruncate(handle, size).is_ok()
        {
            return Ok(());
        }
        let file = self.open_regular(node, fd, OFlags::WRONLY)?;
        Ok(rustix::fs::ftruncate(file, size)?)
    }

    fn set_real_owner(
        &self,
        node: &Node,
        fd: BorrowedFd<'_>,
        wanted: &stat64,
        valid: SetattrValid,
    ) -> io::Result<()> {
        let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(wanted.st_uid));
        let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(wanted.st_gid));
        if uid.is_some() || gid.is_some() {
            rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::MODE) {
            self.set_host_mode(node.kind, fd, wanted.st_mode)?;
        } else if valid.contains(SetattrValid::KILL_SUIDGID) {
            let mode = u32::from(sys::status(fd, c"")?.stx_mode);
            if owners::has_set_id(mode) {
                self.set_host_mode(node.kind, fd, owners::without_set_id(mode))?;
            }
        }
        Ok(())
    }

    /// Changes the mode on the host.
    pub(super) fn set_host_mode(&self, kind: FileType, fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
        if kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP.into());
        }
        Ok(rustix::fs::chmodat(
            CWD,
            self.proc.path(fd),
            Mode::from_raw_mode(mode & 0o7777),
            AtFlags::empty(),
        )?)
    }

    fn set_kept_owner(
        &self,
        node: &Node,
        fd: BorrowedFd<'_>,
        wanted: &stat64,
        valid: SetattrValid,
    ) -> io::Result<()> {
        let chown = valid.intersects(SetattrValid::UID | SetattrValid::GID);
        if !chown && !valid.intersects(SetattrValid::MODE | SetattrValid::KILL_SUIDGID) {
            return Ok(());
        }
        let status = sys::status(fd, c"")?;
        let (before, record) = self.shown(node.owners, fd, c"", &status);
        let mut after = before;
        if valid.contains(SetattrValid::MODE) {
            after.mode = (before.mode & !0o7777) | (wanted.st_mode & 0o7777);
        } else if chown || valid.contains(SetattrValid::KILL_SUIDGID) {
            after.mode = owners::without_set_id(before.mode);
        }
        if valid.contains(SetattrValid::UID) {
            after.uid = wanted.st_uid;
        }
        if valid.contains(SetattrValid::GID) {
            after.gid = wanted.st_gid;
        }
        if after == before {
            return Ok(());
        }
        if !owners::can_have_record(node.kind) {
            // Nothing is kept for links; to change their owner does no harm, and programs that unpack archives insist on it.
            let harmless = node.kind == FileType::Symlink && !valid.contains(SetattrValid::MODE);
            return if harmless { Ok(()) } else { Err(Errno::PERM.into()) };
        }
        if status.stx_uid != self.identity.uid {
            return Err(Errno::PERM.into());
        }
        let ceiling = record.map_or_else(|| owners::ceiling_of_host(&status), |record| record.ceiling);
        self.keep(node.owners, fd, &status, after, ceiling, record.is_some())
    }

    /// Makes a file of the server's user show as `after`: changes its mode on the host as far as it may, and keeps the rest in a record.
    pub(super) fn keep(
        &self,
        owners: Owners,
        fd: BorrowedFd<'_>,
        status: &Statx,
        after: Shown,
        ceiling: u32,
        has_record: bool,
    ) -> io::Result<()> {
        let outside = owners::outside(after.mode, ceiling);
        let mut changed = *status;
        if u32::from(status.stx_mode) & 0o7777 != outside {
            self.set_host_mode(sys::kind(status), fd, outside)?;
            changed.stx_mode = (status.stx_mode & !0o7777) | u16::try_from(outside).unwrap_or(0o600);
        }
        let Shown { uid, gid, mode, rdev } = after;
        if !has_record && owners::shown(owners, &self.identity, &changed, None) == after {
            return Ok(());
        }
        Ok(self.write_record(fd, Record { uid, gid, mode, rdev, outside, ceiling })?)
    }

    /// The set-user-id and set-group-id bits go when somebody without privileges writes.
    pub(super) fn kill_set_id(&self, node: &Node, fd: BorrowedFd<'_>) -> io::Result<()> {
        let wanted = Entry::default().attr;
        match node.owners {
            Owners::Real => self.set_real_owner(node, fd, &wanted, SetattrValid::KILL_SUIDGID),
            Owners::Kept { .. } => self.set_kept_owner(node, fd, &wanted, SetattrValid::KILL_SUIDGID),
        }
    }

    /// Looks a name up.
    pub(super) fn find(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = super::resolve::component(name)?;
        if parent == ROOT {
            let granted = self.tables.granted(name).ok_or(Errno::NOENT)?;
            let tree = granted.tree()?;
            let status = sys::status(tree.as_fd(), c"")?;
            let (shown, _) = self.shown(granted.grant.owners, tree.as_fd(), c"", &status);
            let node = self.tables.look_up_root(&granted, &status);
            return Ok(self.entry(&node, &status, shown));
        }
        let parent = self.tables.node(parent)?;
        let directory = self.directory(&parent)?;
        self.find_in(&parent, directory.as_fd(), name)
    }

    pub(super) fn find_in(&self, parent: &Node, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<Entry> {
        let status = sys::status(directory, name)?;
        let (shown, _) = self.shown(parent.owners, directory, name, &status);
        let node = self.tables.look_up(parent, name, &status);
        Ok(self.entry(&node, &status, shown))
    }

    pub(super) fn forget_node(&self, id: u64, count: u64) {
        if self.tables.forget(id, count) {
            self.directories.remove(id);
        }
    }

    /// After a rename: the file that is there now, if the guest knows it, is found there from now on.
    pub(super) fn moved(&self, parent: &Arc<Node>, directory: BorrowedFd<'_>, name: &CStr) {
        let Ok(status) = sys::status(directory, name) else { return };
        if let Some(node) = self.tables.known(Key::from(&status)) {
            node.set_seen(parent.id, name);
        }
    }
}

fn time(valid: SetattrValid, [set, now]: [SetattrValid; 2], (tv_sec, tv_nsec): (i64, i64)) -> Timespec {
    if valid.contains(now) {
        return Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    }
    if valid.contains(set) && (0..1_000_000_000).contains(&tv_nsec) {
        return Timespec { tv_sec, tv_nsec };
    }
    Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }
}
