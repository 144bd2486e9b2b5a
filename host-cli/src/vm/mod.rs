//! The sandbox that is a virtual machine: one `coracle-vmm` process with a folder of its own, which outlives the daemon.
//!
//! The engine sees it as a [`Sandbox`]; everything about KVM, disks and control sockets stays here. What comes from the VMM
//! or the guest is untrusted. At most one machine runs in a folder: its disk is locked by whoever has it open.

mod agent;
mod boot;
mod disk;
mod files;
mod folder;
mod guest;
mod layers;
mod machine;
pub(crate) mod process;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use coracle_agent_api::{DiffId, LayerSource};
use coracle_engine::sandbox::{
    Running, Sandbox, SandboxError, SandboxFactory, SandboxId, SandboxState, TreeGrant, TreeName, TreeSource,
};
use tokio::{net::UnixStream, sync::watch};

use crate::{failure::describe, paths::Home};
pub(crate) use disk::size as disk_size;
#[cfg(test)]
use folder::BootRecord;
pub(crate) use folder::Folder;
pub(crate) use guest::Guest;

use files::Files;
use layers::Layers;
use machine::Machine;
use process::VmmProcess;

/// How long the agent has for an orderly end, and the VMM after it.
const AGENT_GRACE: Duration = Duration::from_secs(15);
const VMM_GRACE: Duration = Duration::from_secs(5);
/// A file server that ends this much before its machine has ended with it.
const LOSS_GRACE: Duration = Duration::from_millis(500);

/// Makes the sandboxes of one home; the same one for the same name.
#[derive(Debug)]
pub(crate) struct Vms {
    home: Home,
    made: Mutex<Vec<Arc<Vm>>>,
}

impl Vms {
    /// For the machines in this home.
    pub(crate) fn new(home: Home) -> Self {
        Self { home, made: Mutex::default() }
    }
}

impl SandboxFactory for Vms {
    fn sandbox(&self, id: &SandboxId) -> Arc<dyn Sandbox> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vm) = made.iter().find(|vm| vm.0.id == *id) {
            return Arc::<Vm>::clone(vm);
        }
        let vm = Arc::new(Vm(Arc::new(Shared {
            id: id.clone(),
            folder: Folder::new(self.home.vms().join(id.as_str())),
            settings: self.home.settings(),
            state: watch::channel(SandboxState::Stopped).0,
            life: tokio::sync::Mutex::new(()),
            stops: watch::channel(0).0,
            current: Mutex::new(None),
            instances: AtomicU64::new(0),
        })));
        made.push(Arc::clone(&vm));
        vm
    }
}

/// A virtual machine, running or not.
#[derive(Debug)]
pub(crate) struct Vm(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    id: SandboxId,
    folder: Folder,
    settings: PathBuf,
    state: watch::Sender<SandboxState>,
    /// Held while it is started, adopted or stopped.
    life: tokio::sync::Mutex<()>,
    /// How often it was told to stop: a start that is on its way gives up when this changes.
    stops: watch::Sender<u64>,
    current: Mutex<Option<Arc<Current>>>,
    instances: AtomicU64,
}

/// The machine that runs now.
#[derive(Debug)]
struct Current {
    machine: Arc<Machine>,
    layers: Arc<tokio::sync::Mutex<Layers>>,
    files: Files,
    /// Only if this daemon started it.
    process: Option<VmmProcess>,
}

impl Shared {
    fn current(&self) -> Option<Arc<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_current(&self, current: Option<Arc<Current>>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
    }

    fn running(&self) -> Result<Arc<Current>, SandboxError> {
        match &*self.state.borrow() {
            SandboxState::Running(_) => self.current(),
            _ => None,
        }
        .ok_or_else(|| SandboxError::NotRunning { id: self.id.clone() })
    }

    async fn start(self: &Arc<Self>) -> Result<Arc<Running>, SandboxError> {
        let _life = self.life.lock().await;
        if let Some(running) = self.state.borrow().running() {
            return Ok(Arc::clone(running));
        }
        self.state.send_replace(SandboxState::Starting);
        let started = match boot::adopt(self).await {
            Ok(Some(taken_over)) => Ok(taken_over),
            Ok(None) => boot::boot(self).await,
            Err(error) => Err(error),
        };
        match started {
            Ok((current, running)) => Ok(self.live(current, running)),
            Err(error) => {
                let reason = describe(&error);
                tracing::error!(vm = %self.id, %reason, "the machine did not start");
                self.state.send_replace(SandboxState::Died { reason: reason.clone() });
                Err(SandboxError::Start { id: self.id.clone(), reason })
            }
        }
    }

    async fn adopt(self: &Arc<Self>) -> Result<Option<Arc<Running>>, SandboxError> {
        let _life = self.life.lock().await;
        if let Some(running) = self.state.borrow().running() {
            return Ok(Some(Arc::clone(running)));
        }
        match boot::adopt(self).await {
            Ok(taken_over) => Ok(taken_over.map(|(current, running)| self.live(current, running))),
            Err(error) => Err(SandboxError::Start { id: self.id.clone(), reason: describe(&error) }),
        }
    }

