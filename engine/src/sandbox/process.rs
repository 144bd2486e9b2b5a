//! A sandbox without a VM: the agent as an ordinary root process on this machine. A seam for tests, not a product mode.
//!
//! The agent outlives the object and the process that made it, as a VM outlives the daemon: its pid is kept in a file, its API
//! is a Unix socket, and a later object with the same folder adopts it. Layers are read where they are. A grant of a tree of the host is a
//! symbolic link in the folder: it goes when it is revoked, and nothing else keeps the agent from the rest of the machine.

use std::{
    io,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use coracle_agent_api::{DiffId, Hello, LayerSource};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::{AsFd, OwnedFd},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Mutex, watch},
};

use super::{
    BootPhase, Running, Sandbox, SandboxError, SandboxId, SandboxState, TreeGrant, TreeName, TreeSource,
};

/// The agent must be ready within this.
const START_TIME: Duration = Duration::from_secs(30);
/// The agent must end within this after SIGTERM.
const STOP_TIME: Duration = Duration::from_secs(15);
const MAX_HELLO: u64 = 64 * 1024;

/// See the module.
pub struct ProcessSandbox {
    shared: Arc<Shared>,
}

struct Shared {
    id: SandboxId,
    program: PathBuf,
    folder: PathBuf,
    state: watch::Sender<SandboxState>,
    instances: AtomicU64,
    starting: Mutex<()>,
}

impl ProcessSandbox {
    /// A sandbox whose agent is `program` and which keeps everything in `folder`.
    pub fn new(id: SandboxId, program: &Path, folder: &Path) -> Self {
        let (state, _) = watch::channel(SandboxState::Stopped);
        let (program, folder) = (program.to_owned(), folder.to_owned());
        Self {
            shared: Arc::new(Shared {
                id,
                program,
                folder,
                state,
                instances: AtomicU64::new(0),
                starting: Mutex::default(),
            }),
        }
    }

    /// The agent's process id, if it runs.
    pub fn pid(&self) -> Option<i32> {
        self.shared.read_pid().map(Pid::as_raw_nonzero).map(i32::from)
    }
}

impl Shared {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn failed(&self, reason: impl std::fmt::Display) -> SandboxError {
        SandboxError::Start { id: self.id.clone(), reason: reason.to_string() }
    }

