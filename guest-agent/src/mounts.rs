//! Mounts by file descriptor: a file system is made detached and then attached to a handle, so that no path is resolved
//! twice and none outside the container's root.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// A detached mount of a new file system. An option without a value is a flag.
pub(crate) fn new(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        let result = match value.is_empty() {
            true => fsconfig_set_flag(&context, *key),
            false => fsconfig_set_string(&context, *key, *value),
        };
        result.map_err(|error| because(&context, error))?;
    }
    fsconfig_create(&context).map_err(|error| because(&context, error))?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|error| because(&context, error))
}

/// The kernel's error number keeps its meaning; what the file system wrote about it goes to the log.
fn because(context: &OwnedFd, error: rustix::io::Errno) -> io::Error {
    let mut line = [0; 512];
    while let Ok(len) = rustix::io::read(context, &mut line) {
        if len == 0 {
            break;
        }
        eprintln!("coracle-agent: mount: {}", String::from_utf8_lossy(&line[..len]).trim_end());
    }
    error.into()
}

/// Attaches a detached mount to what a handle refers to.
pub(crate) fn attach(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", target, "", flags)?)
}

/// A detached bind mount of what a handle refers to.
pub(crate) fn bind(source: impl AsFd) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(source, "", flags)?)
}

/// As [`bind`], with everything that is mounted below.
pub(crate) fn bind_tree(source: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(source, "", flags)?)
}

/// A detached bind mount of a path in the agent's own file system.
pub(crate) fn bind_path(source: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, source.as_ref(), flags)?)
}
