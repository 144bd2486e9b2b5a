//! The sandboxes in use, each with its agent and what is attached to it.

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, Weak},
};

use coracle_agent_api::{DiffId, Layer, ProcessId, Retain, TreeName, TreeSource};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    agent::Agent,
    core::Core,
    egress::{HostFiles, WayOut},
    error::{Result, chain},
    sandbox::{Running, Sandbox, SandboxError, SandboxFactory, SandboxId, SandboxState, TreeGrant},
};

/// Layers attached at once at most; the guest has 255 partitions.
const MAX_ATTACHED: usize = 240;

/// A layer's image on the host.
#[derive(Debug, Clone)]
pub(crate) struct LayerFile {
    pub(crate) diff_id: DiffId,
    pub(crate) path: PathBuf,
    pub(crate) len: u64,
}

#[derive(Default)]
struct Inside {
    /// The life of the sandbox that the rest is about.
    instance: Option<u64>,
    attached: HashMap<DiffId, Option<PathBuf>>,
    users: HashMap<ProcessId, Vec<DiffId>>,
}

/// A sandbox and what the engine knows of its inside.
pub(crate) struct Host {
    sandbox: Arc<dyn Sandbox>,
    agent: Agent,
    inside: AsyncMutex<Inside>,
}

impl Host {
    fn new(sandbox: Arc<dyn Sandbox>) -> Arc<Self> {
        let agent = Agent::new(Arc::clone(&sandbox));
        Arc::new(Self { sandbox, agent, inside: AsyncMutex::default() })
    }

