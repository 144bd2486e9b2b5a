//! A container's /dev. Devices are bind mounts of the agent's own nodes on file systems that are mounted `nodev`, so that
//! a device node from an image or made by `mknod` opens nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;

use super::container::mount_fixed;

use super::root_dir::{self, Kind, RootDir};
use crate::error::{AtStep, Result};
use crate::mounts;

const NODES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 6] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];

/// Mounts /dev and what is in it; returns the devpts mount.
pub(super) fn mount(root: &RootDir, shm_size: u64) -> Result<OwnedFd> {
    let nosuid = MountAttrFlags::MOUNT_ATTR_NOSUID;
    let nodev = MountAttrFlags::MOUNT_ATTR_NODEV;
    let noexec = MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let dev_options = [("mode", "755"), ("size", "65536k")];
    let strict = MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    let dev = mount_fixed(root, "/dev", "tmpfs", &dev_options, nosuid | nodev | strict)?;

    for name in NODES {
        let step = || format!("provide /dev/{name}");
        let target = empty_file(&dev, name).at(step())?;
        let node = mounts::bind_path(Path::new("/dev").join(name)).at(step())?;
        mounts::attach(node, target).at(step())?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, &dev, name).at(format!("link /dev/{name}"))?;
    }
    let pts_options = [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let pts = mount_fixed(root, "/dev/pts", "devpts", &pts_options, nosuid | noexec)?;
    let shm_size = shm_size.to_string();
    let shm_options = [("mode", "1777"), ("size", shm_size.as_str())];
    mount_fixed(root, "/dev/shm", "tmpfs", &shm_options, nosuid | nodev | noexec)?;
    mount_fixed(root, "/dev/mqueue", "mqueue", &[], nosuid | nodev | noexec)?;
    Ok(pts)
}

/// Makes the place for the terminal at /dev/console.
pub(super) fn console_file(root: &RootDir) -> Result<()> {
    let dev = root.find_without_links("/dev").at("open /dev")?;
    empty_file(&dev, "console").at("provide /dev/console").map(drop)
}

fn empty_file(dev: &OwnedFd, name: &str) -> std::io::Result<OwnedFd> {
    root_dir::make(dev.as_fd(), Path::new(name), Kind::File)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dev, name, flags, Mode::empty())?)
}