    /// From here on it runs; its end is awaited in the background.
    fn live(self: &Arc<Self>, current: Current, running: Running) -> Arc<Running> {
        let (current, running) = (Arc::new(current), Arc::new(running));
        self.set_current(Some(Arc::clone(&current)));
        tracing::info!(vm = %self.id, adopted = running.adopted, "the machine runs");
        self.state.send_replace(SandboxState::Running(Arc::clone(&running)));
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            let reason = tokio::select! {
                reason = current.machine.end() => reason,
                reason = current.files.lost() => {
                    shared.files_lost(&current, reason).await;
                    current.machine.end().await
                }
            };
            shared.ended(&current, reason).await;
        });
        running
    }

    /// The machine goes on without the host's files, unless it is the machine that is ending.
    async fn files_lost(&self, current: &Arc<Current>, reason: String) {
        let ending = tokio::time::timeout(LOSS_GRACE, current.machine.end()).await.is_ok();
        if ending || !self.current().is_some_and(|now| Arc::ptr_eq(&now, current)) {
            return;
        }
        let lost = format!("{reason}: the host's files are not there until it is started again");
        tracing::error!(vm = %self.id, reason = %lost, "the machine has lost the host's files");
        self.state.send_if_modified(|state| match state {
            SandboxState::Running(running) => {
                *running = Arc::new(Running { lost: Some(lost), ..Running::clone(running) });
                true
            }
            _ => false,
        });
    }

    /// It ended unasked, unless it is being stopped: then that is seen to where it is done.
    async fn ended(&self, current: &Arc<Current>, reason: String) {
        let _life = self.life.lock().await;
        if !self.current().is_some_and(|now| Arc::ptr_eq(&now, current)) {
            return;
        }
        self.set_current(None);
        self.state.send_replace(SandboxState::Died { reason });
        // A machine without its agent is of no use. Nobody finds it half dead: a start waits until it is gone.
        discard(current).await;
        self.folder.forget_machine();
    }

    async fn stop(&self) -> Result<(), SandboxError> {
        self.stops.send_modify(|stops| *stops += 1);
        let _life = self.life.lock().await;
        let Some(current) = self.current() else { return Ok(()) };
        let asked = async {
            match current.machine.connect().await {
                Ok(stream) => agent::shut_down(stream).await,
                Err(error) => Err(error.into()),
            }
        };
        if let Err(error) = asked.await {
            tracing::warn!(vm = %self.id, error = %describe(&error), "the agent does not shut down; ending the machine");
        } else if tokio::time::timeout(AGENT_GRACE, current.machine.exit()).await.is_err() {
            tracing::warn!(vm = %self.id, "the guest takes too long to shut down; ending the machine");
        }
        discard(&current).await;
        if tokio::time::timeout(VMM_GRACE, current.machine.exit()).await.is_ok() {
            self.set_current(None);
            self.folder.forget_machine();
            self.state.send_replace(SandboxState::Stopped);
            return Ok(());
        }
        let source =
            std::io::Error::new(std::io::ErrorKind::TimedOut, "its virtual machine monitor does not end");
        Err(SandboxError::Io { id: self.id.clone(), source: Arc::new(source) })
    }

    async fn attach(&self, diff_id: &DiffId, path: &Path, len: u64) -> Result<LayerSource, SandboxError> {
        let current = self.running()?;
        let mut layers = current.layers.lock().await;
        if let Some(slot) = layers.get(diff_id) {
            return Ok(slot.source());
        }
        let failed = |error: &dyn std::fmt::Display| SandboxError::Layer {
            id: self.id.clone(),
            reason: format!("{}: {error}", diff_id.short()),
        };
        let file = File::open(path).map_err(|error| failed(&format!("cannot open its image: {error}")))?;
        let slot = layers.reserve(diff_id, len).map_err(|error| failed(&error))?;
        let attached = current
            .machine
            .call(move |client| client.attach_segment(slot.start, slot.len, file.as_fd()))
            .await;
        if let Err(error) = attached {
            layers.forget(diff_id.as_str()).map_err(|error| failed(&error))?;
            return Err(failed(&describe(&error)));
        }
        layers.settle(diff_id).map_err(|error| failed(&error))?;
        Ok(slot.source())
    }

    async fn detach(&self, diff_id: &DiffId) -> Result<(), SandboxError> {
        let current = self.running()?;
        let mut layers = current.layers.lock().await;
        let Some(slot) = layers.get(diff_id) else { return Ok(()) };
        let failed = |error: &dyn std::fmt::Display| SandboxError::Layer {
            id: self.id.clone(),
            reason: format!("{}: cannot detach it: {error}", diff_id.short()),
        };
        layers.unsettle(diff_id).map_err(|error| failed(&error))?;
        let detached = current.machine.call(move |client| client.detach_segment(slot.start)).await;
        if let Err(error) = detached {
            layers.settle(diff_id).map_err(|error| failed(&error))?;
            return Err(failed(&describe(&error)));
        }
        layers.forget(diff_id.as_str()).map_err(|error| failed(&error))
    }
}

