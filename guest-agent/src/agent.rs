//! The agent itself: what the API's calls do. Starting goes through four stations: prepare (mounts, cgroup, files; blocking
//! work off the event loop), clone (the fork server), set-up (the new process reports), supervise (a task per process).

mod connect;
mod files;
mod start;

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_agent_api::{
    AgentState, DiffId, ErrorKind, ExitStatus, ProcessId, ProcessState, Processes, Resources, Retain, Stats,
    VolumeId, VolumeUsage,
};
use tokio::sync::watch;

use crate::cgroup::{Cgroups, Room};
use crate::containers::{Container, Containers, Holdings};
use crate::egress::Egress;
use crate::error::{AtStep, Result, conflict, from_io, not_found};
use crate::fork_server::ForkServer;
use crate::host_trees::HostTrees;
use crate::incoming::Descriptors;
use crate::layers::Layers;
use crate::network::Networks;
use crate::network::forward::Forwards;
use crate::network::listeners::Listeners;
use crate::network::names::Upstream;
use crate::processes::{self, Process, Registry};
use crate::reaper::Reaper;
use crate::seccomp;
use crate::storage::{self, Storage};
use crate::volumes::Volumes;
use crate::{check, clock};

/// Where the agent keeps its things.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    /// The data disk.
    pub data: PathBuf,
    /// Layers are mounted below this directory.
    pub layers: PathBuf,
    /// An empty directory.
    pub mount_point: PathBuf,
    /// Roots of stopped containers are mounted below this directory while someone works on their files.
    pub stopped: PathBuf,
    /// The mounted cgroup2 file system.
    pub cgroup: PathBuf,
    /// Name of the group that holds all containers.
    pub cgroup_name: String,
    /// What all containers together leave to others.
    pub room: Option<Room>,
    /// Where the file system that the host exports is mounted when it is first needed; none where there is no host.
    pub host_trees: Option<PathBuf>,
    /// Sockets of the daemon's API are made below this directory.
    pub engine_sockets: PathBuf,
    /// What containers share with others through memory is mounted below this directory.
    pub shm: PathBuf,
}

/// The agent.
pub(crate) struct Agent {
    fork_server: ForkServer,
    egress: Arc<Egress>,
    processes: Registry,
    containers: Containers,
    files: files::Helpers,
    layers: Arc<Layers>,
    storage: Arc<Storage>,
    volumes: Arc<Volumes>,
    host_trees: HostTrees,
    networks: Arc<Networks>,
    forwards: Arc<Forwards>,
    listeners: Arc<Listeners>,
    /// Who is asked for names that are no container's.
    upstream: Arc<dyn Upstream>,
    cgroups: Arc<Cgroups>,
    seccomp: Arc<seccomp::Compiler>,
    reaper: Reaper,
    mount_point: String,
    stopped: PathBuf,
    shm: PathBuf,
    engine_sockets: PathBuf,
    die_with_agent: bool,
    shutdown: watch::Sender<bool>,
    /// Set before everything is killed; what starts afterwards kills itself.
    stopping: AtomicBool,
}

impl Agent {
    /// Sets the agent up; `die_with_agent` where it is not PID 1.
    pub(crate) fn new(
        paths: &Paths,
        fork_server: ForkServer,
        egress: Arc<Egress>,
        die_with_agent: bool,
    ) -> std::io::Result<Arc<Self>> {
        std::fs::create_dir_all(&paths.layers)?;
        std::fs::create_dir_all(&paths.mount_point)?;
        std::fs::create_dir_all(&paths.shm)?;
        let mount_point = paths.mount_point.to_str().ok_or(std::io::ErrorKind::InvalidInput)?.to_owned();
        let reaper = Reaper::default();
        reaper.is_awaited(fork_server.pid());
        let cgroups = Arc::new(Cgroups::new(&paths.cgroup, &paths.cgroup_name, paths.room)?);
        let networks = Arc::new(Networks::new()?);
        let forwards = Forwards::new(networks.directory().clone(), egress.runtime().clone());
        egress.take_arrivals(forwards.clone());
        let listeners = Listeners::start(cgroups.open()?.as_fd(), egress.runtime());
        Ok(Arc::new(Self {
            fork_server,
            upstream: egress.clone(),
            egress,
            processes: Registry::default(),
            containers: Containers::default(),
            files: files::Helpers::new(cgroups.create_for_helpers()?),
            layers: Layers::new(paths.layers.clone()),
            storage: Arc::new(Storage::new(&paths.data)?),
            volumes: Arc::new(Volumes::new(&paths.data)?),
            host_trees: HostTrees::new(paths.host_trees.clone()),
            networks,
            forwards,
            listeners,
            cgroups,
            seccomp: Arc::default(),
            reaper,
            mount_point,
            stopped: paths.stopped.clone(),
            shm: paths.shm.clone(),
            engine_sockets: paths.engine_sockets.clone(),
            die_with_agent,
            shutdown: watch::Sender::new(false),
            stopping: AtomicBool::new(false),
        }))
    }

