//! Whom files belong to, inside and outside.
//!
//! With [`Owners::Kept`], what was asked for inside is kept in a record, the extended attribute `user.coracle.stat` of regular files and
//! directories; it is written only where the host's own status says something else. Outside:
//! - Everything belongs to the server's user. Its owner always keeps reading and writing (and entering of directories).
//! - Modes never have set-user-id, set-group-id or sticky bits, and never more for group and others than the file's ceiling: what the server's
//!   own umask allows for files that were made inside; for those of the host, what they had before the first change inside. So a container can
//!   take rights away but not open a private file to other people on the host.
//! - When the host changes a file's mode, the host's mode is shown inside.
//! - Device nodes, pipes and sockets that are made inside are empty regular files outside. Symbolic links cannot have a record: they are
//!   shown as the server's user's, and a change of their owner lasts only as long as it is that.

use std::io;

use rustix::fs::{FileType, Statx};

use crate::control::Owners;

use super::sys;

/// Who the server is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) umask: u32,
}

impl Identity {
    /// Who this process is. To be asked before it leaves the host's namespaces.
    ///
    /// # Errors
    /// Where there is no `/proc`.
    pub fn of_process() -> io::Result<Self> {
        let (uid, gid, umask) = sys::credentials()?;
        Ok(Self { uid, gid, umask })
    }

    pub(crate) fn is_root(&self) -> bool {
        self.uid == 0
    }
}

/// The name of the attribute.
pub(super) const RECORD: &std::ffi::CStr = c"user.coracle.stat";
/// What begins like this is the server's own, and hidden from the guest.
pub(super) const OWN_PREFIX: &[u8] = b"user.coracle.";
/// Owner inside of what belongs to another user of the host.
pub(super) const NOBODY: u32 = 65534;

const SET_ID: u32 = 0o6000;
const PERMISSIONS: u32 = 0o7777;
const TYPE: u32 = 0o170_000;

/// What was asked for inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// With the kind of file.
    pub(super) mode: u32,
    /// Device number as the guest encodes it.
    pub(super) rdev: u32,
    /// Permissions outside when the record was written.
    pub(super) outside: u32,
    /// The most that group and others may have outside.
    pub(super) ceiling: u32,
}

impl Record {
    /// Longer than any record.
    pub(super) const MAX_LEN: usize = 96;

    /// As text: a version, and six numbers, modes octal.
    pub(super) fn to_text(self) -> String {
        let Self { uid, gid, mode, rdev, outside, ceiling } = self;
        format!("1 {uid} {gid} {mode:o} {rdev} {outside:o} {ceiling:o}")
    }

    /// Reads a record. Anybody who may write the file can have written it: what makes no sense is none.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(text).ok()?.split(' ');
        if words.next()? != "1" {
            return None;
        }
        let mut number = |radix| u32::from_str_radix(words.next()?, radix).ok();
        let record = Self {
            uid: number(10)?,
            gid: number(10)?,
            mode: number(8)?,
            rdev: number(10)?,
            outside: number(8)?,
            ceiling: number(8)?,
        };
        let sensible = words.next().is_none()
            && record.mode & !(TYPE | PERMISSIONS) == 0
            && record.outside & !PERMISSIONS == 0
            && record.ceiling & !0o077 == 0;
        sensible.then_some(record)
    }
}

/// What the guest is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
    pub(super) rdev: u32,
}

/// The host's device number as the guest's kernel encodes it.
fn host_rdev(status: &Statx) -> u32 {
    let (major, minor) = (status.stx_rdev_major, status.stx_rdev_minor);
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

/// Whether a file of this kind can have a record.
pub(super) fn can_have_record(kind: FileType) -> bool {
    matches!(kind, FileType::RegularFile | FileType::Directory)
}

/// What a file is shown as.
pub(super) fn shown(owners: Owners, identity: &Identity, status: &Statx, record: Option<&Record>) -> Shown {
    let mode = u32::from(status.stx_mode);
    let host = Shown { uid: status.stx_uid, gid: status.stx_gid, mode, rdev: host_rdev(status) };
    let Owners::Kept { uid, gid } = owners else { return host };
    if let Some(record) = record.filter(|record| fits(record, mode)) {
        let changed_outside = mode & PERMISSIONS != record.outside;
        let permissions = if changed_outside { mode } else { record.mode } & PERMISSIONS;
        let special = record.mode & TYPE != mode & TYPE;
        let rdev = if special { record.rdev } else { host.rdev };
        return Shown { uid: record.uid, gid: record.gid, mode: (record.mode & TYPE) | permissions, rdev };
    }
    let mine = status.stx_uid == identity.uid;
    Shown {
        uid: if mine { uid } else { NOBODY },
        gid: if mine || status.stx_gid == identity.gid { gid } else { NOBODY },
        ..host
    }
}

/// Whether a record can be of a file that is this on the host.
fn fits(record: &Record, mode: u32) -> bool {
    let kind = FileType::from_raw_mode(record.mode);
    record.mode & TYPE == mode & TYPE
        || FileType::from_raw_mode(mode) == FileType::RegularFile
            && matches!(
                kind,
                FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice
            )
}

/// The most that group and others may have outside of a file that was made inside.
pub(super) fn ceiling_of_new(identity: &Identity) -> u32 {
    0o077 & !identity.umask
}

/// The most that group and others may have outside of a file of the host's: what they have, and to execute what they may read.
pub(super) fn ceiling_of_host(status: &Statx) -> u32 {
    let had = u32::from(status.stx_mode) & 0o077;
    had | ((had & 0o044) >> 2)
}

/// Permissions outside for a file that has these inside.
pub(super) fn outside(mode: u32, ceiling: u32) -> u32 {
    match FileType::from_raw_mode(mode) {
        FileType::Directory => 0o700 | (mode & 0o077 & ceiling),
        FileType::RegularFile => 0o600 | (mode & 0o100) | (mode & 0o077 & ceiling),
        _ => 0o600,
    }
}

/// The mode after its file was written to or given away by somebody without privileges.
pub(super) fn without_set_id(mode: u32) -> u32 {
    let group = if mode & 0o010 == 0 { 0 } else { 0o2000 };
    if FileType::from_raw_mode(mode) == FileType::Directory { mode } else { mode & !(0o4000 | group) }
}

/// Whether [`without_set_id`] would change something.
pub(super) fn has_set_id(mode: u32) -> bool {
    mode & SET_ID != 0 && without_set_id(mode) != mode
}

/// A state of a file's content, as far as its status tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    size: u64,
    modified: i128,
    changed: i128,
    /// The last change was long enough ago for the next one to have another time.
    settled: bool,
}