    pub(crate) fn id(&self) -> &SandboxId {
        self.sandbox.id()
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// See [`Sandbox::pass_stream`].
    pub(crate) async fn pass_stream(&self, port: u32, from: u32, stream: OwnedFd) -> Result<()> {
        Ok(self.sandbox.pass_stream(port, from, stream).await?)
    }

    /// See [`Sandbox::grant`].
    pub(crate) async fn grant(
        &self,
        grant: &TreeGrant,
        tree: OwnedFd,
    ) -> std::result::Result<TreeSource, SandboxError> {
        self.sandbox.grant(grant, tree).await
    }

    /// See [`Sandbox::revoke`].
    pub(crate) async fn revoke(&self, name: &TreeName) -> std::result::Result<(), SandboxError> {
        self.sandbox.revoke(name).await
    }

    /// See [`Sandbox::grants`].
    pub(crate) async fn grants(&self) -> std::result::Result<Vec<TreeName>, SandboxError> {
        self.sandbox.grants().await
    }

    pub(crate) fn state(&self) -> watch::Receiver<SandboxState> {
        self.sandbox.state()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.sandbox.state().borrow().running().is_some()
    }

    /// Makes sure that it runs. Containers that are not named by `known` lose their writable layers, and volumes that are not
    /// named are removed, once for each boot.
    pub(crate) async fn start(&self, known: impl FnOnce() -> Retain) -> Result<Arc<Running>> {
        let running = self.sandbox.start().await?;
        let mut inside = self.inside.lock().await;
        if inside.instance != Some(running.instance) {
            *inside = Inside { instance: Some(running.instance), ..Inside::default() };
            self.agent.retain(&known()).await?;
        }
        Ok(running)
    }

    /// Takes over what runs already.
    pub(crate) async fn adopt(&self) -> Result<Option<Arc<Running>>> {
        let running = self.sandbox.adopt().await?;
        if let Some(running) = &running {
            let mut inside = self.inside.lock().await;
            *inside = Inside { instance: Some(running.instance), ..Inside::default() };
        }
        Ok(running)
    }

    /// Remembers what an earlier daemon attached, and who uses it.
    pub(crate) async fn adopted(&self, layers: &[Layer]) {
        let mut inside = self.inside.lock().await;
        for layer in layers {
            inside.attached.entry(layer.diff_id.clone()).or_default();
        }
    }

    /// A container that runs already uses these.
    pub(crate) async fn uses(&self, container: &ProcessId, layers: Vec<DiffId>) {
        self.inside.lock().await.users.insert(container.clone(), layers);
    }

    /// Makes layers readable in the sandbox for a container.
    pub(crate) async fn attach(&self, container: &ProcessId, layers: &[LayerFile]) -> Result<Vec<Layer>> {
        let mut inside = self.inside.lock().await;
        inside.users.insert(container.clone(), layers.iter().map(|layer| layer.diff_id.clone()).collect());
        let new = layers.iter().filter(|layer| !inside.attached.contains_key(&layer.diff_id)).count();
        if inside.attached.len() + new > MAX_ATTACHED {
            self.make_room(&mut inside).await;
        }
        let mut attached = Vec::with_capacity(layers.len());
        for LayerFile { diff_id, path, len } in layers {
            let source = self.sandbox.attach_layer(diff_id, path, *len).await?;
            inside.attached.insert(diff_id.clone(), Some(path.clone()));
            attached.push(Layer { diff_id: diff_id.clone(), source });
        }
        Ok(attached)
    }

    /// A container has ended.
    pub(crate) async fn release(&self, container: &ProcessId) {
        self.inside.lock().await.users.remove(container);
    }

    /// Detaches layers whose files are gone from the host.
    pub(crate) async fn detach_removed(&self) {
        if !self.is_running() {
            return;
        }
        let mut inside = self.inside.lock().await;
        let gone = |(id, path): (&DiffId, &Option<PathBuf>)| {
            let removed = path.as_ref().is_some_and(|path| !path.exists());
            removed.then(|| id.clone())
        };
        let gone: Vec<DiffId> = inside.attached.iter().filter_map(gone).collect();
        self.detach(&mut inside, gone).await;
    }

    async fn make_room(&self, inside: &mut Inside) {
        let used: HashSet<DiffId> = inside.users.values().flatten().cloned().collect();
        let unused = inside.attached.keys().filter(|id| !used.contains(*id)).cloned().collect();
        self.detach(inside, unused).await;
    }

    async fn detach(&self, inside: &mut Inside, layers: Vec<DiffId>) {
        for diff_id in layers {
            let result = match self.agent.remove_layer(&diff_id).await {
                Ok(()) => self.sandbox.detach_layer(&diff_id).await.map_err(|error| chain(&error)),
                Err(error) => Err(chain(&error)),
            };
            match result {
                Ok(()) => drop(inside.attached.remove(&diff_id)),
                Err(error) => {
                    tracing::warn!(sandbox = %self.id(), layer = diff_id.short(), error, "cannot detach a layer")
                }
            }
        }
    }

    /// How many layers are attached.
    pub(crate) async fn layers(&self) -> usize {
        self.inside.lock().await.attached.len()
    }

    pub(crate) async fn stop(&self) -> Result<()> {
        Ok(self.sandbox.stop().await?)
    }
}

/// All sandboxes that were asked for.
pub(crate) struct Sandboxes {
    factory: Arc<dyn SandboxFactory>,
    host_files: HostFiles,
    core: Weak<Core>,
    tasks: TaskTracker,
    closing: CancellationToken,
    hosts: Mutex<HashMap<SandboxId, Arc<Host>>>,
}

impl Sandboxes {
    /// Tasks end when `closing` is cancelled.
    pub(crate) fn new(
        factory: Arc<dyn SandboxFactory>,
        host_files: HostFiles,
        core: Weak<Core>,
        tasks: TaskTracker,
        closing: CancellationToken,
    ) -> Self {
        Self { factory, host_files, core, tasks, closing, hosts: Mutex::default() }
    }

    /// The sandbox of this name.
    pub(crate) fn get(&self, id: &SandboxId) -> Arc<Host> {
        let mut hosts = self.hosts.lock().expect("no holder panics");
        Arc::clone(hosts.entry(id.clone()).or_insert_with(|| self.make(id)))
    }

    fn make(&self, id: &SandboxId) -> Arc<Host> {
        let host = Host::new(self.factory.sandbox(id));
        let (sandbox, agent) = (Arc::clone(&host.sandbox), host.agent.clone());
        WayOut::new(sandbox, agent, self.host_files.clone(), Weak::clone(&self.core))
            .spawn(&self.tasks, self.closing.clone());
        host
    }

    /// Those asked for so far.
    pub(crate) fn all(&self) -> Vec<Arc<Host>> {
        let mut hosts: Vec<_> = self.hosts.lock().expect("no holder panics").values().cloned().collect();
        hosts.sort_by(|a, b| a.id().cmp(b.id()));
        hosts
    }
}
