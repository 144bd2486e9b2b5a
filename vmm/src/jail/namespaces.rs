//! Leaves the host's namespaces for new, empty ones: no file system but an empty one, no network but a loopback that is down, no
//! shared memory of others. Without root it needs a user namespace, which some hosts do not give.

use std::io;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{chdir, chroot, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Any folder that exists; what is mounted over it becomes the root.
const PLACES: [&str; 3] = ["/proc", "/tmp", "/dev"];

/// Moves the process, which must have one thread only.
#[allow(unsafe_code)]
pub(super) fn leave() -> io::Result<()> {
    let others = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: none of the flags makes threads stop sharing descriptors or memory.
    let with_users = unsafe { unshare_unsafe(UnshareFlags::NEWUSER | others) };
    match with_users {
        // Root can do without; in a chroot it must.
        Err(_) if geteuid().is_root() => {
            // SAFETY: as above.
            unsafe { unshare_unsafe(others) }?;
        }
        result => result?,
    }
    empty_root()
}

fn empty_root() -> io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let place = PLACES
        .into_iter()
        .find(|place| mount("coracle-vmm", *place, "tmpfs", flags, Some(c"size=4k,mode=111")).is_ok())
        .ok_or(io::ErrorKind::NotFound)?;
    chdir(place)?;
    // The way back needs a descriptor of a folder or a privilege, and neither will be left. Taking the old root's mounts away as well
    // (by `pivot_root`) would add nothing but the milliseconds that the kernel waits for all processors then.
    chroot(".")?;
    Ok(chdir("/")?)
}
