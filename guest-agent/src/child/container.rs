//! Sets a new container up from inside its namespaces: names, the root file system with what Docker mounts in
//! it, hidden and read-only paths; then makes it the root and drops the agent's mounts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use coracle_agent_api::{ApiError, BindMount, ContainerSpec, ErrorKind, TmpfsMount, VolumeMount};
use rustix::fs::{FileType, Mode};
use rustix::mount::{MountAttrFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};

use super::root_dir::{self, Kind, RootDir};
use super::{Joined, Root, devices, tmpfs::TmpfsOptions};
use crate::error::{AtStep, Result, invalid};
use crate::fork_server::NewContainer;
use crate::{mounts, sys};

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;

/// Prepares everything; the calling process still sees the agent's file system afterwards.
pub(super) fn set_up(new: &NewContainer, root: OwnedFd, joined: Joined, tty: bool) -> Result<Root> {
    let spec = &new.spec;
    rustix::process::umask(Mode::empty());
    if !spec.host_cgroups {
        // Now, because the root of a cgroup namespace is the cgroup its maker is in.
        sys::unshare(UnshareFlags::NEWCGROUP).at("make a cgroup namespace")?;
    }
    if let Some(donor) = joined.ipc_donor {
        let ipc = ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION;
        rustix::thread::move_into_thread_name_spaces(donor.as_fd(), ipc)
            .at_kind(ErrorKind::Conflict, "join the other container's IPC namespace")?;
    }
    if let Some(network) = joined.network {
        rustix::thread::move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
            .at("join the network namespace")?;
    }
    names_and_parameters(spec)?;

    let mount_point = root_dir::open_directory(&new.mount_point).at("open the mount point")?;
    mounts::attach(&root, &mount_point).at("attach the root file system")?;
    let root = RootDir::new(root);

    mount_fixed(&root, "/proc", "proc", &[], NOSUID | NODEV | NOEXEC)?;
    let devpts = devices::mount(&root, new)?;
    let unless = |writable: bool| if writable { MountAttrFlags::empty() } else { RDONLY };
    mount_fixed(&root, "/sys", "sysfs", &[], NOSUID | NODEV | NOEXEC | unless(spec.privileged))?;
    let cgroups = NOSUID | NODEV | NOEXEC | unless(spec.privileged || spec.writable_cgroups);
    mount_fixed(&root, "/sys/fs/cgroup", "cgroup2", &[], cgroups)?;
    wanted_mounts(&root, new)?;
    for (file, source) in spec.files.iter().zip(&new.files) {
        let step = || format!("mount {}", file.path);
        let target = root.find_or_make(&file.path, Kind::File).at(step())?;
        if is_directory(&target).at(step())? {
            return Err(ApiError::new(
                ErrorKind::StartFailed,
                format!("mount {}: it is a directory in the image", file.path),
            ));
        }
        mounts::attach(mounts::bind_path(source).at(step())?, target).at(step())?;
    }
    if tty {
        devices::console_file(&root)?;
    }
    // While it can still be made. What is wrong with it is found out, and said, when it is entered.
    let _ = root.find_or_make(&spec.process.cwd, Kind::Directory);
    hide(&root, &spec.masked_paths)?;
    for path in &spec.readonly_paths {
        make_readonly(&root, path)?;
    }
    if spec.readonly_rootfs {
        sys::mount_setattr(root.as_fd(), false, libc::MOUNT_ATTR_RDONLY, 0).at("make the root read-only")?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(Root { dir: root, devpts: Some(devpts) })
}

/// Makes the container's root the process's root, and lets go of everything else.
pub(super) fn enter(root: &RootDir) -> Result<()> {
    rustix::process::fchdir(root.as_fd()).at("enter the root file system")?;
    rustix::process::pivot_root(".", ".").at("pivot_root")?;
    // The old root now lies on top of the new one, and "." is the old one.
    rustix::mount::unmount(".", UnmountFlags::DETACH).at("unmount the old root")?;
    rustix::process::chdir("/").at("enter the new root")?;
    Ok(())
}

fn names_and_parameters(spec: &ContainerSpec) -> Result<()> {
    if !spec.host_uts {
        rustix::system::sethostname(spec.hostname.as_bytes()).at("set the host name")?;
        if !spec.domainname.is_empty() {
            rustix::system::setdomainname(spec.domainname.as_bytes()).at("set the domain name")?;
        }
    }
    for (name, value) in &spec.sysctls {
        let path = sysctl_path(name).ok_or_else(|| invalid(format!("`{name}` is no name of a parameter")))?;
        std::fs::write(&path, value).at(format!("set sysctl {name}: open {path}"))?;
    }
    Ok(())
}

/// The file of a kernel parameter. As sysctl(8) has it, the first separator in a name, a dot or a slash, is the one that counts.
pub(crate) fn sysctl_path(name: &str) -> Option<String> {
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let slashes = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'/');
    let path: String = if slashes { name.to_owned() } else { name.chars().map(swap).collect() };
    let plain = |part: &str| {
        !part.is_empty()
            && part != ".."
            && part != "."
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b':' | b'@'))
    };
    path.split('/').all(plain).then(|| format!("/proc/sys/{path}"))
}

