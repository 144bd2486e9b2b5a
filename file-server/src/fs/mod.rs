//! The exported file system: a root with one entry for each grant, and beneath it what was granted.
//!
//! The guest is hostile: it may send any node id, handle, name and length. What holds against it:
//! - A node id is a number that was never used before, so that a stale one names nothing. Nodes come only from a look-up of one name in a
//!   directory that is itself a node, and the roots are the grants' descriptors: nothing outside the grants ever has an id.
//! - A name is one component: neither empty nor `.` nor `..`, without `/`. It is opened with `O_PATH | O_NOFOLLOW` beneath its directory
//!   (`openat2`), and used only if it is the same file (device and inode number) as the node was when it was looked up.
//! - Symbolic links are read as text and never followed. Only regular files and directories are ever opened, after they were seen to be such,
//!   by their `O_PATH` descriptor; device nodes, pipes and sockets of the host are never opened. Their names, owners, modes and times are
//!   changed as those of other files are.
//! - Who is allowed what inside is decided by the guest's kernel (`default_permissions`, which virtio-fs always has); on the host the server's
//!   user is all that it can be. A grant that is read-only refuses changes here as well. A file that is reached through several grants may be
//!   changed if one of them allows it.
//!
//! A file is one node however it was reached, also through different grants, so that containers share page caches and locks. Locks are the
//! guest kernel's own: they hold among containers and are not seen by the host's processes.
//!
//! Nodes need no descriptor: they remember a directory and a name (`resolve`). Memory grows with what the guest references and shrinks when
//! it forgets; descriptors are bounded by a cache of directories plus what the guest has open, of which the process's limit allows only so much
//! (`slots`): the guest is told ENFILE beyond that.
//!
//! Coherence: attributes and names may be up to [`VALID`] old in the guest; missing names are not remembered. Opening a file that has
//! changed since its attributes were told drops the guest's cached pages; while it is open, the guest looks at size and time of change when the
//! attributes have become old. Writes go to the host at once. `O_APPEND` appends to what the file is on the host.

mod attributes;
mod create;
mod directory;
mod files;
mod fuse;
mod owners;
mod resolve;
mod slots;
mod sys;
mod table;
mod xattr;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{FileType, OFlags};

use crate::control::{Grant, GrantId, GrantKind, Owners};

pub use owners::Identity;
pub use sys::Proc;
use table::Tables;

/// How long the guest may use names and attributes without asking again.
pub const VALID: Duration = Duration::from_secs(1);

/// Why a tree was not granted or revoked.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The name is taken.
    #[error("{0} is granted already, and is another tree or granted in another way")]
    Exists(GrantId),
    /// There is no such grant.
    #[error("{0} is not granted")]
    Unknown(GrantId),
    /// The descriptor is not what was said.
    #[error("the descriptor for {id} is not {expected}, opened with O_PATH")]
    WrongKind {
        /// The grant.
        id: GrantId,
        /// What it should be.
        expected: &'static str,
    },
    /// Real owners need a server that is root.
    #[error("{0} cannot have real owners: the file server does not run as root")]
    NotRoot(GrantId),
    /// All grants of a server have the same owners: trees may overlap, and a file is one node with one owner, however it was reached.
    #[error(
        "{id} cannot have other owners than {other}, which is granted already: revoke that first, or use another file server"
    )]
    OtherOwners {
        /// The grant.
        id: GrantId,
        /// One that is in force.
        other: GrantId,
    },
    /// There must be descriptors left for the server's own work.
    #[error(
        "{0} cannot be granted: as much is open as the limit of descriptors (`ulimit -Hn`) allows; raise it, or revoke other grants"
    )]
    Full(GrantId),
    /// The descriptor could not be looked at.
    #[error("cannot look at the descriptor for {id}")]
    Look {
        /// The grant.
        id: GrantId,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The file system. All methods may be called from any thread.
#[derive(Debug)]
pub struct Exported {
    tables: Tables,
    directories: resolve::Directories,
    proc: Proc,
    identity: Identity,
}

impl Exported {
    /// A file system without grants, in a process that may have so many descriptors.
    pub fn new(proc: Proc, identity: Identity, descriptors: u64) -> Self {
        let directories = usize::try_from(slots::directories_for(descriptors)).unwrap_or(usize::MAX);
        Self {
            tables: Tables::new(descriptors),
            directories: resolve::Directories::new(directories),
            identity,
            proc,
        }
    }

    /// Opens a tree. To do it again changes nothing.
    ///
    /// # Errors
    /// If the name is taken, `tree` is not what `grant` says, grants that are in force have other owners, or there are no descriptors left.
    pub fn grant(&self, grant: Grant, tree: OwnedFd) -> Result<(), GrantError> {
        let id = grant.id.clone();
        let look = |errno: rustix::io::Errno| GrantError::Look { id: id.clone(), source: errno.into() };
        let (expected, kind) = match grant.kind {
            GrantKind::Directory => ("a directory", FileType::Directory),
            GrantKind::File => ("a regular file", FileType::RegularFile),
        };
        let status = sys::status(tree.as_fd(), c"").map_err(look)?;
        let flags = rustix::fs::fcntl_getfl(&tree).map_err(look)?;
        if sys::kind(&status) != kind || !flags.contains(OFlags::PATH) {
            return Err(GrantError::WrongKind { id, expected });
        }
        if grant.owners == Owners::Real && !self.identity.is_root() {
            return Err(GrantError::NotRoot(id));
        }
        self.tables.add_grant(grant, tree, &status)
    }

    /// Closes a tree: what of it is open is closed, and nodes that are in no other grant are gone.
    ///
    /// # Errors
    /// If there is no such grant.
    pub fn revoke(&self, id: &GrantId) -> Result<(), GrantError> {
        let gone = self.tables.remove_grant(id).ok_or_else(|| GrantError::Unknown(id.clone()))?;
        self.directories.remove_all(&gone);
        Ok(())
    }

    /// The grants, in order of their names.
    pub fn grants(&self) -> Vec<Grant> {
        self.tables.grants()
    }

    /// How many nodes the guest holds references to, and how many handles.
    pub fn counts(&self) -> (u64, u64) {
        self.tables.counts()
    }
}

/// Any bytes as a record.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_record(bytes: &[u8]) {
    if let Some(record) = owners::Record::parse(bytes) {
        assert_eq!(owners::Record::parse(record.to_text().as_bytes()), Some(record));
    }
}
