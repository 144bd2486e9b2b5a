//! The containers that run or are being torn down: what must be undone when the first process has ended.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_agent_api::ProcessId;
use rustix::mount::{MountAttrFlags, UnmountFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::engine_socket::EngineSocket;
use crate::layers::LayerUse;
use crate::network::listeners::Listeners;
use crate::network::names::Server;
use crate::network::namespace::Namespace;
use crate::network::{Networks, Ports};
use crate::seccomp::Filter;
use crate::{child, mounts};

/// A container whose first process was started.
pub(crate) struct Container {
    /// Its id.
    pub id: ProcessId,
    /// Its group.
    pub cgroup: Arc<Cgroup>,
    /// The filter of its processes' system calls.
    pub seccomp: Option<Arc<Filter>>,
    /// The directory where others find its shared memory, if they may.
    pub shm: Option<String>,
    /// Its network namespace; none if it has the guest's.
    pub network: Option<Arc<Namespace>>,
    /// Its interfaces, if it has a namespace of its own; none inside once it has ended.
    pub ports: Option<Arc<Mutex<Option<Ports>>>>,
    /// The first process's pidfd, by which others join.
    pub pidfd: Arc<AsyncFd<OwnedFd>>,
}

/// What a container holds and gives back in the background after its end.
pub(crate) struct Holdings {
    /// Its group.
    pub cgroup: Arc<Cgroup>,
    /// A handle that keeps the root file system mounted: unmounting writes everything to disk, for which the daemon need
    /// not wait to hear of the exit.
    pub root: OwnedFd,
    /// Its layers.
    pub layers: LayerUse,
    /// Its shared memory, if others may join it.
    pub shm: Option<SharedMemory>,
    /// Its interfaces.
    pub ports: Interfaces,
    /// The socket of the daemon's API, if it has that.
    pub engine: Option<EngineSocket>,
}

/// A container's interfaces, which come and go while it runs.
pub(crate) struct Interfaces {
    networks: Arc<Networks>,
    /// None once they were given back.
    pub ports: Arc<Mutex<Option<Ports>>>,
    /// Its name server.
    pub names: Option<Server>,
    /// What listens on its published ports.
    pub published: Option<Published>,
}

/// A network namespace whose listeners are watched, until this is dropped.
pub(crate) struct Published {
    pub listeners: Arc<Listeners>,
    /// See [`Namespace::cookie`].
    pub namespace: u64,
}

impl Drop for Published {
    fn drop(&mut self) {
        self.listeners.forget(self.namespace);
    }
}

impl Interfaces {
    /// None yet.
    pub(crate) fn new(networks: &Arc<Networks>, container: &ProcessId) -> Self {
        let ports = Arc::new(Mutex::new(Some(Ports::new(container.clone()))));
        Self { networks: networks.clone(), ports, names: None, published: None }
    }
}

impl Drop for Interfaces {
    fn drop(&mut self) {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ports) = ports {
            self.networks.give_back(ports);
        }
    }
}

/// A tmpfs in the agent's own file system, unmounted when this is dropped; those who mounted it from there keep it.
pub(crate) struct SharedMemory {
    path: PathBuf,
}

impl SharedMemory {
    /// Mounts one of this size at `path`.
    pub(crate) fn new(path: PathBuf, size: u64) -> std::io::Result<Self> {
        std::fs::create_dir_all(&path)?;
        let size = size.to_string();
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = mounts::new("tmpfs", &[("mode", "1777"), ("size", &size)], attributes)?;
        mounts::attach(mount, child::open_directory(&path)?)?;
        Ok(Self { path })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.path, UnmountFlags::DETACH) {
            tracing::warn!("unmounting {} failed: {error}", self.path.display());
        }
        let _ = std::fs::remove_dir(&self.path);
    }
}

impl Holdings {
    /// Gives everything back. Blocks.
    pub(crate) fn give_back(self, id: &ProcessId) {
        // First, because its addresses may be someone else's by now.
        drop(self.ports);
        drop(self.engine);
        if let Err(error) = self.cgroup.remove() {
            tracing::warn!(container = id.short(), "removing its cgroup failed: {error}");
        }
        // The order matters: the layers are in use until the root is unmounted.
        drop(self.root);
        drop(self.layers);
        drop(self.shm);
    }
}

/// All containers by id.
#[derive(Default)]
pub(crate) struct Containers {
    map: Mutex<HashMap<ProcessId, Entry>>,
}

struct Entry {
    state: State,
    phase: watch::Sender<Phase>,
}

/// Where a container is, for those who wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Running,
    Ended,
    Gone,
}

enum State {
    Starting,
    Running(Arc<Container>),
    Ended,
}

impl Containers {
    fn map(&self) -> MutexGuard<'_, HashMap<ProcessId, Entry>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container is about to be started; nothing of an earlier run with this id is left.
    pub(crate) fn begin(&self, id: &ProcessId) {
        let entry = Entry { state: State::Starting, phase: watch::Sender::new(Phase::Starting) };
        self.map().insert(id.clone(), entry);
    }

    /// It runs.
    pub(crate) fn runs(&self, container: Arc<Container>) {
        if let Some(entry) = self.map().get_mut(&container.id) {
            entry.state = State::Running(container);
            entry.phase.send_replace(Phase::Running);
        }
    }

    /// Its first process has ended: no one can join any more.
    pub(crate) fn ended(&self, id: &ProcessId) {
        if let Some(entry) = self.map().get_mut(id) {
            entry.state = State::Ended;
            entry.phase.send_replace(Phase::Ended);
        }
    }

    /// Nothing is left of it.
    pub(crate) fn gone(&self, id: &ProcessId) {
        if let Some(entry) = self.map().remove(id) {
            entry.phase.send_replace(Phase::Gone);
        }
    }

    /// A running container.
    pub(crate) fn running(&self, id: &ProcessId) -> Option<Arc<Container>> {
        match &self.map().get(id)?.state {
            State::Running(container) => Some(container.clone()),
            State::Starting | State::Ended => None,
        }
    }

    /// Waits until nothing is left of a container.
    pub(crate) async fn wait_gone(&self, id: &ProcessId) {
        let receiver = self.map().get(id).map(|entry| entry.phase.subscribe());
        if let Some(mut receiver) = receiver {
            let _ = receiver.wait_for(|phase| *phase == Phase::Gone).await;
        }
    }

    /// Waits until a container runs or nothing is left of it: the container if it runs.
    pub(crate) async fn settled(&self, id: &ProcessId) -> Option<Arc<Container>> {
        loop {
            let mut receiver = self.map().get(id)?.phase.subscribe();
            let settled = receiver.wait_for(|phase| matches!(phase, Phase::Running | Phase::Gone)).await;
            if settled.is_ok_and(|phase| *phase == Phase::Running)
                && let Some(container) = self.running(id)
            {
                return Some(container);
            }
        }
    }

    /// Waits until nothing is left of any container that has ended by now.
    pub(crate) async fn wait_ended_gone(&self) {
        let ended = |entry: &Entry| matches!(entry.state, State::Ended).then(|| entry.phase.subscribe());
        let ended: Vec<_> = self.map().values().filter_map(ended).collect();
        for mut gone in ended {
            let _ = gone.wait_for(|phase| *phase == Phase::Gone).await;
        }
    }

    /// The ids of all.
    pub(crate) fn ids(&self) -> Vec<ProcessId> {
        self.map().keys().cloned().collect()
    }
}