/// Mounts at a place that must be an ordinary directory: an image must not lead these anywhere else.
pub(super) fn mount_fixed(
    root: &RootDir,
    path: &str,
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd> {
    let step = || format!("mount {kind} at {path}");
    let target = fixed_directory(root, path).at(step())?;
    let mount = mounts::new(kind, options, attributes).at(step())?;
    mounts::attach(&mount, target).at(step())?;
    Ok(mount)
}

fn fixed_directory(root: &RootDir, path: &str) -> io::Result<OwnedFd> {
    let found = match root.find_without_links(path) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            let path = Path::new(path);
            let parent = root.find_without_links(path.parent().unwrap_or(Path::new("/")))?;
            let name = path.file_name().unwrap_or_default();
            root_dir::make(parent.as_fd(), Path::new(name), Kind::Directory)?;
            root.find_without_links(path)?
        }
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Err(io::Error::other("it is a symbolic link in the image, where a directory must be"));
        }
        found => found?,
    };
    match is_directory(&found)? {
        true => Ok(found),
        false => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
    }
}

/// What the client wants to be mounted.
enum Wanted<'a> {
    Tmpfs(&'a TmpfsMount),
    Volume(&'a VolumeMount, &'a str),
    Bind(&'a BindMount, &'a str),
}

impl Wanted<'_> {
    fn path(&self) -> &str {
        match self {
            Self::Tmpfs(mount) => &mount.path,
            Self::Volume(mount, _) => &mount.path,
            Self::Bind(mount, _) => &mount.path,
        }
    }
}

fn wanted_mounts(root: &RootDir, new: &NewContainer) -> Result<()> {
    let volumes = new.spec.volumes.iter().zip(&new.volumes);
    let volumes = volumes.map(|(mount, directory)| Wanted::Volume(mount, directory));
    let binds = new.spec.binds.iter().zip(&new.trees).map(|(mount, tree)| Wanted::Bind(mount, tree));
    let mut wanted: Vec<_> = new.spec.tmpfs.iter().map(Wanted::Tmpfs).chain(volumes).chain(binds).collect();
    // What lies deeper is mounted later.
    wanted.sort_by_key(|wanted| Path::new(wanted.path()).components().count());
    for wanted in wanted {
        match wanted {
            Wanted::Tmpfs(mount) => mount_tmpfs(root, mount)?,
            Wanted::Volume(mount, directory) => mount_volume(root, mount, directory, new.devices_ruled)?,
            Wanted::Bind(mount, tree) => mount_tree(root, mount, tree, new.devices_ruled)?,
        }
    }
    Ok(())
}

fn mount_tmpfs(root: &RootDir, mount: &TmpfsMount) -> Result<()> {
    let step = || format!("mount tmpfs at {}", mount.path);
    let mut options = TmpfsOptions::parse(&mount.options)?;
    let existing = match root.find(&mount.path) {
        Ok(existing) => Some(existing),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        Err(error) => return Err(error).at(step()),
    };
    if let Some(existing) = existing {
        let mode = rustix::fs::fstat(existing).at(step())?.st_mode & 0o7777;
        options.default_mode(mode);
    }
    let target = root.find_or_make(&mount.path, Kind::Directory).at(step())?;
    let made = mounts::new("tmpfs", &options.parameters(), options.attributes()).at(step())?;
    mounts::attach(made, target).at(step())
}

/// Mounts the volumes of a container that does not run in its root, in the agent's mount namespace; what is deeper, later.
pub(crate) fn mount_volumes(root: &RootDir, mounts: &[VolumeMount], directories: &[String]) -> Result<()> {
    let mut volumes: Vec<_> = mounts.iter().zip(directories).collect();
    volumes.sort_by_key(|(mount, _)| Path::new(&mount.path).components().count());
    volumes.into_iter().try_for_each(|(mount, directory)| mount_volume(root, mount, directory, false))
}

