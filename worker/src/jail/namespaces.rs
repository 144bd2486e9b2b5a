//! Leaves the host's namespaces for new, empty ones: no file system but an empty one, no network but a loopback that is down, no
//! shared memory of others. Without root it needs a user namespace, which some hosts do not give.

use std::io;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{chdir, chroot, getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Any folder that exists; what is mounted over it becomes the root.
const PLACES: [&str; 3] = ["/proc", "/tmp", "/dev"];

/// Whether to leave the host's users as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Users {
    /// For new ones where the host allows it: the process is nobody then.
    Leave,
    /// For new ones among which its own user and group have the same numbers as before. Its rights to the host's files stay what they are;
    /// those of others belong to nobody. Where the process is root on the host, nothing changes: it needs its privileges.
    KeepMine,
}

/// Moves the process, which must have one thread only.
///
/// # Errors
/// Where the host allows no namespaces.
pub fn leave(users: Users) -> io::Result<()> {
    let others = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    let (uid, gid) = (geteuid(), getegid());
    if users == Users::KeepMine && uid.is_root() {
        // SAFETY: none of the flags makes threads stop sharing descriptors or memory.
        unsafe { unshare_unsafe(others) }?;
        return empty_root();
    }
    // SAFETY: as above.
    let with_users = unsafe { unshare_unsafe(UnshareFlags::NEWUSER | others) };
    match with_users {
        // Root can do without; in a chroot it must.
        Err(_) if uid.is_root() => {
            // SAFETY: as above.
            unsafe { unshare_unsafe(others) }?;
        }
        result => result?,
    }
    if users == Users::KeepMine {
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("{0} {0} 1", uid.as_raw()))?;
        std::fs::write("/proc/self/gid_map", format!("{0} {0} 1", gid.as_raw()))?;
    }
    empty_root()
}

fn empty_root() -> io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let place = PLACES
        .into_iter()
        .find(|place| mount("coracle", *place, "tmpfs", flags, Some(c"size=4k,mode=111")).is_ok())
        .ok_or(io::ErrorKind::NotFound)?;
    chdir(place)?;
    // The way back needs a descriptor of a folder or a privilege, and neither will be left. Taking the old root's mounts away as well
    // (by `pivot_root`) would add nothing but the milliseconds that the kernel waits for all processors then.
    chroot(".")?;
    Ok(chdir("/")?)
}