    /// `GET /v1/state`.
    pub(crate) fn state(&self) -> AgentState {
        let paused = |id: &ProcessId| {
            self.containers.running(id).is_some_and(|container| container.cgroup.is_frozen())
        };
        let state = |process: &Arc<Process>| ProcessState {
            paused: process.id == process.container && paused(&process.id),
            ..process.state()
        };
        let processes = self.processes.all().iter().map(state).collect();
        AgentState { processes, layers: self.layers.list() }
    }

    /// The containers' way out.
    pub(crate) fn egress(&self) -> Arc<Egress> {
        self.egress.clone()
    }

    /// A process that was started and not forgotten.
    pub(crate) fn process(&self, id: &ProcessId) -> Result<Arc<Process>> {
        self.processes.get(id)
    }

    /// Forgets an ended process.
    pub(crate) fn forget(&self, id: &ProcessId) -> Result<()> {
        self.processes.forget(id)?;
        self.descriptors().were_freed();
        Ok(())
    }

    /// Unmounts a layer.
    pub(crate) async fn release_layer(&self, id: DiffId) -> Result<()> {
        // Containers that have ended hold their layers a moment longer.
        self.containers.wait_ended_gone().await;
        let layers = self.layers.clone();
        blocking(move || layers.release(&id)).await
    }

    /// Removes a stopped container's writable layer. The deletion of its files goes on after the answer.
    pub(crate) async fn remove_container(self: &Arc<Self>, id: &ProcessId) -> Result<()> {
        // Taken, so that no start comes in between. An ended process keeps the id taken by itself.
        let _reservation = match self.processes.is_active(id) {
            true => return Err(conflict(format!("container {} is running", id.short()))),
            false => self.processes.reserve(id).ok(),
        };
        self.files.settle(id, Duration::ZERO).await;
        let (storage, owned) = (self.storage.clone(), id.clone());
        let trash = blocking(move || {
            storage.remove(&owned).at_kind(ErrorKind::Internal, "remove the writable layer")
        })
        .await?;
        if let Some(trash) = trash {
            let (agent, id) = (self.clone(), id.clone());
            tokio::spawn(async move {
                agent.containers.wait_gone(&id).await;
                let _ = tokio::task::spawn_blocking(move || storage::delete(&trash)).await;
            });
        }
        Ok(())
    }

    /// Removes the writable layers of all containers that are neither named nor running.
    pub(crate) async fn retain(self: &Arc<Self>, retain: &Retain) -> Result<()> {
        let storage = self.storage.clone();
        let known =
            blocking(move || storage.list().at_kind(ErrorKind::Internal, "list the writable layers")).await?;
        let keep: HashSet<_> = retain.containers.iter().collect();
        for id in known.iter().filter(|id| !keep.contains(id) && !self.processes.is_active(id)) {
            self.remove_container(id).await?;
        }
        let Some(keep) = &retain.volumes else { return Ok(()) };
        let volumes = self.volumes.clone();
        let known = blocking(move || volumes.list().at_kind(ErrorKind::Internal, "list the volumes")).await?;
        let keep: HashSet<_> = keep.iter().collect();
        for id in known.iter().filter(|id| !keep.contains(id)) {
            self.remove_volume(id).await?;
        }
        Ok(())
    }

    /// Every volume with the space that it takes.
    pub(crate) async fn volumes(&self) -> Result<Vec<VolumeUsage>> {
        let volumes = self.volumes.clone();
        blocking(move || volumes.usage().at_kind(ErrorKind::Internal, "measure the volumes")).await
    }

    /// Removes a volume. The deletion of its files goes on after the answer.
    pub(crate) async fn remove_volume(&self, id: &VolumeId) -> Result<()> {
        let (volumes, storage, id) = (self.volumes.clone(), self.storage.clone(), id.clone());
        let trash =
            blocking(move || volumes.remove(&id, &storage).at_kind(ErrorKind::Internal, "remove the volume"))
                .await?;
        if let Some(trash) = trash {
            tokio::task::spawn_blocking(move || storage::delete(&trash));
        }
        Ok(())
    }

