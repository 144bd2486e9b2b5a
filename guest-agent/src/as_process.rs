//! The agent as an ordinary root process: mount and network namespaces of its own, unix sockets instead of vsock, layers from files. It
//! ends on SIGTERM, SIGINT or `POST /v1/shutdown`, and leaves no process, mount or cgroup behind.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountAttrFlags, MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::{Agent, Paths};
use crate::egress::Egress;
use crate::incoming::Incoming;
use crate::{Phases, child, fork_server, hello, http, mounts, reap_orphans, runtime, sys};

/// How the process is started.
#[derive(Debug)]
pub struct Options {
    /// Where the API is served; the socket is made.
    pub listen: PathBuf,
    /// Where someone listens for the agent's `Hello`.
    pub ready: PathBuf,
    /// Where streams are handed in; the socket is made. Without it, none are.
    pub streams: Option<PathBuf>,
    /// For containers' writable layers; made if it is missing.
    pub data: PathBuf,
}

/// Runs until it is told to end. The process must have one thread.
pub fn run(options: &Options) -> io::Result<()> {
    let mut phases = Phases::default();
    phases.mark("agent-started");
    sys::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET)?;
    sys::loopback_up()?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    std::fs::create_dir_all(&options.data)?;
    let data = options.data.canonicalize()?;
    let run = data.join("run");
    mount_at("tmpfs", &run, &[("mode", "700")])?;
    let paths = Paths {
        layers: run.join("layers"),
        mount_point: run.join("root"),
        stopped: run.join("stopped"),
        cgroup: run.join("cgroup"),
        room: None,
        host_trees: None,
        engine_sockets: run.join("engine"),
        shm: run.join("shm"),
        cgroup_name: format!("coracle-{}", std::process::id()),
        data,
    };
    mount_at("cgroup2", &paths.cgroup, &[])?;
    remove_stale_cgroups(&paths.cgroup);
    phases.mark("mounted");
    let fork_server = fork_server::start()?;
    let runtime = runtime()?;
    let agent = runtime.block_on(serve(options, &paths, fork_server, phases))?;
    // With the last task, the last user of the cgroups is gone.
    drop(runtime);
    if let Some(cgroups) = agent.cgroups() {
        cgroups.remove();
    }
    let _ = std::fs::remove_file(&options.listen);
    Ok(())
}

async fn serve(
    options: &Options,
    paths: &Paths,
    fork_server: fork_server::Unattached,
    mut phases: Phases,
) -> io::Result<std::sync::Arc<Agent>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let egress = Egress::start(Incoming::unix(options.streams.as_deref())?)?;
    let agent = Agent::new(paths, fork_server.attach()?, egress, true)?;
    tokio::spawn(reap_orphans(agent.clone()));
    let listener = UnixListener::bind(&options.listen)?;
    let mut ready = UnixStream::connect(&options.ready).await?;
    phases.mark("ready");
    ready.write_all(&hello(phases)).await?;
    tokio::select! {
        result = http::serve_unix(agent.clone(), listener) => result?,
        () = agent.shutdown_requested() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    agent.stop().await;
    drop(ready);
    Ok(agent)
}

fn mount_at(kind: &str, target: &Path, options: &[(&str, &str)]) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    mounts::attach(mounts::new(kind, options, attributes)?, child::open_directory(target)?)
}

/// Removes what agents that were killed left behind. Their containers died with them.
fn remove_stale_cgroups(mount: &Path) {
    for entry in std::fs::read_dir(mount).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix("coracle-"))
            .and_then(|pid| pid.parse::<u32>().ok());
        let Some(pid) = pid else { continue };
        if Path::new(&format!("/proc/{pid}")).exists() {
            continue;
        }
        for group in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(group.path());
        }
        let _ = std::fs::remove_dir(entry.path());
    }
}
