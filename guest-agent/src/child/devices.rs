//! A container's /dev. Where the cgroup rules the use of devices, their nodes are made as Docker makes them, and an image's own nodes
//! or such that are made later open what the rules allow. Where it does not, devices are bind mounts of the agent's own nodes on
//! file systems that are mounted `nodev`, so that any other node opens nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use coracle_agent_api::{ApiError, Device, ErrorKind};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::mount::MountAttrFlags;

use super::container::mount_fixed;

use super::root_dir::{self, Kind, RootDir};
use crate::error::{AtStep, Result, describe};
use crate::fork_server::{NewContainer, Shm};
use crate::mounts;

/// Names and minor numbers; the major number is 1, and 5 for the terminal.
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 6] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];
/// What a directory of devices may hold.
const MAX_DEVICES: usize = 4096;
const MAX_DEPTH: usize = 8;
/// What in the guest's /dev is no device of the guest's.
const NOT_DEVICES: [&str; 5] = ["pts", "shm", "mqueue", "fd", "console"];

/// Mounts /dev and what is in it; returns the devpts mount.
pub(super) fn mount(root: &RootDir, new: &NewContainer) -> Result<OwnedFd> {
    let nosuid = MountAttrFlags::MOUNT_ATTR_NOSUID;
    let nodev = MountAttrFlags::MOUNT_ATTR_NODEV;
    let noexec = MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let dev_options = [("mode", "755"), ("size", "65536k")];
    let strict = MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    let nodes_open = if new.devices_ruled { MountAttrFlags::empty() } else { nodev };
    let dev = mount_fixed(root, "/dev", "tmpfs", &dev_options, nosuid | nodes_open | strict)?;

    for (name, major, minor) in NODES {
        let step = || format!("provide /dev/{name}");
        if new.devices_ruled {
            let (kind, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
            rustix::fs::mknodat(&dev, name, kind, mode, rustix::fs::makedev(major, minor)).at(step())?;
            continue;
        }
        let target = empty_file(&dev, name).at(step())?;
        let node = mounts::bind_path(Path::new("/dev").join(name)).at(step())?;
        mounts::attach(node, target).at(step())?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, &dev, name).at(format!("link /dev/{name}"))?;
    }
    let pts_options = [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let pts = mount_fixed(root, "/dev/pts", "devpts", &pts_options, nosuid | noexec)?;
    match &new.shm {
        Shm::New => {
            let size = new.spec.shm_size.to_string();
            let options = [("mode", "1777"), ("size", size.as_str())];
            mount_fixed(root, "/dev/shm", "tmpfs", &options, nosuid | nodev | noexec)?;
        }
        Shm::Shared(path) => {
            let step = "share /dev/shm";
            root_dir::make(dev.as_fd(), Path::new("shm"), Kind::Directory).at(step)?;
            let target = root.find_without_links("/dev/shm").at(step)?;
            mounts::attach(mounts::bind_path(path).at(step)?, target).at(step)?;
        }
        Shm::Missing => {}
    }
    mount_fixed(root, "/dev/mqueue", "mqueue", &[], nosuid | nodev | noexec)?;
    further(root, new)?;
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

/// A device of the guest and where it goes.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// In the guest.
    pub source: PathBuf,
    /// In the container.
    pub path: PathBuf,
    pub is_block: bool,
    pub major: u32,
    pub minor: u32,
    mode: u32,
    owner: (u32, u32),
}

/// The devices that an entry of the request means.
pub(crate) fn expand(device: &Device) -> Result<Vec<Node>> {
    let missing = |error: &std::io::Error| {
        let reason = describe(error);
        let message = format!(
            "error gathering device information while adding custom device \"{}\": {reason}",
            device.source
        );
        ApiError { kind: ErrorKind::StartFailed, message, errno: error.raw_os_error() }
    };
    let source = Path::new(&device.source);
    let metadata = std::fs::metadata(source).map_err(|error| missing(&error))?;
    let mut nodes = Vec::new();
    if metadata.is_dir() {
        collect(source, Path::new(&device.path), MAX_DEPTH, &mut nodes);
    } else {
        let node = Node::new(source, Path::new(&device.path)).map_err(|error| missing(&error))?;
        nodes.push(node.ok_or_else(|| {
            let message = format!(
                "error gathering device information while adding custom device \"{}\": not a device node",
                device.source
            );
            ApiError::new(ErrorKind::StartFailed, message)
        })?);
    }
    Ok(nodes)
}

impl Node {
    fn new(source: &Path, path: &Path) -> std::io::Result<Option<Self>> {
        let metadata = std::fs::metadata(source)?;
        let kind = metadata.file_type();
        if !kind.is_block_device() && !kind.is_char_device() {
            return Ok(None);
        }
        Ok(Some(Self {
            source: source.to_owned(),
            path: path.to_owned(),
            is_block: kind.is_block_device(),
            major: rustix::fs::major(metadata.rdev()),
            minor: rustix::fs::minor(metadata.rdev()),
            mode: metadata.mode() & 0o777,
            owner: (metadata.uid(), metadata.gid()),
        }))
    }
}

fn collect(source: &Path, path: &Path, depth: usize, nodes: &mut Vec<Node>) {
    for entry in std::fs::read_dir(source).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth > 0 && !NOT_DEVICES.iter().any(|skipped| name == *skipped) {
            collect(&entry.path(), &path.join(&name), depth - 1, nodes);
        } else if (kind.is_block_device() || kind.is_char_device())
            && nodes.len() < MAX_DEVICES
            && !NOT_DEVICES.iter().any(|skipped| name == *skipped)
            && let Ok(Some(node)) = Node::new(&entry.path(), &path.join(&name))
        {
            nodes.push(node);
        }
    }
}

