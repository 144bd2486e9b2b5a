//! cgroup v2: one group per container below one parent. A limit whose controller is missing is refused by name; killing and
//! waiting for emptiness work without any controller.

mod limits;
mod stats;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_agent_api::{ProcessId, Resources};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};

use crate::error::{AtStep, Result};
use limits::{File, Limits};

/// How long processes may take to stand still: one that waits for a disk does so only when the disk has answered.
const FREEZE_TIME: Duration = Duration::from_secs(10);
const WANTED: [&str; 5] = ["cpu", "memory", "pids", "io", "cpuset"];

/// The parent of all containers' groups.
pub(crate) struct Cgroups {
    directory: PathBuf,
    limits: Limits,
}

impl Cgroups {
    /// Makes the parent group and hands it every controller there is.
    pub(crate) fn new(mount: &Path, name: &str) -> io::Result<Self> {
        let directory = mount.join(name);
        enable(mount)?;
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        enable(&directory)?;
        let text = std::fs::read_to_string(directory.join("cgroup.subtree_control"))?;
        let controllers = text.split_whitespace().map(str::to_owned).collect();
        Ok(Self { directory, limits: Limits { controllers, root: mount.to_owned() } })
    }

    /// Makes the group of the agent's own helpers, which belong to no container.
    pub(crate) fn create_for_helpers(&self) -> io::Result<Cgroup> {
        let path = self.directory.join("helpers");
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, &path, flags, Mode::empty())?;
        Ok(Cgroup { path, directory })
    }

    /// Makes a container's group with its limits.
    pub(crate) fn create(&self, id: &ProcessId, resources: &Resources) -> Result<Cgroup> {
        let files = self.limits.files(resources)?;
        let path = self.directory.join(id.as_str());
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).at("make the cgroup");
            }
            _ => {}
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, &path, flags, Mode::empty()).at("open the cgroup")?;
        let group = Cgroup { path, directory };
        if let Err(error) = group.write(&files) {
            let _ = std::fs::remove_dir(&group.path);
            return Err(error);
        }
        Ok(group)
    }

    /// Changes those limits of a container that are set.
    pub(crate) fn change(&self, group: &Cgroup, resources: &Resources) -> Result<()> {
        group.write(&self.limits.files(resources)?)
    }

    /// Kills everything in all groups, and removes them with the parent. Blocks until all are empty.
    pub(crate) fn remove(self) {
        let _ = std::fs::write(self.directory.join("cgroup.kill"), "1");
        if let Err(error) = wait_until_empty(&self.directory) {
            tracing::warn!("the containers' cgroup does not become empty: {error}");
        }
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(entry.path());
        }
        let _ = std::fs::remove_dir(&self.directory);
    }
}

/// Hands what controllers there are to the groups below; one that cannot be had is not an error until it is asked for.
pub(crate) fn enable(directory: &Path) -> io::Result<()> {
    let available = std::fs::read_to_string(directory.join("cgroup.controllers"))?;
    for controller in available.split_whitespace().filter(|name| WANTED.contains(name)) {
        if let Err(error) = std::fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"))
        {
            tracing::debug!("the cgroup controller {controller} cannot be used: {error}");
        }
    }
    Ok(())
}

/// A container's group.
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// The directory, for CLONE_INTO_CGROUP.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    fn write(&self, files: &[File]) -> Result<()> {
        for File { name, value } in files {
            let path = self.path.join(name);
            if name.starts_with("memory.swap") && !path.exists() {
                // The kernel has no swap at all, so that every limit of it is kept.
                continue;
            }
            std::fs::write(path, value).at(format!("write `{value}` to {name}"))?;
        }
        Ok(())
    }

    /// How often the kernel killed a process in it for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let Ok(text) = std::fs::read_to_string(self.path.join("memory.events")) else { return 0 };
        let value = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
    }

    /// Whether it was asked to stand still.
    pub(crate) fn is_frozen(&self) -> bool {
        std::fs::read_to_string(self.path.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    /// Freezes every process in it, or lets them run on, and waits until that is so. Blocks.
    pub(crate) fn freeze(&self, freeze: bool) -> io::Result<()> {
        let state = |freeze| if freeze { "1" } else { "0" };
        std::fs::write(self.path.join("cgroup.freeze"), state(freeze))?;
        let wanted = if freeze { "frozen 1" } else { "frozen 0" };
        let result = wait_for_event(&self.path, wanted, Some(FREEZE_TIME));
        if result.is_err() {
            // Half frozen is no state.
            let _ = std::fs::write(self.path.join("cgroup.freeze"), state(false));
        }
        result
    }

    /// Kills what is left in it, waits until it is empty, and removes it. Blocks.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir(&self.path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            result => return result,
        }
        std::fs::write(self.path.join("cgroup.kill"), "1")?;
        wait_until_empty(&self.path)?;
        std::fs::remove_dir(&self.path)
    }
}

/// Waits for the kernel's notification that no process is left.
fn wait_until_empty(group: &Path) -> io::Result<()> {
    wait_for_event(group, "populated 0", None)
}

/// Waits for a line of `cgroup.events`; the kernel tells when the file changes.
fn wait_for_event(group: &Path, wanted: &str, limit: Option<Duration>) -> io::Result<()> {
    use std::io::{Read, Seek};
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut events = std::fs::File::open(group.join("cgroup.events"))?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == wanted) {
            return Ok(());
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| left.try_into().ok());
        let mut fds = [PollFd::new(&events, PollFlags::PRI)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