/// Ends a VMM by its control socket, and by force if this daemon can and must.
async fn discard(current: &Current) {
    // It fails if the VMM has ended already, which is what is wanted.
    let _ = current.machine.call(|client| client.stop()).await;
    if let Some(process) = &current.process
        && tokio::time::timeout(VMM_GRACE, process.wait()).await.is_err()
    {
        tracing::warn!(pid = process.pid, "the VMM does not end; killing it");
        process.kill();
    }
    current.files.end().await;
}

/// Runs the work as a task of its own, so that a caller who goes away does not leave it half done.
async fn detached<T: Send + 'static>(
    id: &SandboxId,
    work: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
) -> Result<T, SandboxError> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(SandboxError::Start { id: id.clone(), reason: format!("the daemon failed inside: {error}") })
    })
}

#[async_trait]
impl Sandbox for Vm {
    fn id(&self) -> &SandboxId {
        &self.0.id
    }

    fn state(&self) -> watch::Receiver<SandboxState> {
        self.0.state.subscribe()
    }

    async fn start(&self) -> Result<Arc<Running>, SandboxError> {
        let shared = Arc::clone(&self.0);
        detached(&self.0.id, async move { shared.start().await }).await
    }

    async fn adopt(&self) -> Result<Option<Arc<Running>>, SandboxError> {
        let shared = Arc::clone(&self.0);
        detached(&self.0.id, async move { shared.adopt().await }).await
    }

    async fn connect(&self) -> Result<UnixStream, SandboxError> {
        let current = self.0.running()?;
        let failed = |source| SandboxError::Io { id: self.0.id.clone(), source: Arc::new(source) };
        current.machine.connect().await.map_err(failed)
    }

    async fn pass_stream(&self, port: u32, from: u32, stream: OwnedFd) -> Result<(), SandboxError> {
        let current = self.0.running()?;
        let passed =
            current.machine.call(move |client| client.vsock_connect_from(from, port, stream.as_fd())).await;
        passed.map_err(|error| SandboxError::Io {
            id: self.0.id.clone(),
            source: Arc::new(std::io::Error::other(describe(&error))),
        })
    }

    async fn attach_layer(
        &self,
        diff_id: &DiffId,
        path: &Path,
        len: u64,
    ) -> Result<LayerSource, SandboxError> {
        let (shared, diff_id, path) = (Arc::clone(&self.0), diff_id.clone(), path.to_owned());
        detached(&self.0.id, async move { shared.attach(&diff_id, &path, len).await }).await
    }

    async fn detach_layer(&self, diff_id: &DiffId) -> Result<(), SandboxError> {
        let (shared, diff_id) = (Arc::clone(&self.0), diff_id.clone());
        detached(&self.0.id, async move { shared.detach(&diff_id).await }).await
    }

    async fn grant(&self, grant: &TreeGrant, tree: OwnedFd) -> Result<TreeSource, SandboxError> {
        let current = self.0.running()?;
        let (id, grant) = (self.0.id.clone(), grant.clone());
        detached(&self.0.id, async move {
            let granted = current.files.grant(&grant, files::owners(), tree).await;
            granted.map_err(|error| no_tree(&id, &grant.name, &error))
        })
        .await
    }

    async fn revoke(&self, name: &TreeName) -> Result<(), SandboxError> {
        let Ok(current) = self.0.running() else { return Ok(()) };
        let (id, name) = (self.0.id.clone(), name.clone());
        detached(&self.0.id, async move {
            current.files.revoke(&name).await.map_err(|error| no_tree(&id, &name, &error))
        })
        .await
    }

    async fn grants(&self) -> Result<Vec<TreeName>, SandboxError> {
        let Ok(current) = self.0.running() else { return Ok(Vec::new()) };
        current
            .files
            .grants()
            .await
            .map_err(|error| SandboxError::Tree { id: self.0.id.clone(), reason: describe(&error) })
    }

    async fn stop(&self) -> Result<(), SandboxError> {
        let shared = Arc::clone(&self.0);
        detached(&self.0.id, async move { shared.stop().await }).await
    }
}

fn no_tree(id: &SandboxId, name: &TreeName, error: &anyhow::Error) -> SandboxError {
    SandboxError::Tree { id: id.clone(), reason: format!("{name}: {}", describe(error)) }
}

impl Shared {
    fn next_instance(&self) -> u64 {
        self.instances.fetch_add(1, Ordering::Relaxed) + 1
    }
}