/// `directory` is the volume in the agent's file system. A volume holds what containers wrote: no path in it is trusted.
fn mount_volume(root: &RootDir, mount: &VolumeMount, directory: &str, devices_ruled: bool) -> Result<()> {
    let step = || format!("mount a volume at {}", mount.path);
    let volume = RootDir::new(root_dir::open_directory(directory).at(step())?);
    let source = volume
        .find_directory(if mount.subpath.is_empty() { "." } else { &mount.subpath })
        .at(format!("mount `{}` of a volume at {}", mount.subpath, mount.path))?;
    let target = root.find_or_make(&mount.path, Kind::Directory).at(step())?;
    if !is_directory(&target).at(step())? {
        let message = format!("mount a volume at {}: it is not a directory in the image", mount.path);
        return Err(ApiError::new(ErrorKind::StartFailed, message));
    }
    let made = mounts::bind(&source).at(step())?;
    set_access(&made, mount.readonly, devices_ruled).at(step())?;
    mounts::attach(made, target).at(step())
}

/// `tree` is the tree in the agent's file system: its root is what the host granted, and what it holds is the host's.
fn mount_tree(root: &RootDir, mount: &BindMount, tree: &str, devices_ruled: bool) -> Result<()> {
    let step = || format!("error mounting a tree of the host to rootfs at \"{}\"", mount.path);
    let source = root_dir::open(tree).at(step())?;
    let kind = if is_directory(&source).at(step())? { Kind::Directory } else { Kind::File };
    let target = root.find_or_make(&mount.path, kind).at(step())?;
    if is_directory(&target).at(step())? != (kind == Kind::Directory) {
        let message = format!(
            "{}: not a directory: Are you trying to mount a directory onto a file (or vice-versa)? \
             Check if the specified host path exists and is the expected type",
            step()
        );
        return Err(ApiError::new(ErrorKind::StartFailed, message));
    }
    let made = mounts::bind(&source).at(step())?;
    set_access(&made, mount.readonly, devices_ruled).at(step())?;
    mounts::attach(made, target).at(step())
}

/// What a container may do with a mount of what the agent has without rights of any kind. As with Docker, a program in it has its owner's
/// rights, in this machine; device nodes open something where the use of devices is ruled otherwise.
fn set_access(mount: &OwnedFd, readonly: bool, devices_ruled: bool) -> io::Result<()> {
    let readonly = if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let (set, clear) = match devices_ruled {
        true => (readonly, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV),
        false => (readonly | libc::MOUNT_ATTR_NODEV, libc::MOUNT_ATTR_NOSUID),
    };
    sys::mount_setattr(mount, false, set, clear)
}

fn hide(root: &RootDir, paths: &[String]) -> Result<()> {
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let step = || format!("hide {path}");
        let Some(target) = existing(root, path).at(step())? else { continue };
        if !is_directory(&target).at(step())? {
            mounts::attach(mounts::bind_path("/dev/null").at(step())?, target).at(step())?;
            continue;
        }
        // One empty directory serves all; the first one is attached, the others are bind mounts of it.
        match &empty {
            Some(empty) => mounts::attach(mounts::bind(empty).at(step())?, target).at(step())?,
            None => {
                let attributes = RDONLY | NOSUID | NODEV | NOEXEC;
                let made = mounts::new("tmpfs", &[("size", "4096")], attributes).at(step())?;
                mounts::attach(&made, target).at(step())?;
                empty = Some(made);
            }
        }
    }
    Ok(())
}

fn make_readonly(root: &RootDir, path: &str) -> Result<()> {
    let step = || format!("make {path} read-only");
    let Some(target) = existing(root, path).at(step())? else { return Ok(()) };
    let tree = mounts::bind_tree(&target).at(step())?;
    sys::mount_setattr(&tree, true, libc::MOUNT_ATTR_RDONLY, 0).at(step())?;
    mounts::attach(tree, target).at(step())
}

fn existing(root: &RootDir, path: &str) -> io::Result<Option<OwnedFd>> {
    match root.find(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_directory(fd: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parameters_become_paths_below_proc_sys() {
        for (name, path) in [
            ("net.core.somaxconn", Some("/proc/sys/net/core/somaxconn")),
            ("net.ipv4.conf.eth0/100.forwarding", Some("/proc/sys/net/ipv4/conf/eth0.100/forwarding")),
            ("net/ipv4/conf/eth0.100/forwarding", Some("/proc/sys/net/ipv4/conf/eth0.100/forwarding")),
            ("net/../kernel/core_pattern", None),
            ("net..x", None),
            ("", None),
            ("net.a b", None),
        ] {
            assert_eq!(sysctl_path(name).as_deref(), path, "{name}");
        }
    }
}
