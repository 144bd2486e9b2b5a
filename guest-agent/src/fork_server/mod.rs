//! The fork server: a small process with one thread, forked before the agent has any other thread. It clones the
//! processes of containers, so that a new process can run ordinary code until it executes its program.
//!
//! The new processes are children of the agent (CLONE_PARENT), which therefore waits for them by pidfd. The agent and
//! the fork server trust each other; they are the same program.

mod server;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_agent_api::{ContainerSpec, IpcMode, PidMode, ProcessSpec};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use crate::child::FilesTask;
use crate::error::{AtStep, Result};
use crate::seccomp::Filter;
use crate::sys::{Cloned, Forked};
use crate::{packet, sys};
use coracle_agent_api::{ApiError, ErrorKind};

/// An order to a new process, as the agent writes it.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) enum OrderRef<'a> {
    /// Become a process in a container.
    Process(&'a Task),
    /// Do something to a container's files, and end.
    Files(&'a FilesTask),
}

/// The same, as the new process reads it.
#[derive(Debug, Deserialize)]
pub(crate) enum Order {
    /// See [`OrderRef::Process`].
    Process(Box<Task>),
    /// See [`OrderRef::Files`].
    Files(Box<FilesTask>),
}

/// What a new process must do, as the agent tells it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The whole order: where to run.
    pub place: Place,
    /// What to run.
    pub process: ProcessSpec,
    /// Keep every capability.
    pub all_capabilities: bool,
    /// The system calls that the program may make; all without a filter.
    pub seccomp: Option<Filter>,
    /// Die when the agent dies (only where the agent is not PID 1).
    pub die_with_agent: bool,
}

/// Where a process runs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Place {
    /// In new namespaces, which it sets up itself.
    New(Box<NewContainer>),
    /// In the namespaces of a running container.
    Joined,
}

/// A container to set up.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NewContainer {
    /// What the daemon asked for.
    pub spec: ContainerSpec,
    /// An empty directory in the agent's mount namespace where the root file system is attached for a moment.
    pub mount_point: String,
    /// The agent's copies of `spec.files`, in their order.
    pub files: Vec<String>,
    /// The directories of `spec.volumes`, in their order.
    pub volumes: Vec<String>,
    /// Where the trees of `spec.binds` are in the agent's mount namespace, in their order.
    pub trees: Vec<String>,
    /// The use of devices is ruled by the cgroup, so that their nodes need not be kept from opening anything.
    pub devices_ruled: bool,
    /// What /dev/shm is.
    pub shm: Shm,
}

/// A container's /dev/shm.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Shm {
    /// A tmpfs of its own.
    New,
    /// Not there.
    Missing,
    /// That of others, at this path in the agent's file system.
    Shared(String),
}

/// Descriptors that go to a new process.
pub(crate) struct TaskFds<'a> {
    /// The new process's end of its report socket.
    pub report: BorrowedFd<'a>,
    /// Its cgroup.
    pub cgroup: BorrowedFd<'a>,
    /// For a new container: the detached mount of its root file system. To join: the pidfd of the container's first process.
    pub place: BorrowedFd<'a>,
    /// The first process of the container whose processes a new one shall see.
    pub pid_donor: Option<BorrowedFd<'a>>,
    /// The first process of the container whose memory a new one shall share.
    pub ipc_donor: Option<BorrowedFd<'a>>,
    /// The network namespace of a new container; without it, it has the agent's.
    pub network: Option<BorrowedFd<'a>>,
    /// Standard input, output and error; without them the process gets a terminal.
    pub stdio: Option<[BorrowedFd<'a>; 3]>,
}

/// Flags of a request.
const JOIN: u16 = 1;
/// There are standard streams.
pub(crate) const STDIO: u16 = 2;
/// Namespaces that a new container does not get: it has the agent's, or a donor's.
const NO_PID: u16 = 4;
const NO_IPC: u16 = 8;
const NO_UTS: u16 = 16;
/// There are such containers.
pub(crate) const PID_DONOR: u16 = 32;
/// See [`PID_DONOR`].
pub(crate) const IPC_DONOR: u16 = 64;
/// No new namespaces at all.
const NO_NAMESPACES: u16 = 128;
/// There is a network namespace to join.
pub(crate) const NETWORK: u16 = 256;