    fn read_pid(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.path("agent.pid")).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }

    fn current(&self) -> Option<Arc<Running>> {
        self.state.borrow().running().cloned()
    }

    async fn start(self: &Arc<Self>) -> Result<Arc<Running>, SandboxError> {
        let _one = self.starting.lock().await;
        if let Some(running) = self.current() {
            return Ok(running);
        }
        if let Some(running) = self.take_over().await {
            return Ok(running);
        }
        self.state.send_replace(SandboxState::Starting);
        match self.boot().await {
            Ok(running) => Ok(running),
            Err(error) => {
                self.state.send_replace(SandboxState::Died { reason: error.to_string() });
                Err(self.failed(error))
            }
        }
    }

    /// Where the links to granted trees are.
    fn trees(&self) -> PathBuf {
        self.path("trees")
    }

    fn grant(&self, name: &TreeName, tree: &OwnedFd) -> io::Result<TreeSource> {
        let folder = self.trees();
        std::fs::create_dir_all(&folder)?;
        let target = std::fs::read_link(format!("/proc/self/fd/{}", tree.as_raw_fd()))?;
        let (named, open) = (rustix::fs::stat(&target)?, rustix::fs::fstat(tree)?);
        if (named.st_dev, named.st_ino) != (open.st_dev, open.st_ino) {
            return Err(io::Error::other("it has no path any more"));
        }
        let link = std::path::absolute(folder.join(name.as_str()))?;
        match std::os::unix::fs::symlink(&target, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if std::fs::read_link(&link)? != target {
                    return Err(io::Error::other("its name is taken by another tree"));
                }
            }
            made => made?,
        }
        let path =
            link.into_os_string().into_string().map_err(|_| io::Error::other("its path is not UTF-8"))?;
        Ok(TreeSource::Path { path })
    }

    fn revoke(&self, name: &TreeName) -> io::Result<()> {
        match std::fs::remove_file(self.trees().join(name.as_str())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn grants(&self) -> io::Result<Vec<TreeName>> {
        let entries = match std::fs::read_dir(self.trees()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let name = |entry: io::Result<std::fs::DirEntry>| {
            let name = entry?.file_name().into_string().map_err(|_| io::ErrorKind::InvalidData)?;
            TreeName::try_from(name).map_err(io::Error::other)
        };
        entries.map(name).collect()
    }

    /// Does something to the grants, if there is a life of the sandbox that they are of.
    async fn with_trees<T: Default + Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> Result<T, SandboxError> {
        if self.current().is_none() {
            return Ok(T::default());
        }
        let shared = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&shared)).await.map_err(io::Error::other);
        done.flatten().map_err(|error| self.no_tree(error))
    }

    fn no_tree(&self, reason: impl std::fmt::Display) -> SandboxError {
        SandboxError::Tree { id: self.id.clone(), reason: reason.to_string() }
    }

    async fn boot(self: &Arc<Self>) -> io::Result<Arc<Running>> {
        let begun = Instant::now();
        std::fs::create_dir_all(&self.folder)?;
        for name in ["ready.sock", "agent.sock", "streams.sock"] {
            let _ = std::fs::remove_file(self.path(name));
        }
        for name in self.grants()? {
            self.revoke(&name)?;
        }
        let ready = UnixListener::bind(self.path("ready.sock"))?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("agent.log"))?;
        let mut command = Command::new(&self.program);
        command.arg("--listen-unix").arg(self.path("agent.sock"));
        command.arg("--ready-unix").arg(self.path("ready.sock"));
        command.arg("--streams-unix").arg(self.path("streams.sock"));
        command.arg("--data-dir").arg(self.path("data"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let mut child = command.spawn()?;
        let pid = child.id();
        std::fs::write(self.path("agent.pid"), pid.to_string())?;
        let pid = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("the agent has no pid"))?;
        let mut ended = End::watch(pid)?;
        // Reaps the agent whenever it ends.
        std::thread::spawn(move || child.wait());
        let phases = vec![phase("spawned", begun)];
        let hello = tokio::select! {
            hello = tokio::time::timeout(START_TIME, hello(&ready)) => hello.map_err(|_| io::Error::other("the agent said nothing"))??,
            () = ended.wait() => return Err(io::Error::other("the agent ended at once; see agent.log")),
        };
        let (hello, connection) = hello;
        let boot = phases.into_iter().chain([phase("hello", begun)]).collect();
        drop(connection);
        Ok(self.running(Running { instance: 0, hello: Some(hello), boot, adopted: false, lost: None }, ended))
    }

    /// Finds an agent that an earlier daemon started.
    async fn take_over(self: &Arc<Self>) -> Option<Arc<Running>> {
        let pid = self.read_pid()?;
        let ended = End::watch(pid).ok()?;
        // Another process may have the number now; only an agent answers on the socket.
        UnixStream::connect(self.path("agent.sock")).await.ok()?;
        Some(self.running(
            Running { instance: 0, hello: None, boot: Vec::new(), adopted: true, lost: None },
            ended,
        ))
    }

    fn running(self: &Arc<Self>, running: Running, mut ended: End) -> Arc<Running> {
        let instance = self.instances.fetch_add(1, Ordering::Relaxed) + 1;
        let running = Arc::new(Running { instance, ..running });
        self.state.send_replace(SandboxState::Running(Arc::clone(&running)));
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            ended.wait().await;
            shared.state.send_if_modified(|state| {
                let ours = state.running().is_some_and(|running| running.instance == instance);
                if ours {
                    *state = SandboxState::Died { reason: "the agent's process ended".to_owned() };
                }
                ours
            });
        });
        running
    }

    async fn stop(self: &Arc<Self>) -> Result<(), SandboxError> {
        let _one = self.starting.lock().await;
        let Some(pid) = self.read_pid() else { return Ok(()) };
        let Ok(mut ended) = End::watch(pid) else { return Ok(()) };
        self.state.send_replace(SandboxState::Stopped);
        let _ = pidfd_send_signal(&ended.pidfd, Signal::TERM);
        if tokio::time::timeout(STOP_TIME, ended.wait()).await.is_err() {
            let _ = pidfd_send_signal(&ended.pidfd, Signal::KILL);
            ended.wait().await;
        }
        let _ = std::fs::remove_file(self.path("agent.pid"));
        Ok(())
    }
}

/// The end of a process that may be no child of ours. A thread waits for it.
struct End {
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<bool>,
}

impl End {
    fn watch(pid: Pid) -> io::Result<Self> {
        let pidfd = Arc::new(pidfd_open(pid, PidfdFlags::empty())?);
        let (sender, ended) = watch::channel(false);
        let waiting = Arc::clone(&pidfd);
        std::thread::spawn(move || {
            let mut events = [PollFd::new(&waiting, PollFlags::IN)];
            while poll(&mut events, None).is_err() {}
            sender.send_replace(true);
        });
        Ok(Self { pidfd, ended })
    }

