//! cgroup v2: one group per container below one parent. A limit whose controller is missing is refused by name; killing and
//! waiting for emptiness work without any controller.

mod devices;
mod limits;
mod stats;

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_agent_api::{ApiError, ErrorKind, ProcessId, Resources};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};

use crate::bpf::{self, Purpose};
use crate::error::{AtStep, Result};
pub(crate) use devices::Devices;
use limits::{File, Limits};

/// How long processes may take to stand still: one that waits for a disk does so only when the disk has answered.
const FREEZE_TIME: Duration = Duration::from_secs(10);
const WANTED: [&str; 5] = ["cpu", "memory", "pids", "io", "cpuset"];

/// Of the processes that containers may have, one that was given no limit gets this part, so that others are left with some.
const SHARE_OF_PROCESSES: (u64, u64) = (3, 4);
/// A container's own groups below the one it was given: how deep they are, and how many there are, at most.
const MAX_DEPTH: usize = 32;
const MAX_GROUPS: usize = 4096;
/// The group of the agent's own helpers, in that of all containers.
pub(crate) const HELPERS: &str = "helpers";

/// What all containers leave to the agent and the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Bytes of memory.
    pub memory: u64,
    /// Processes.
    pub processes: u64,
}

/// The parent of all containers' groups.
pub(crate) struct Cgroups {
    directory: PathBuf,
    limits: Limits,
    /// The device program of containers that ask for nothing special; none where the kernel takes no such programs.
    device_program: Option<OwnedFd>,
    parents: Arc<Parents>,
}

/// Groups that containers name as their parents: they come with the first and go with the last of them. Held while that may be so.
#[derive(Debug, Default)]
struct Parents(Mutex<()>);

impl Parents {
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By what the kernel knows a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Its number.
    pub id: u64,
    /// How far it is below the root of the hierarchy.
    pub level: u32,
}

impl Cgroups {
    /// Makes the parent group and hands it every controller there is. With `room`, containers together cannot take all.
    pub(crate) fn new(mount: &Path, name: &str, room: Option<Room>) -> io::Result<Self> {
        let directory = mount.join(name);
        enable(mount)?;
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        enable(&directory)?;
        let text = std::fs::read_to_string(directory.join("cgroup.subtree_control"))?;
        let controllers: HashSet<String> = text.split_whitespace().map(str::to_owned).collect();
        let processes = room.and_then(|room| leave_room(&directory, room));
        let processes = processes.map(|all| all / SHARE_OF_PROCESSES.1 * SHARE_OF_PROCESSES.0);
        let device_program = match devices::load(&[]) {
            Ok(program) => Some(program),
            Err(error) => {
                tracing::warn!(
                    "the kernel takes no rules for devices, containers have the usual ones only: {error}"
                );
                None
            }
        };
        Ok(Self {
            directory,
            limits: Limits { controllers, root: mount.to_owned(), processes },
            device_program,
            parents: Arc::default(),
        })
    }

