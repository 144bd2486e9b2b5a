//! Extended attributes. The guest has those of users (`user.`), except the server's own. All others, `security.` and `trusted.` and
//! `system.` with access control lists, would mean something to the host: they are not supported.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use rustix::fs::{FileType, XattrFlags};
use rustix::io::Errno;

use super::Exported;
use super::owners::OWN_PREFIX;
use super::resolve::NodeFd;
use super::table::ROOT;

/// The longest value, and the longest list of names, in bytes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_LEN: usize = 64 * 1024;

fn is_guests(name: &[u8]) -> bool {
    name.len() > 5 && name.starts_with(b"user.") && !name.starts_with(OWN_PREFIX)
}

impl Exported {
    fn attribute_file(&self, id: u64) -> io::Result<NodeFd> {
        if id == ROOT {
            return Err(Errno::OPNOTSUPP.into());
        }
        let node = self.tables.node(id)?;
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::PERM.into());
        }
        self.fd(&node)
    }

    fn check_writable(&self, id: u64) -> io::Result<()> {
        if id == ROOT || !self.tables.node(id)?.is_writable() {
            return Err(Errno::ROFS.into());
        }
        Ok(())
    }

    pub(super) fn get_attribute(&self, id: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        if !is_guests(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let file = self.attribute_file(id)?;
        let path = self.proc.path(file.as_fd());
        if size == 0 {
            let len = rustix::fs::getxattr_query(path, name)?;
            return Ok(GetxattrReply::Count(u32::try_from(len).map_err(|_| Errno::TOOBIG)?));
        }
        let mut value = vec![0; (size as usize).min(MAX_LEN)];
        let len = rustix::fs::getxattr(path, name, &mut value)?;
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    pub(super) fn set_attribute(&self, id: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.check_writable(id)?;
        if !is_guests(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let file = self.attribute_file(id)?;
        let path = self.proc.path(file.as_fd());
        Ok(rustix::fs::setxattr(path, name, value, flags)?)
    }

    pub(super) fn remove_attribute(&self, id: u64, name: &CStr) -> io::Result<()> {
        self.check_writable(id)?;
        if !is_guests(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let file = self.attribute_file(id)?;
        let path = self.proc.path(file.as_fd());
        Ok(rustix::fs::removexattr(path, name)?)
    }

    pub(super) fn list_attributes(&self, id: u64, size: u32) -> io::Result<ListxattrReply> {
        if id != ROOT && self.tables.node(id)?.kind == FileType::Symlink {
            return Ok(if size == 0 { ListxattrReply::Count(0) } else { ListxattrReply::Names(Vec::new()) });
        }
        let file = self.attribute_file(id)?;
        let path = self.proc.path(file.as_fd());
        let mut names = vec![0; MAX_LEN];
        let len = rustix::fs::listxattr(path, &mut names)?;
        names.truncate(len);
        let guests: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| is_guests(name.strip_suffix(b"\0").unwrap_or(name)))
            .flatten()
            .copied()
            .collect();
        if size == 0 {
            return Ok(ListxattrReply::Count(u32::try_from(guests.len()).map_err(|_| Errno::TOOBIG)?));
        }
        if guests.len() > size as usize {
            return Err(Errno::RANGE.into());
        }
        Ok(ListxattrReply::Names(guests))
    }
}

#[cfg(test)]
mod tests {
    use super::is_guests;

    #[test]
    fn only_users_attributes_are_the_guests() {
        for (name, theirs) in [
            ("user.a", true),
            ("user.", false),
            ("user.coracle.stat", false),
            ("user.coracle.", false),
            ("security.capability", false),
            ("trusted.overlay.opaque", false),
            ("system.posix_acl_access", false),
            ("User.a", false),
        ] {
            assert_eq!(is_guests(name.as_bytes()), theirs, "{name}");
        }
    }
}
