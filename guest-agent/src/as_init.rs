//! The agent as PID 1 of the guest: mounts what a system needs, leaves the initramfs, and tells the host when it is ready.
//! A failure on the way ends PID 1, and with it the VM; the kernel's log says why.

use std::io;
use std::path::Path;

use coracle_agent_api::{AGENT_PORT, READY_PORT};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move};
use rustix::process::Resource;
use rustix::system::RebootCommand;
use tokio::io::AsyncWriteExt;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::agent::{Agent, Paths};
use crate::cgroup::Room;
use crate::egress::Egress;
use crate::incoming::Incoming;
use crate::{Phases, cgroup, fork_server, hello, http, reap_orphans, runtime, sys};

const DATA_DISK: &str = "/dev/vda";
const DATA: &str = coracle_agent_api::DATA_DISK;
const CGROUP: &str = "/sys/fs/cgroup";
/// What the agent itself is guaranteed of the memory.
const OWN_MEMORY: u64 = 32 * 1024 * 1024;
/// The most that the kernel knows: whatever containers do, the agent has its turn at once.
const MOST_WEIGHT: &str = "10000";
/// What all containers together leave to the agent and the kernel.
const ROOM: Room = Room { memory: 64 * 1024 * 1024, processes: 1024 };
const MAX_FILES: u64 = 1_048_576;

/// Whether this process is the first of a system.
pub fn is_init() -> bool {
    std::process::id() == 1
}

/// Runs until the host asks for the end, then restarts the machine, which ends the VM.
pub fn run() -> io::Result<()> {
    let mut phases = Phases::default();
    phases.mark("agent-started");
    leave_initramfs()?;
    mount_system()?;
    set_limits();
    phases.mark("mounted");
    mount_data()?;
    phases.mark("data-mounted");
    own_cgroup()?;
    let fork_server = fork_server::start()?;
    let runtime = runtime()?;
    runtime.block_on(serve(fork_server, phases))?;
    drop(runtime);
    end()
}

/// The initramfs cannot be a container's old root (the kernel refuses pivot_root there), so everything moves to a tmpfs.
fn leave_initramfs() -> io::Result<()> {
    const NEW_ROOT: &str = "/new-root";
    std::fs::create_dir_all(NEW_ROOT)?;
    mount("root", NEW_ROOT, "tmpfs", MountFlags::NOSUID, c"mode=755")?;
    rustix::process::chdir(NEW_ROOT)?;
    for name in ["proc", "sys", "dev", "data", "run", "tmp", "layers", "root"] {
        std::fs::create_dir(name)?;
    }
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn mount_system() -> io::Result<()> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", plain, None)?;
    mount("sysfs", "/sys", "sysfs", plain, None)?;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=755")?;
    std::fs::create_dir_all("/dev/pts")?;
    mount(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        c"ptmxmode=0666,mode=0620,gid=5",
    )?;
    // For containers that share the guest's own.
    std::fs::create_dir_all("/dev/shm")?;
    mount("shm", "/dev/shm", "tmpfs", plain, c"mode=1777")?;
    // No container changes the limits of its own group, which is the root of what it sees.
    mount("cgroup2", CGROUP, "cgroup2", plain, c"nsdelegate")?;
    sys::loopback_up()
}

/// The limits that containers inherit, as Docker's daemon gives them.
fn set_limits() {
    let files = rustix::process::Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    let unlimited = rustix::process::Rlimit { current: None, maximum: None };
    for (resource, limit) in [(Resource::Nofile, files), (Resource::Nproc, unlimited)] {
        if let Err(error) = rustix::process::setrlimit(resource, limit) {
            tracing::warn!("raising a resource limit failed: {error}");
        }
    }
}

fn mount_data() -> io::Result<()> {
    let step = |error| io::Error::other(format!("mount {DATA_DISK} at {DATA}: {error}"));
    mount(DATA_DISK, DATA, "ext4", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME, c"discard")
        .map_err(step)
}

/// The agent's own group, with memory that no container can take from it.
fn own_cgroup() -> io::Result<()> {
    let group = Path::new(CGROUP).join("agent");
    cgroup::enable(Path::new(CGROUP))?;
    std::fs::create_dir_all(&group)?;
    std::fs::write(group.join("cgroup.procs"), "0")?;
    let minimum = group.join("memory.min");
    if minimum.exists() {
        std::fs::write(minimum, OWN_MEMORY.to_string())?;
    }
    let weight = group.join("cpu.weight");
    if weight.exists() {
        std::fs::write(weight, MOST_WEIGHT)?;
    }
    Ok(())
}

async fn serve(fork_server: fork_server::Unattached, mut phases: Phases) -> io::Result<()> {
    let paths = Paths {
        data: DATA.into(),
        layers: "/layers".into(),
        mount_point: "/root".into(),
        stopped: "/run/stopped".into(),
        cgroup: CGROUP.into(),
        cgroup_name: "coracle".to_owned(),
        room: Some(ROOM),
        host_trees: Some("/run/coracle/host".into()),
        engine_sockets: "/run/coracle/engine".into(),
        shm: "/run/shm".into(),
    };
    let egress = Egress::start(Incoming::Vsock)?;
    let agent = Agent::new(&paths, fork_server.attach()?, egress, false)?;
    tokio::spawn(reap_orphans(agent.clone()));
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT))?;
    let mut ready = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await?;
    phases.mark("ready");
    ready.write_all(&hello(phases)).await?;
    let server = tokio::spawn(http::serve_vsock(agent.clone(), listener));
    // Only now, so that a big disk does not make anyone wait.
    std::thread::Builder::new().name("grow".into()).spawn(|| {
        if let Err(error) = grow_data() {
            tracing::error!("growing the data disk's file system failed: {error}");
        }
    })?;
    tokio::select! {
        result = server => result.map_err(io::Error::other)??,
        () = agent.shutdown_requested() => {}
    }
    agent.stop().await;
    Ok(())
}

/// Grows the data disk's file system to the size of the disk.
fn grow_data() -> io::Result<()> {
    let sectors = std::fs::read_to_string("/sys/class/block/vda/size")?;
    let disk = sectors.trim().parse::<u64>().map_err(io::Error::other)?.saturating_mul(512);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, DATA, flags, Mode::empty())?;
    debug_assert!(FileType::from_raw_mode(rustix::fs::fstat(&directory)?.st_mode) == FileType::Directory);
    let stat = rustix::fs::fstatfs(&directory)?;
    let block =
        u64::try_from(stat.f_bsize).ok().filter(|size| *size > 0).ok_or(io::ErrorKind::InvalidData)?;
    // The kernel answers at once when the file system has that size already.
    rustix::fs::ext4_ioc_resize_fs(&directory, disk / block)?;
    Ok(())
}

/// Writes everything to disk and restarts the machine.
fn end() -> io::Result<()> {
    rustix::fs::sync();
    if let Err(error) = rustix::mount::unmount(DATA, UnmountFlags::empty()) {
        tracing::warn!("unmounting {DATA} failed, it is made read-only: {error}");
        rustix::mount::mount_remount(DATA, MountFlags::RDONLY, c"")?;
    }
    rustix::fs::sync();
    rustix::system::reboot(RebootCommand::Restart)?;
    Ok(())
}
