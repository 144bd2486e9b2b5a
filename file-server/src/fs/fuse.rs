//! The file system as the FUSE protocol's server sees it: takes requests apart and passes them on.
//!
//! What is not here is answered with ENOSYS, upon which the kernel does without or says that it is not supported: `flush` (writes reach the
//! host at once, so that closing has nothing to do), `access` (the kernel decides by what it is shown), locks (the kernel has its own),
//! `copy_file_range` (the kernel reads and writes), `syncfs`, `tmpfile`, `statx`, `poll`, `ioctl`, `bmap`, DAX.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::Exported;
use super::files::{Create, Write};
use super::table::ROOT;

impl FileSystem for Exported {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.reset();
        Ok(capable
            & (FsOptions::ASYNC_READ
                | FsOptions::ATOMIC_O_TRUNC
                | FsOptions::BIG_WRITES
                | FsOptions::AUTO_INVAL_DATA
                | FsOptions::DO_READDIRPLUS
                | FsOptions::READDIRPLUS_AUTO
                | FsOptions::ASYNC_DIO
                | FsOptions::PARALLEL_DIROPS
                | FsOptions::MAX_PAGES
                | FsOptions::HANDLE_KILLPRIV_V2
                | FsOptions::INIT_EXT))
    }

    fn destroy(&self) {
        self.reset();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(parent, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.forget_node(inode, count);
    }

    fn getattr(&self, _: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.get_attributes(inode, handle)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.set_attributes(inode, &attr, handle, valid)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.read_symlink(inode)
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make_symlink(context, target, parent, name)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        _: u32,
    ) -> io::Result<Entry> {
        self.make_node(context, parent, name, mode, rdev)
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, _: u32) -> io::Result<Entry> {
        self.make_directory(context, parent, name, mode)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::empty())
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        _: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.move_name((old_parent, old_name), (new_parent, new_name), flags)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make_link(inode, parent, name)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let (handle, options) = self.open_node(inode, flags, fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        CreateIn { flags, mode, fuse_flags, .. }: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let create = Create { flags, mode, kill_set_id: fuse_flags & FOPEN_IN_KILL_SUIDGID != 0 };
        let (entry, handle, options) = self.create_and_open(context, parent, name, &create)?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        self.read_file(inode, handle, to, size, offset)
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        from_cache: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let how = Write {
            // Pages of a mapping have their place, whatever the handle was opened with.
            append: !from_cache && flags & libc::O_APPEND as u32 != 0,
            kill_set_id: fuse_flags & WRITE_KILL_PRIV != 0,
        };
        self.write_file(inode, handle, from, size, offset, how)
    }

    fn fsync(&self, _: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.sync_file(inode, handle, data_only)
    }

    fn fallocate(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        self.allocate(inode, handle, mode, offset, len)
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.tables.remove_handle(handle, inode);
        Ok(())
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        self.file_system_status(inode)
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.set_attribute(inode, name, value, flags)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.get_attribute(inode, name, size)
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.list_attributes(inode, size)
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.remove_attribute(inode, name)
    }

    fn opendir(&self, _: &Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        Ok((Some(self.open_directory(inode)?), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(inode, handle, offset, false, &mut |shown, _| add_entry(shown))
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(inode, handle, offset, true, &mut |shown, entry| {
            add_entry(shown, entry.unwrap_or_default())
        })
    }

    fn fsyncdir(&self, _: &Context, inode: u64, _: bool, handle: u64) -> io::Result<()> {
        self.sync_directory(inode, handle)
    }

    fn releasedir(&self, _: &Context, inode: u64, _: u32, handle: u64) -> io::Result<()> {
        self.tables.remove_handle(handle, inode);
        Ok(())
    }

    fn access(&self, _: &Context, _: u64, _: u32) -> io::Result<()> {
        Err(Errno::NOSYS.into())
    }

    fn lseek(&self, _: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.seek_file(inode, handle, offset, whence)
    }
}

impl Exported {
    fn reset(&self) {
        self.tables.reset();
        self.directories.clear();
    }

    fn file_system_status(&self, id: u64) -> io::Result<statvfs64> {
        let mut status: statvfs64 = super::sys::zeroed_status();
        if id == ROOT {
            (status.f_bsize, status.f_frsize, status.f_namemax) = (4096, 4096, 255);
            return Ok(status);
        }
        let host = rustix::fs::fstatvfs(self.fd(&*self.tables.node(id)?)?)?;
        (status.f_bsize, status.f_frsize) = (host.f_bsize, host.f_frsize);
        (status.f_blocks, status.f_bfree, status.f_bavail) = (host.f_blocks, host.f_bfree, host.f_bavail);
        (status.f_files, status.f_ffree, status.f_favail) = (host.f_files, host.f_ffree, host.f_favail);
        status.f_namemax = host.f_namemax;
        Ok(status)
    }
}