    /// A container that runs.
    pub(crate) fn running(&self, id: &ProcessId) -> Result<Arc<Container>> {
        if let Some(container) = self.containers.running(id) {
            return Ok(container);
        }
        let short = id.short();
        Err(match self.processes.get(id) {
            Ok(_) => conflict(format!("container {short} is not running")),
            Err(error) if error.kind == ErrorKind::Conflict => error,
            Err(_) => not_found(format!("there is no container {short}")),
        })
    }

    /// Freezes a container's processes, or lets them run on.
    pub(crate) async fn pause(&self, id: &ProcessId, pause: bool) -> Result<()> {
        let container = self.running(id)?;
        let what = if pause { "pause the container" } else { "unpause the container" };
        blocking(move || container.cgroup.freeze(pause).at_kind(ErrorKind::Internal, what)).await
    }

    /// Changes limits of a running container.
    pub(crate) async fn change_limits(&self, id: &ProcessId, resources: Resources) -> Result<()> {
        check::resources(&resources)?;
        let (container, cgroups) = (self.running(id)?, self.cgroups.clone());
        blocking(move || cgroups.change(&container.cgroup, &resources)).await
    }

    /// What a running container has used.
    pub(crate) async fn stats(&self, id: &ProcessId) -> Result<Stats> {
        let container = self.running(id)?;
        blocking(move || container.cgroup.stats().at_kind(ErrorKind::Internal, "read the cgroup")).await
    }

    /// The processes of a running container.
    pub(crate) async fn processes_of(&self, id: &ProcessId) -> Result<Processes> {
        let container = self.running(id)?;
        blocking(move || Ok(container.cgroup.processes())).await
    }

    /// Asks for the end; [`Agent::stop`] follows.
    pub(crate) fn request_shutdown(&self) {
        self.shutdown.send_replace(true);
    }

    /// For those who accept connections.
    pub(crate) fn descriptors(&self) -> &Arc<Descriptors> {
        self.egress.descriptors()
    }

    /// Waits until someone asked for the end.
    pub(crate) async fn shutdown_requested(&self) {
        let _ = self.shutdown.subscribe().wait_for(|asked| *asked).await;
    }

    /// Reaps orphans.
    pub(crate) fn reap(&self) {
        self.reaper.reap();
    }

    /// Kills every container, and waits until nothing of them is left.
    pub(crate) async fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for process in self.processes.all() {
            // One that has ended meanwhile is what is wanted.
            let _ = process.signal(libc::SIGKILL as u8);
        }
        self.files.kill_all();
        for id in self.containers.ids() {
            self.containers.wait_gone(&id).await;
        }
    }

    /// The group of all containers, to be removed at the very end.
    pub(crate) fn cgroups(self: Arc<Self>) -> Option<Cgroups> {
        let cgroups = self.cgroups.clone();
        drop(self);
        Arc::into_inner(cgroups)
    }

    /// Waits for a process's end, and undoes what was done for it.
    fn supervise(
        self: &Arc<Self>,
        process: Arc<Process>,
        cgroup: Arc<crate::cgroup::Cgroup>,
        holdings: Option<Holdings>,
    ) {
        let agent = self.clone();
        let oom_kills_before = if holdings.is_some() { 0 } else { cgroup.oom_kills() };
        tokio::spawn(async move {
            let code = processes::wait(&process.pidfd).await.unwrap_or_else(|error| {
                tracing::error!(process = process.id.short(), "waiting for it failed: {error}");
                255
            });
            agent.reaper.was_reaped(process.pid);
            let status = ExitStatus {
                code,
                oom_killed: cgroup.oom_kills() > oom_kills_before,
                finished_unix_nanos: clock::unix_nanos(),
            };
            tracing::info!(process = process.id.short(), code, "ended");
            if holdings.is_some() {
                agent.containers.ended(&process.id);
            }
            process.spool.push_exit(&status);
            process.exit.send_replace(Some(status));
            if let Some(stdin) = &process.stdin {
                stdin.close().await;
            }
            if let Some(holdings) = holdings {
                agent.give_back(process.id.clone(), holdings).await;
            }
        });
    }

    async fn give_back(&self, id: ProcessId, holdings: Holdings) {
        // Whoever copies files from it has its file system mounted.
        self.files.settle(&id, files::PATIENCE).await;
        let owned = id.clone();
        let _ = tokio::task::spawn_blocking(move || holdings.give_back(&owned)).await;
        self.containers.gone(&id);
    }
}

/// Runs what blocks on a thread for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(from_io(ErrorKind::Internal, "run a blocking task", &std::io::Error::other(error))),
    }
}
