//! What the server gives up before it serves anybody: the pieces of [`coracle_worker::jail`] that fit.
//!
//! It keeps the rights of its user to files, since it acts for that user, but has no path to them where the host allows namespaces: its root is
//! empty then. Where the host does not, the root stays the host's; [`Jail::namespaces`], the log and the server's status say so. Either way its
//! working directory is `/proc/self/fd`, and what it opens it opens beneath the grants' descriptors. As root it keeps the capabilities that
//! concern owners and modes of files, not the one that opens files by handles (`CAP_DAC_READ_SEARCH`), and no others.
//!
//! What the jail does not do: a directory's descriptor leads upwards as well (and a root that is the host's leads everywhere), so that code
//! that is not ours, once it ran in this process, could leave the grants with the user's rights. Against that stands that there is no such
//! code: nothing here is executable but the program.

use std::io;
use std::os::fd::RawFd;

use coracle_worker::jail::{self, Users, filter};
use filter::{Call, always, runtime};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::CapabilitySet;

/// More than any machine has open at once; the host's limit counts too.
const MAX_DESCRIPTORS: u64 = 1 << 20;

/// What a process that is confined has.
#[derive(Debug, Clone, Copy)]
pub struct Jail {
    /// How many descriptors it may have.
    pub descriptors: u64,
    /// Whether it has left the host's namespaces. Some hosts do not allow that.
    pub namespaces: bool,
}

/// Confines the process for the rest of its life, except for the descriptors to keep. It must have one thread only. Its working directory is
/// `/proc/self/fd` then.
///
/// # Errors
/// Where a layer that every supported kernel has cannot be put up.
pub fn enter(keep: &[RawFd]) -> io::Result<Jail> {
    rustix::thread::set_no_new_privs(true)?;
    jail::close_others(keep)?;
    let descriptors = jail::limit_resources(MAX_DESCRIPTORS)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let own = rustix::fs::openat(CWD, "/proc/self/fd", flags, Mode::empty())?;
    let left = jail::leave_namespaces(Users::KeepMine);
    if let Err(error) = &left {
        tracing::warn!(%error, "the host allows no namespaces: the file server can see the host's files by their paths");
    }
    rustix::process::fchdir(&own)?;
    drop(own);
    jail::keep_capabilities(
        CapabilitySet::CHOWN | CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER | CapabilitySet::FSETID,
    )?;
    jail::forbid_ports()?;
    filter::hide_clone3()?;
    filter::install(calls())?;
    Ok(Jail { descriptors, namespaces: left.is_ok() })
}

fn calls() -> Vec<Call> {
    const THREAD: u64 = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
    let mut calls = runtime();
    calls.extend([
        Call(libc::SYS_clone, vec![vec![(0, THREAD, THREAD)]]),
        // Answered with ENOSYS by a filter of its own.
        Call(libc::SYS_clone3, Vec::new()),
    ]);
    calls.extend(control_and_rings());
    calls.extend(files());
    calls
}

/// The control socket, the VMM's front end, the rings' events.
fn control_and_rings() -> impl Iterator<Item = Call> {
    always(&[
        libc::SYS_accept4,
        libc::SYS_getsockopt,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        libc::SYS_eventfd2,
    ])
    .chain([Call(libc::SYS_ioctl, vec![vec![(1, filter::ALL, libc::FIONBIO)]])])
}

/// What is done with files. Nothing here runs one, mounts, or opens one without a path.
fn files() -> impl Iterator<Item = Call> {
    always(&[
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_statx,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_fstatfs,
        libc::SYS_getdents64,
        libc::SYS_lseek,
        libc::SYS_preadv,
        libc::SYS_pwritev2,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_readlinkat,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_utimensat,
        libc::SYS_getxattr,
        libc::SYS_lgetxattr,
        libc::SYS_setxattr,
        libc::SYS_listxattr,
        libc::SYS_removexattr,
    ])
}
