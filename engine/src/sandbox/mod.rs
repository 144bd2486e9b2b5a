//! What containers run in: a machine with an agent in it.
//!
//! The engine knows a sandbox by this trait only; the VM behind it (or, in tests, a plain process) is someone else's matter.
//! A sandbox is disposable: it may die at any time, and whatever comes out of it is untrusted. Nothing here assumes that
//! there is only one.

pub(crate) mod lives;
#[cfg(feature = "process-sandbox")]
pub mod process;

use std::{fmt, os::fd::OwnedFd, path::Path, str::FromStr, sync::Arc};

use async_trait::async_trait;
use coracle_agent_api::{DiffId, Hello, LayerSource};
pub use coracle_agent_api::{TreeName, TreeSource};
use serde::{Deserialize, Serialize};
use tokio::{net::UnixStream, sync::watch};

/// A sandbox's name: 1 to 32 of `a-z`, `0-9`, `-`, beginning with a letter or digit, so that it can be a folder's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

/// Why a string is no [`SandboxId`].
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a sandbox's name: expected up to 32 of a-z, 0-9 and `-`, beginning with a letter or digit"
)]
pub struct SandboxIdError(String);

impl SandboxId {
    /// The sandbox that containers share unless they ask for one of their own.
    pub fn shared() -> Self {
        Self("default".to_owned())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SandboxId {
    type Error = SandboxIdError;

    fn try_from(text: String) -> Result<Self, SandboxIdError> {
        let legal = (1..=32).contains(&text.len())
            && !text.starts_with('-')
            && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if legal { Ok(Self(text)) } else { Err(SandboxIdError(text.chars().take(80).collect())) }
    }
}

impl FromStr for SandboxId {
    type Err = SandboxIdError;

    fn from_str(text: &str) -> Result<Self, SandboxIdError> {
        Self::try_from(text.to_owned())
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> String {
        id.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone)]
pub enum SandboxState {
    /// Not running: never started, or stopped on request.
    Stopped,
    /// On its way to the agent's first word.
    Starting,
    /// The agent answers.
    Running(Arc<Running>),
    /// It ended without being asked to, or could not start.
    Died {
        /// One sentence for people: what was seen.
        reason: String,
    },
}

impl SandboxState {
    /// The particulars of a running sandbox.
    pub fn running(&self) -> Option<&Arc<Running>> {
        match self {
            Self::Running(running) => Some(running),
            _ => None,
        }
    }

    /// One word for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running(_) => "running",
            Self::Died { .. } => "died",
        }
    }
}

/// A running sandbox, from one start (or adoption) to its end.
#[derive(Debug, Clone, Serialize)]
pub struct Running {
    /// Rises with each start and adoption within this daemon, so that two lives of one sandbox can be told apart.
    pub instance: u64,
    /// The agent's first words; `None` where they were said to an earlier daemon and not kept.
    pub hello: Option<Hello>,
    /// What happened when on the way to being ready, on the host; empty for an adopted sandbox.
    pub boot: Vec<BootPhase>,
    /// It ran already when this daemon found it.
    pub adopted: bool,
    /// What it has lost meanwhile and goes on without, and what helps; for people.
    pub lost: Option<String>,
}

/// A moment of the boot as the host saw it.
#[derive(Debug, Clone, Serialize)]
pub struct BootPhase {
    /// For example `spawned`, `kernel-started`, `hello`.
    pub name: String,
    /// Microseconds since the start was asked for.
    pub micros: u64,
}

/// Why a sandbox could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SandboxError {
    /// It could not be started.
    #[error("the sandbox `{id}` did not start: {reason}")]
    Start {
        /// Which sandbox.
        id: SandboxId,
        /// One sentence for people: what happened, and what to do where that is known.
        reason: String,
    },
    /// It is not running.
    #[error("the sandbox `{id}` is not running")]
    NotRunning {
        /// Which sandbox.
        id: SandboxId,
    },
    /// A layer could not be attached or detached.
    #[error("cannot attach a layer to the sandbox `{id}`: {reason}")]
    Layer {
        /// Which sandbox.
        id: SandboxId,
        /// What happened, to which layer.
        reason: String,
    },
    /// A tree of the host could not be granted or taken back.
    #[error("cannot share files with the sandbox `{id}`: {reason}")]
    Tree {
        /// Which sandbox.
        id: SandboxId,
        /// What happened.
        reason: String,
    },
    /// The connection to it broke.
    #[error("cannot reach the sandbox `{id}`")]
    Io {
        /// Which sandbox.
        id: SandboxId,
        /// What the system said.
        #[source]
        source: Arc<std::io::Error>,
    },
}