    async fn wait(&mut self) {
        // The sender says true before it goes.
        let _ = self.ended.wait_for(|ended| *ended).await;
    }
}

fn phase(name: &str, begun: Instant) -> BootPhase {
    BootPhase {
        name: name.to_owned(),
        micros: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
    }
}

async fn hello(ready: &UnixListener) -> io::Result<(Hello, UnixStream)> {
    let (mut stream, _) = ready.accept().await?;
    let mut line = String::new();
    BufReader::new((&mut stream).take(MAX_HELLO)).read_line(&mut line).await?;
    let hello: Hello = serde_json::from_str(&line).map_err(io::Error::other)?;
    if hello.api_version != coracle_agent_api::API_VERSION {
        return Err(io::Error::other(format!("the agent speaks version {} of its API", hello.api_version)));
    }
    Ok((hello, stream))
}

/// Sends a descriptor to the agent, which uses it itself.
async fn pass(agent: &Path, port: u32, from: u32, stream: &OwnedFd) -> io::Result<()> {
    let connection = UnixStream::connect(agent).await?;
    let message = [port.to_be_bytes(), from.to_be_bytes()].concat();
    let send = || {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [stream.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(sendmsg(&connection, &[io::IoSlice::new(&message)], &mut ancillary, flags)?)
    };
    connection.async_io(tokio::io::Interest::WRITABLE, send).await.map(drop)
}

#[async_trait]
impl Sandbox for ProcessSandbox {
    fn id(&self) -> &SandboxId {
        &self.shared.id
    }

    fn state(&self) -> watch::Receiver<SandboxState> {
        self.shared.state.subscribe()
    }

    async fn start(&self) -> Result<Arc<Running>, SandboxError> {
        let shared = Arc::clone(&self.shared);
        let started = tokio::spawn(async move { shared.start().await }).await;
        started.map_err(|error| self.shared.failed(error))?
    }

    async fn adopt(&self) -> Result<Option<Arc<Running>>, SandboxError> {
        let _one = self.shared.starting.lock().await;
        if let Some(running) = self.shared.current() {
            return Ok(Some(running));
        }
        Ok(self.shared.take_over().await)
    }

    async fn connect(&self) -> Result<UnixStream, SandboxError> {
        if self.shared.current().is_none() {
            return Err(SandboxError::NotRunning { id: self.shared.id.clone() });
        }
        let connected = UnixStream::connect(self.shared.path("agent.sock")).await;
        connected.map_err(|error| SandboxError::Io { id: self.shared.id.clone(), source: Arc::new(error) })
    }

    async fn pass_stream(&self, port: u32, from: u32, stream: OwnedFd) -> Result<(), SandboxError> {
        if self.shared.current().is_none() {
            return Err(SandboxError::NotRunning { id: self.shared.id.clone() });
        }
        let passed = pass(&self.shared.path("streams.sock"), port, from, &stream).await;
        passed.map_err(|error| SandboxError::Io { id: self.shared.id.clone(), source: Arc::new(error) })
    }

    async fn attach_layer(
        &self,
        diff_id: &DiffId,
        path: &Path,
        _len: u64,
    ) -> Result<LayerSource, SandboxError> {
        let refused = |reason: String| SandboxError::Layer { id: self.shared.id.clone(), reason };
        let absolute =
            std::fs::canonicalize(path).map_err(|error| refused(format!("{}: {error}", diff_id.short())))?;
        let path = absolute
            .into_os_string()
            .into_string()
            .map_err(|_| refused("its path is not UTF-8".to_owned()))?;
        Ok(LayerSource::File { path })
    }

    async fn detach_layer(&self, _diff_id: &DiffId) -> Result<(), SandboxError> {
        Ok(())
    }

    async fn grant(&self, grant: &TreeGrant, tree: OwnedFd) -> Result<TreeSource, SandboxError> {
        if self.shared.current().is_none() {
            return Err(SandboxError::NotRunning { id: self.shared.id.clone() });
        }
        let (shared, name) = (Arc::clone(&self.shared), grant.name.clone());
        let granted = tokio::task::spawn_blocking(move || shared.grant(&name, &tree)).await;
        granted.map_err(io::Error::other).flatten().map_err(|error| self.shared.no_tree(error))
    }

    async fn revoke(&self, name: &TreeName) -> Result<(), SandboxError> {
        let name = name.clone();
        self.shared.with_trees(move |shared| shared.revoke(&name)).await
    }

    async fn grants(&self) -> Result<Vec<TreeName>, SandboxError> {
        self.shared.with_trees(Shared::grants).await
    }

    async fn stop(&self) -> Result<(), SandboxError> {
        self.shared.stop().await
    }
}