/// Times of files move on at least this often, in nanoseconds (`CONFIG_HZ` of 100).
const TICK: i128 = 20_000_000;

impl Version {
    pub(super) fn of(status: &Statx) -> Self {
        let nanoseconds = |time: rustix::fs::StatxTimestamp| {
            i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
        };
        let changed = nanoseconds(status.stx_ctime);
        Self {
            size: status.stx_size,
            modified: nanoseconds(status.stx_mtime),
            changed,
            settled: sys::now() - changed > TICK,
        }
    }

    /// Whether the content is certainly the same as it was at `earlier`.
    pub(super) fn is_same_as(&self, earlier: &Self) -> bool {
        earlier.settled
            && (self.size, self.modified, self.changed) == (earlier.size, earlier.modified, earlier.changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ME: Identity = Identity { uid: 1000, gid: 1000, umask: 0o022 };
    const KEPT: Owners = Owners::Kept { uid: 0, gid: 0 };

    fn status(uid: u32, mode: u16) -> Statx {
        let mut status = sys::status(rustix::fs::CWD, c"/").unwrap();
        (status.stx_uid, status.stx_gid, status.stx_mode) = (uid, uid, mode);
        status
    }

    #[test]
    fn my_files_are_shown_as_the_containers_and_others_as_nobodys() {
        let shown_as = |uid| {
            let shown = shown(KEPT, &ME, &status(uid, 0o100_644), None);
            (shown.uid, shown.gid, shown.mode)
        };
        assert_eq!(shown_as(1000), (0, 0, 0o100_644));
        assert_eq!(shown_as(0), (NOBODY, NOBODY, 0o100_644));
    }

    #[test]
    fn a_record_holds_until_the_host_changes_the_mode() {
        let record = Record { uid: 33, gid: 34, mode: 0o104_755, rdev: 0, outside: 0o755, ceiling: 0o055 };
        let shown_mode = |mode| shown(KEPT, &ME, &status(1000, mode), Some(&record));
        assert_eq!(shown_mode(0o100_755), Shown { uid: 33, gid: 34, mode: 0o104_755, rdev: 0 });
        assert_eq!(shown_mode(0o100_700).mode, 0o100_700);
        assert_eq!(shown_mode(0o100_700).uid, 33);
        // A record of a file cannot make a directory of it, nor a device of a directory.
        assert_eq!(shown_mode(0o040_755).uid, 0);
        let device = Record { mode: 0o020_666, ..record };
        assert_eq!(shown(KEPT, &ME, &status(1000, 0o040_755), Some(&device)).mode, 0o040_755);
    }

    #[test]
    fn the_outside_keeps_its_owners_rights_and_never_gets_more_for_others() {
        assert_eq!(outside(0o100_444, ceiling_of_new(&ME)), 0o644);
        assert_eq!(outside(0o104_777, ceiling_of_new(&ME)), 0o755);
        assert_eq!(outside(0o041_777, ceiling_of_new(&ME)), 0o755);
        assert_eq!(outside(0o020_666, ceiling_of_new(&ME)), 0o600);
        assert_eq!(outside(0o100_777, ceiling_of_host(&status(1000, 0o100_600))), 0o700);
        assert_eq!(outside(0o100_777, ceiling_of_host(&status(1000, 0o100_644))), 0o755);
    }

    #[test]
    fn set_id_bits_go_where_the_kernel_takes_them() {
        assert_eq!(without_set_id(0o106_755), 0o100_755);
        assert_eq!(without_set_id(0o106_745), 0o102_745);
        assert_eq!(without_set_id(0o042_755), 0o042_755);
        assert!(has_set_id(0o104_755) && !has_set_id(0o102_745) && !has_set_id(0o100_755));
    }

    proptest! {
        #[test]
        fn records_read_as_written(uid: u32, gid: u32, mode in 0..=(TYPE | PERMISSIONS), rdev: u32,
                                   outside in 0..=PERMISSIONS, ceiling in 0..=0o077u32) {
            let record = Record { uid, gid, mode, rdev, outside, ceiling };
            prop_assert!(record.to_text().len() <= Record::MAX_LEN);
            prop_assert_eq!(Record::parse(record.to_text().as_bytes()), Some(record));
        }

        #[test]
        fn whatever_stands_in_the_attribute_is_read_without_harm(text: Vec<u8>, mode: u16) {
            let record = Record::parse(&text);
            shown(KEPT, &ME, &status(1000, mode), record.as_ref());
        }
    }
}
