//! What every part of the engine shares, and how the engine comes up and goes down.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use coracle_agent_api::{AgentState, DiffId, ProcessId, ProcessState, Retain, TreeName};
use coracle_image_store::{ImageId, ImageStore, registry::Registries};
use futures_util::future::join_all;
use tokio::sync::{Notify, RwLock, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    accept::Descriptors,
    api::images,
    container::{
        Container, Stop,
        actor::{self, Message, trees::container_of},
        record::{ContainerId, Record},
        registry::Registry,
        signal,
        state::Status,
    },
    egress::{HostFiles, audit::Audit},
    error::{Error, Kind, Result, chain},
    events::Events,
    exec::Execs,
    io::{Fanout, Pump},
    networks::Networks,
    ports::Ports,
    registries::RegistrySource,
    sandbox::{SandboxFactory, SandboxId},
    sandboxes::{Host, LayerFile, Sandboxes},
    store::{Facts, Records, Store},
    time::UnixNanos,
    timings::Timings,
    volumes::Volumes,
};

/// What an engine is made for.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Where the state file and the containers' logs are kept; made if it does not exist.
    pub home: PathBuf,
    /// The product's version, as `docker version` shows it.
    pub version: String,
    /// The commit it was built from; may be empty.
    pub git_commit: String,
    /// How registries are spoken to.
    pub registries: RegistrySource,
    /// By what the host resolves names, which containers' names are resolved by too.
    pub host_files: HostFiles,
}

pub(crate) struct Core {
    pub(crate) config: EngineConfig,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) registries: Registries,
    pub(crate) store: Store,
    pub(crate) sandboxes: Sandboxes,
    pub(crate) audit: Audit,
    pub(crate) events: Events,
    pub(crate) containers: Registry,
    pub(crate) volumes: Volumes,
    pub(crate) networks: Networks,
    pub(crate) ports: Ports,
    pub(crate) descriptors: Arc<Descriptors>,
    pub(crate) execs: Execs,
    pub(crate) timings: Timings,
    /// Held for reading while a container is made of an image, for writing while an image is removed.
    pub(crate) image_gate: RwLock<()>,
    /// Everything is to end; what runs in sandboxes is to go on.
    pub(crate) closing: CancellationToken,
    /// Everything in sandboxes is to end, and no container is to be started again.
    going_down: AtomicBool,
    /// Everything in sandboxes has ended; the daemon is to end too.
    pub(crate) down: Notify,
    pub(crate) tasks: TaskTracker,
    pub(crate) started: UnixNanos,
    /// Where clients find it.
    sockets: Mutex<Vec<PathBuf>>,
}

impl Core {
    /// Opens the state and takes over what still runs.
    pub(crate) async fn open(
        config: EngineConfig,
        images: Arc<ImageStore>,
        sandboxes: Arc<dyn SandboxFactory>,
    ) -> Result<Arc<Self>> {
        let home = config.home.clone();
        let opened = tokio::task::spawn_blocking(move || open_home(&home)).await??;
        let (store, facts) = opened;
        let networks = Networks::load(facts.networks, &store).await?;
        let (closing, tasks) = (CancellationToken::new(), TaskTracker::new());
        let core = Arc::new_cyclic(|core| Self {
            sandboxes: Sandboxes::new(
                sandboxes,
                config.host_files.clone(),
                Weak::clone(core),
                tasks.clone(),
                closing.clone(),
            ),
            config,
            registries: Registries::new(Arc::clone(&images)),
            images,
            store,
            audit: Audit::default(),
            events: Events::new(),
            containers: Registry::default(),
            volumes: Volumes::load(facts.volumes),
            networks,
            ports: Ports::default(),
            descriptors: Arc::default(),
            execs: Execs::default(),
            timings: Timings::default(),
            image_gate: RwLock::default(),
            closing,
            going_down: AtomicBool::new(false),
            down: Notify::new(),
            tasks,
            started: UnixNanos::now(),
            sockets: Mutex::default(),
        });
        core.load(facts.containers).await?;
        core.take_over().await;
        core.finish_removals().await;
        images::forget_removed(&core).await;
        for container in core.containers.all() {
            container.tell(Message::DaemonStarted).await;
        }
        Ok(core)
    }