/// Devices that were asked for, and all of the guest for a privileged container.
fn further(root: &RootDir, new: &NewContainer) -> Result<()> {
    let mut nodes = Vec::new();
    if new.spec.privileged {
        collect(Path::new("/dev"), Path::new("/dev"), MAX_DEPTH, &mut nodes);
        nodes.retain(|node| {
            let usual = |(name, ..): &(&str, u32, u32)| node.path == Path::new("/dev").join(name);
            !NODES.iter().any(usual) && node.path != Path::new("/dev/ptmx")
        });
    }
    for device in &new.spec.devices {
        nodes.extend(expand(device)?);
    }
    for node in nodes {
        provide(root, &node, new.devices_ruled)?;
    }
    Ok(())
}

fn provide(root: &RootDir, node: &Node, ruled: bool) -> Result<()> {
    let step = || format!("provide {}", node.path.display());
    if !ruled {
        let target = root.find_or_make(&node.path, Kind::File).at(step())?;
        return mounts::attach(mounts::bind_path(&node.source).at(step())?, target).at(step());
    }
    let parent = node.path.parent().unwrap_or(Path::new("/"));
    let parent = root.find_or_make(parent, Kind::Directory).at(step())?;
    let Some(name) = node.path.file_name() else {
        return Err(ApiError::new(
            ErrorKind::Invalid,
            format!("{} is no path of a device", node.path.display()),
        ));
    };
    let kind = if node.is_block { FileType::BlockDevice } else { FileType::CharacterDevice };
    let number = rustix::fs::makedev(node.major, node.minor);
    match rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(node.mode), number) {
        // What is there already, in the image or by another entry, gives way.
        Err(rustix::io::Errno::EXIST) => {
            rustix::fs::unlinkat(&parent, name, rustix::fs::AtFlags::empty()).at(step())?;
            rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(node.mode), number).at(step())?;
        }
        result => result.at(step())?,
    }
    let (owner, group) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(&parent, name, Some(owner), Some(group), flags).at(step())
}