    /// The group of all containers.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(CWD, &self.directory, flags, Mode::empty())?)
    }

    /// Whether containers' use of devices can be ruled.
    pub(crate) fn rule_devices(&self) -> bool {
        self.device_program.is_some()
    }

    /// Makes the group of the agent's own helpers, which belong to no container.
    pub(crate) fn create_for_helpers(&self) -> io::Result<Cgroup> {
        let path = self.directory.join(HELPERS);
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, &path, flags, Mode::empty())?;
        Ok(self.group(path, directory))
    }

    fn group(&self, path: PathBuf, directory: OwnedFd) -> Cgroup {
        let level = path.strip_prefix(&self.limits.root).map_or(0, |below| below.components().count());
        let (base, parents) = (self.directory.clone(), self.parents.clone());
        Cgroup { path, base, directory, level: u32::try_from(level).unwrap_or(u32::MAX), parents }
    }

    /// Makes a container's group, below a parent if one is named, with its limits and its devices.
    pub(crate) fn create(
        &self,
        id: &ProcessId,
        parent: &str,
        resources: &Resources,
        devices: &Devices,
    ) -> Result<Cgroup> {
        let files = self.limits.files(resources)?;
        let path = self.make_path(id, parent)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(CWD, &path, flags, Mode::empty()).at("open the cgroup")?;
        let group = self.group(path, opened);
        let made = group
            .bound()
            .and_then(|()| group.write(&files))
            .and_then(|()| self.give_devices(&group, devices));
        if let Err(error) = made {
            let _ = group.remove();
            return Err(error);
        }
        Ok(group)
    }

    /// Makes the directory of a container's group and those that lead to it. What fails on the way leaves nothing behind.
    fn make_path(&self, id: &ProcessId, parent: &str) -> Result<PathBuf> {
        let _alone = self.parents.alone();
        let mut path = self.directory.clone();
        let mut make = || {
            for name in parent.split('/').filter(|name| !name.is_empty()) {
                path.push(name);
                make_group(&path)?;
                enable(&path).at("use the parent cgroup")?;
            }
            path.push(id.as_str());
            make_group(&path)
        };
        match make() {
            Ok(()) => Ok(path),
            Err(error) => {
                let _ = std::fs::remove_dir(&path);
                remove_parents(&path, &self.directory);
                Err(error)
            }
        }
    }

    fn give_devices(&self, group: &Cgroup, devices: &Devices) -> Result<()> {
        let special;
        let program = match (devices, &self.device_program) {
            (Devices::All, _) => return Ok(()),
            (Devices::Rules(rules), None) if rules.is_empty() => return Ok(()),
            (Devices::Rules(_), None) => {
                let message = "devices cannot be given: this kernel takes no rules for them";
                return Err(ApiError::new(ErrorKind::Unsupported, message));
            }
            (Devices::Rules(rules), Some(common)) if rules.is_empty() => common,
            (Devices::Rules(rules), Some(_)) => {
                special = devices::load(rules).at("load the rules for devices")?;
                &special
            }
        };
        let directory = std::fs::File::open(&group.path).at("open the cgroup")?;
        bpf::attach(Purpose::Devices, directory.as_fd(), program.as_fd()).at("rule the use of devices")
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
        let _ = remove_tree(&self.directory, MAX_DEPTH);
    }
}

/// Makes a group, unless it is there.
fn make_group(path: &Path) -> Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error).at("make the cgroup"),
        _ => Ok(()),
    }
}

/// Removes the groups above one, up to that of all containers, as far as they are empty.
fn remove_parents(group: &Path, base: &Path) {
    for parent in group.ancestors().skip(1).take_while(|parent| *parent != base) {
        // In use, or not made: then so are those above.
        if std::fs::remove_dir(parent).is_err_and(|error| error.kind() != io::ErrorKind::NotFound) {
            break;
        }
    }
}

/// Sets limits for all containers together; how many processes they may have.
fn leave_room(directory: &Path, room: Room) -> Option<u64> {
    let set = |name: &str, value: u64| {
        if let Err(error) = std::fs::write(directory.join(name), value.to_string()) {
            tracing::warn!("{name} of all containers cannot be set: {error}");
        }
    };
    let memory = stats::all_memory();
    // A machine so small has nothing to give away.
    if memory > 2 * room.memory {
        set("memory.max", memory - room.memory);
    }
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let most = number("/proc/sys/kernel/pid_max")?.min(number("/proc/sys/kernel/threads-max")?);
    let processes = most.checked_sub(room.processes)?;
    set("pids.max", processes);
    Some(processes)
}

/// Removes a group and those below it, which are empty.
fn remove_tree(group: &Path, depth: usize) -> io::Result<()> {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path(), depth - 1)?;
        }
    }
    std::fs::remove_dir(group)
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
    /// The group of all containers.
    base: PathBuf,
    directory: OwnedFd,
    /// See [`Identity`].
    level: u32,
    parents: Arc<Parents>,
}

impl Cgroup {
    /// The directory, for CLONE_INTO_CGROUP.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// By what the kernel knows it.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        Ok(Identity { id: rustix::fs::fstat(&self.directory)?.st_ino, level: self.level })
    }

    /// A container that may make groups of its own cannot make more than can be removed again.
    fn bound(&self) -> Result<()> {
        for (name, most) in [("cgroup.max.depth", MAX_DEPTH), ("cgroup.max.descendants", MAX_GROUPS)] {
            std::fs::write(self.path.join(name), most.to_string()).at(format!("write `{most}` to {name}"))?;
        }
        Ok(())
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
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::fs::write(self.path.join("cgroup.kill"), "1")?;
                wait_until_empty(&self.path)?;
                remove_tree(&self.path, MAX_DEPTH)?;
            }
            result => result?,
        }
        // A parent that was named by containers goes with the last of them, unless the next one is just coming.
        let _alone = self.parents.alone();
        remove_parents(&self.path, &self.base);
        Ok(())
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