/// What a new process reports about itself; the end of the stream without an error means that the program runs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The terminal's two ends come with this packet.
    Terminal,
    /// Nothing but `execve` is left to do. The moments are CLOCK_MONOTONIC nanoseconds.
    Executing {
        /// What was finished when.
        moments: Vec<(String, u64)>,
    },
    /// It could not be done.
    Failed(ApiError),
}

/// The agent's end.
pub(crate) struct ForkServer {
    socket: Mutex<AsyncFd<OwnedFd>>,
    pid: u32,
}

/// The started fork server, before there is an event loop.
pub(crate) struct Unattached {
    socket: OwnedFd,
    pid: u32,
}

/// Starts the fork server. The process must have one thread.
pub(crate) fn start() -> io::Result<Unattached> {
    let (ours, theirs) = packet::pair()?;
    match sys::fork()? {
        Forked::Child => {
            drop(ours);
            server::run(theirs)
        }
        Forked::Parent { pid } => Ok(Unattached { socket: ours, pid }),
    }
}

impl Unattached {
    /// Ties it to the event loop.
    pub(crate) fn attach(self) -> io::Result<ForkServer> {
        Ok(ForkServer { socket: Mutex::new(sys::watch(self.socket)?), pid: self.pid })
    }
}

impl ForkServer {
    /// The fork server's own process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Clones a process that carries out the order and reports over `fds.report`.
    pub(crate) async fn spawn(&self, order: OrderRef<'_>, fds: TaskFds<'_>) -> Result<Cloned> {
        let placement = match order {
            OrderRef::Process(Task { place: Place::Joined, .. }) => JOIN,
            OrderRef::Process(Task { place: Place::New(new), .. }) => shared_namespaces(&new.spec),
            OrderRef::Files(_) => NO_NAMESPACES,
        };
        let order = memfd(order).at_kind(ErrorKind::Internal, "write the order to a memfd")?;
        let mut flags = placement;
        let mut all = vec![order.as_fd(), fds.report, fds.cgroup, fds.place];
        if let Some(stdio) = fds.stdio {
            flags |= STDIO;
            all.extend(stdio);
        }
        for (donor, flag) in [(fds.pid_donor, PID_DONOR), (fds.ipc_donor, IPC_DONOR), (fds.network, NETWORK)]
        {
            if let Some(donor) = donor {
                flags |= flag;
                all.push(donor);
            }
        }
        let socket = self.socket.lock().await;
        let sent = |_: &OwnedFd| packet::send(socket.get_ref(), &flags.to_le_bytes(), &all);
        socket
            .async_io(tokio::io::Interest::WRITABLE, sent)
            .await
            .at_kind(ErrorKind::Internal, "ask the fork server")?;
        let (bytes, mut received) = socket
            .async_io(tokio::io::Interest::READABLE, packet::receive)
            .await
            .at_kind(ErrorKind::Internal, "hear the fork server")?;
        let Ok(number) = <[u8; 4]>::try_from(bytes.as_slice()) else {
            return Err(ApiError::new(ErrorKind::Internal, "the fork server has ended"));
        };
        let number = i32::from_le_bytes(number);
        match received.pop() {
            Some(pidfd) => Ok(Cloned { pid: number as u32, pidfd }),
            None => Err(io::Error::from_raw_os_error(number)).at("clone the process"),
        }
    }
}

fn shared_namespaces(spec: &ContainerSpec) -> u16 {
    let mut flags = 0;
    if !matches!(spec.pid, PidMode::Private) {
        flags |= NO_PID;
    }
    if matches!(spec.ipc, IpcMode::Host | IpcMode::Container(_)) {
        flags |= NO_IPC;
    }
    if spec.host_uts {
        flags |= NO_UTS;
    }
    flags
}

fn memfd(order: OrderRef<'_>) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("coracle-task", rustix::fs::MemfdFlags::CLOEXEC)?;
    let file = std::fs::File::from(fd);
    let bytes = serde_json::to_vec(&order)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0)?;
    Ok(file.into())
}