    /// Lets go of everything; what runs in sandboxes goes on.
    pub(crate) async fn close(self: &Arc<Self>) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let core = Arc::clone(self);
        let _ = tokio::task::spawn_blocking(move || core.store.close()).await;
    }

    /// Clients find the engine at this path, too.
    pub(crate) fn listens_at(&self, socket: &Path) {
        if let Ok(socket) = std::path::absolute(socket) {
            self.sockets.lock().expect("no holder panics").push(socket);
        }
    }

    /// Where clients find the engine.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        self.sockets.lock().expect("no holder panics").clone()
    }

    pub(crate) fn container_folder(&self, id: &ContainerId) -> PathBuf {
        self.config.home.join("containers").join(id.as_str())
    }

    /// Makes sure that a sandbox runs.
    pub(crate) async fn start_sandbox(&self, host: &Host) -> Result<()> {
        host.start(|| self.facts_of(host.id())).await.map(drop)
    }

    /// The files of an image's layers, lowest first.
    pub(crate) async fn image_layers(&self, image: &ImageId) -> Result<Vec<LayerFile>> {
        let (images, image) = (Arc::clone(&self.images), *image);
        let image = tokio::task::spawn_blocking(move || images.image(&image)).await??;
        let layer = |layer: coracle_image_store::Layer| {
            let diff_id: DiffId =
                layer.diff_id.hex().parse().map_err(|error| Error::internal(chain(&error)))?;
            Ok(LayerFile { diff_id, path: layer.path, len: layer.size })
        };
        image.layers.into_iter().map(layer).collect()
    }

    /// What a sandbox shall keep.
    fn facts_of(&self, sandbox: &SandboxId) -> Retain {
        let all = self.containers.all();
        let containers = all
            .iter()
            .filter(|container| container.record().sandbox == *sandbox)
            .map(|container| container.id().clone())
            .collect();
        Retain { containers, volumes: self.volumes.ids_in(sandbox) }
    }

    /// Whether everything in sandboxes is to end.
    pub(crate) fn is_going_down(&self) -> bool {
        self.going_down.load(Ordering::SeqCst)
    }

    /// Stops all containers, shuts all sandboxes down, and lets the daemon end.
    pub(crate) async fn go_down(&self, timeout: Option<i64>) -> Result<()> {
        self.going_down.store(true, Ordering::SeqCst);
        let stopped = self.stop_everything(timeout).await;
        if stopped.is_err() {
            self.going_down.store(false, Ordering::SeqCst);
        }
        stopped?;
        self.down.notify_one();
        Ok(())
    }

    async fn stop_everything(&self, timeout: Option<i64>) -> Result<()> {
        let containers = self.containers.all();
        // Not a user's wish for this container: its restart policy starts it again with the next daemon.
        let stop = Stop { timeout, ..Stop::default() };
        let stops = containers.iter().map(|container| async move {
            match container.stop(stop).await {
                Err(error) if error.kind() != Kind::NotModified => {
                    tracing::warn!(%error, "a container did not stop");
                }
                _ => {}
            }
        });
        join_all(stops).await;
        for host in self.sandboxes.all() {
            host.stop().await?;
        }
        Ok(())
    }

    async fn load(self: &Arc<Self>, records: Records) -> Result<()> {
        let mut known = HashSet::new();
        for (id, bytes) in records {
            known.insert(id.clone());
            let mut record = match Record::decode(&bytes) {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(
                        id,
                        error = chain(&error),
                        "the record of a container cannot be used; it is left as it is"
                    );
                    continue;
                }
            };
            match self.containers.reserve(Some(&record.name), &record.id) {
                Ok(_) => {}
                Err(error) => {
                    record.name = self.containers.reserve(None, &record.id)?;
                    tracing::error!(id, %error, name = record.name, "a container gets another name");
                }
            }
            std::fs::create_dir_all(self.container_folder(&record.id))
                .map_err(|error| Error::internal(format!("cannot make a container's folder: {error}")))?;
            if record.state.status.is_running() {
                self.rejoin_networks(&record);
            }
            self.containers.insert(&actor::spawn(self, record)?);
        }
        remove_orphans(&self.config.home.join("containers"), &known);
        Ok(())
    }

    /// Finds sandboxes that an earlier daemon started, and what became of their containers.
    async fn take_over(self: &Arc<Self>) {
        let mut by_sandbox: HashMap<SandboxId, Vec<Arc<Container>>> = HashMap::new();
        by_sandbox.insert(SandboxId::shared(), Vec::new());
        for container in self.containers.all() {
            by_sandbox.entry(container.record().sandbox.clone()).or_default().push(container);
        }
        let all = by_sandbox
            .into_iter()
            .map(|(id, containers)| self.take_over_sandbox(self.sandboxes.get(&id), containers));
        join_all(all).await;
    }

    async fn take_over_sandbox(self: &Arc<Self>, host: Arc<Host>, containers: Vec<Arc<Container>>) {
        let (state, reason) = match self.sandbox_state(&host).await {
            Ok(Some(state)) => (state, "its end was lost while the daemon was away"),
            Ok(None) => (AgentState::default(), "its sandbox ended while the daemon was away"),
            Err(error) => {
                tracing::error!(sandbox = %host.id(), %error, "cannot take a sandbox over; its containers count as ended");
                (AgentState::default(), "its sandbox could not be reached after a restart of the daemon")
            }
        };
        host.adopted(&state.layers).await;
        let mut processes: HashMap<ProcessId, ProcessState> =
            state.processes.into_iter().map(|process| (process.id.clone(), process)).collect();
        let mut told = Vec::new();
        for container in containers {
            let (done, finished) = oneshot::channel();
            match processes.remove(container.id()) {
                Some(process) => container.tell(Message::Resume { process: Box::new(process), done }).await,
                None if container.is_running() => {
                    container.tell(Message::Lost { reason: reason.to_owned(), done }).await
                }
                None => continue,
            }
            told.push(finished);
        }
        join_all(told).await;
        for process in processes.into_values() {
            self.see_off(&host, process);
        }
        self.revoke_unused(&host).await;
    }

    /// Takes back the trees of the host that no running container has: the daemon that granted them ended before it could.
    async fn revoke_unused(&self, host: &Host) {
        let grants = host.grants().await.unwrap_or_else(|error| {
            tracing::error!(sandbox = %host.id(), error = chain(&error), "cannot learn which trees of the host it has");
            Vec::new()
        });
        let is_used = |name: &TreeName| {
            let user = container_of(name).and_then(|id| self.containers.find(id.as_str()).ok());
            user.is_some_and(|container| container.is_running())
        };
        for name in grants.iter().filter(|name| !is_used(name)) {
            if let Err(error) = host.revoke(name).await {
                tracing::error!(tree = %name, error = chain(&error), "cannot take back a tree of the host");
            }
        }
    }

    async fn sandbox_state(&self, host: &Host) -> Result<Option<AgentState>> {
        match host.adopt().await? {
            Some(_) => Ok(Some(host.agent().state().await?)),
            None => Ok(None),
        }
    }

    /// A process that no record speaks of: an exec whose client is gone, or a container whose creation was never acknowledged.
    /// An exec may run to its end; its output goes nowhere.
    fn see_off(self: &Arc<Self>, host: &Arc<Host>, process: ProcessState) {
        let agent = host.agent().clone();
        let is_container = process.id == process.container;
        let pump = Pump {
            agent: agent.clone(),
            sandbox: host.state(),
            process: process.id.clone(),
            fanout: Arc::<Fanout>::default(),
            log: None,
            after: process.acknowledged,
            linger: Duration::ZERO,
            trace: None,
        };
        let attended = async move {
            if is_container {
                let _ = agent.signal(&process.id, signal::SIGKILL).await;
            }
            pump.run().await;
            let _ = agent.forget(&process.id).await;
            if is_container {
                let _ = agent.remove_container(&process.id).await;
            }
        };
        self.tasks.spawn(self.closing.clone().run_until_cancelled_owned(attended));
    }

    /// Removes containers that were to go when they ended, and whose daemon ended first.
    async fn finish_removals(&self) {
        for container in self.containers.all() {
            let record = container.record();
            if !record.host_config.auto_remove || record.state.status != Status::Exited {
                continue;
            }
            if let Err(error) = container.remove(false, true).await {
                tracing::error!(%error, name = record.name, "cannot remove a container");
            }
        }
    }
}

fn open_home(home: &Path) -> Result<(Store, Facts)> {
    let folder = home.join("containers");
    std::fs::create_dir_all(&folder)
        .map_err(|error| Error::internal(format!("cannot make the folder {}: {error}", folder.display())))?;
    Ok(Store::open(&home.join("state.redb"))?)
}

/// Removes folders of containers that are not in the state: their creation or their removal was not finished.
fn remove_orphans(folder: &Path, known: &HashSet<String>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let is_ours =
            name.to_str().is_some_and(|name| name.parse::<ContainerId>().is_ok() && !known.contains(name));
        if is_ours && let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::warn!(folder = %entry.path().display(), %error, "cannot remove what is left of a container");
        }
    }
}