/// A tree of the host that a sandbox is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeGrant {
    /// What it is called in the sandbox and by [`Sandbox::revoke`].
    pub name: TreeName,
    /// What the descriptor that comes with it is of.
    pub kind: TreeKind,
    /// Whether changes are refused.
    pub read_only: bool,
}

/// What a granted tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeKind {
    /// A directory and all beneath it.
    Directory,
    /// One regular file.
    File,
}

/// A machine with an agent in it.
///
/// All methods may be called at the same time from many tasks. Dropping a future that one of them returned must not leave the
/// sandbox half started: work that has begun goes on in the background.
#[async_trait]
pub trait Sandbox: Send + Sync + 'static {
    /// Its name.
    fn id(&self) -> &SandboxId;

    /// Its state, and every later one. The state becomes [`SandboxState::Died`] as soon as the agent's ready connection
    /// ends unasked.
    fn state(&self) -> watch::Receiver<SandboxState>;

    /// Makes sure that it runs: adopts one that runs already, or boots it; returns when its agent has said [`Hello`] (or
    /// has answered, if adopted). Concurrent calls join one start. A sandbox that died can be started again.
    async fn start(&self) -> Result<Arc<Running>, SandboxError>;

    /// Takes over one that an earlier daemon started and that still runs; `None` if there is none. Never boots.
    async fn adopt(&self) -> Result<Option<Arc<Running>>, SandboxError>;

    /// A new connection to the agent's API.
    async fn connect(&self) -> Result<UnixStream, SandboxError>;

    /// Hands a connected stream to the guest, where it appears as a connection to `port` from the host's port `from` (vsock;
    /// see `coracle_vmm::control::VsockConnect`). Whatever carries the sandbox moves the bytes from then on: the daemon may
    /// end. A guest that does not take it closes it.
    async fn pass_stream(&self, port: u32, from: u32, stream: OwnedFd) -> Result<(), SandboxError>;

    /// Makes the EROFS image at `path`, of `len` bytes (a multiple of 4096), readable in the sandbox, and says where. A
    /// layer that is attached already gives the same answer again. What was attached is gone after a restart of the sandbox,
    /// but not after a restart of the daemon: after [`Sandbox::adopt`] the same layers are still where they were.
    async fn attach_layer(
        &self,
        diff_id: &DiffId,
        path: &Path,
        len: u64,
    ) -> Result<LayerSource, SandboxError>;

    /// Undoes [`Sandbox::attach_layer`]; the agent must have let go of it before (`DELETE /v1/layers/…`).
    async fn detach_layer(&self, diff_id: &DiffId) -> Result<(), SandboxError>;

    /// Opens a tree of the host in the sandbox under a name of its own, and says where it is there. The tree is the file or directory
    /// that `tree` is open on (`O_PATH`); what it contains beneath is all that the guest can reach. The same name again with
    /// the same tree gives the same answer. Like layers, grants are gone after a restart of the sandbox, but not after a restart of the daemon.
    async fn grant(&self, grant: &TreeGrant, tree: OwnedFd) -> Result<TreeSource, SandboxError>;

    /// Takes a grant back, whoever still uses it; does nothing if there is none, or if the sandbox does not run.
    async fn revoke(&self, name: &TreeName) -> Result<(), SandboxError>;

    /// The grants that the running sandbox has, in no particular order; none if it does not run.
    async fn grants(&self) -> Result<Vec<TreeName>, SandboxError>;

    /// Shuts it down: asks the agent to (`POST /v1/shutdown`), then, after a grace period of its own, by force. Returns
    /// when it is gone; does nothing if it does not run.
    async fn stop(&self) -> Result<(), SandboxError>;
}

/// Makes sandboxes; the engine asks for each by name when it first needs it. Making one starts nothing.
pub trait SandboxFactory: Send + Sync + 'static {
    /// The sandbox of this name.
    fn sandbox(&self, id: &SandboxId) -> Arc<dyn Sandbox>;
}

impl<F> SandboxFactory for F
where
    F: Fn(&SandboxId) -> Arc<dyn Sandbox> + Send + Sync + 'static,
{
    fn sandbox(&self, id: &SandboxId) -> Arc<dyn Sandbox> {
        self(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_name_can_be_a_folder_name() {
        assert_eq!(SandboxId::shared().as_str().parse::<SandboxId>().unwrap(), SandboxId::shared());
        for bad in ["", "-a", "A", "a/b", "..", &"a".repeat(33)] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad}");
        }
    }
}
