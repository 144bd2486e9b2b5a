//! Starting a process: a container's first one, or one that joins.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use coracle_agent_api::frame::Kind;
use coracle_agent_api::{
    ApiError, ContainerSpec, DeviceKind, DeviceRule, ErrorKind, ExecSpec, IpcMode, Network, PidMode,
    ProcessId, ProcessSpec, StartPhase, Started, TreeSource,
};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::{Agent, blocking, files};
use crate::cgroup::{Cgroup, Devices};
use crate::containers::{Container, Holdings, Interfaces, Published, SharedMemory};
use crate::engine_socket::EngineSocket;
use crate::error::{AtStep, Result, conflict, invalid};
use crate::fork_server::{NewContainer, OrderRef, Place, Report, Shm, Task, TaskFds};
use crate::network::{names, namespace::Namespace};
use crate::processes::spool::Spool;
use crate::processes::{self, Process, Stdin, read_pipe, read_terminal, watch_fd};
use crate::seccomp::Filter;
use crate::{check, child, clock, packet, sys};

/// Rules for devices of one container at most.
const MAX_DEVICE_RULES: usize = 400;

/// What was prepared for a new container.
struct Prepared {
    holdings: Holdings,
    files: Vec<String>,
    volumes: Vec<String>,
    trees: Vec<String>,
    seccomp: Option<Arc<Filter>>,
    shm: Shm,
    /// Where others find its shared memory.
    shared: Option<String>,
    devices_ruled: bool,
    donors: Donors,
    network: Option<Arc<Namespace>>,
    /// Of its name server.
    names: Option<names::Sockets>,
}

/// Where a process is born.
struct Site<'a> {
    cgroup: &'a Cgroup,
    /// See [`TaskFds::place`].
    place: BorrowedFd<'a>,
    /// The first processes of the containers whose processes and memory it shares.
    donors: [Option<BorrowedFd<'a>>; 2],
    /// See [`TaskFds::network`].
    network: Option<BorrowedFd<'a>>,
}

/// Containers whose namespaces a new one joins.
struct Donors {
    pid: Option<Arc<Container>>,
    ipc: Option<Arc<Container>>,
}

impl Donors {
    fn fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [
            self.pid.as_ref().map(|donor| donor.pidfd.get_ref().as_fd()),
            self.ipc.as_ref().map(|donor| donor.pidfd.get_ref().as_fd()),
        ]
    }
}

/// The agent's ends of a process's standard streams.
enum Ours {
    Pipes { stdin: Option<OwnedFd>, stdout: OwnedFd, stderr: OwnedFd },
    Terminal,
}

/// What a new process's set-up came to.
struct SetUp {
    terminal: Option<(OwnedFd, OwnedFd)>,
    moments: Vec<(String, u64)>,
}

impl Agent {
    /// Starts a container. `since` is when the request was read, on the monotonic clock.
    pub(crate) async fn start_container(
        self: &Arc<Self>,
        id: ProcessId,
        spec: ContainerSpec,
        since: u64,
    ) -> Result<Started> {
        check::container(&spec)?;
        self.egress.ready().await;
        let reservation = self.processes.reserve(&id)?;
        self.containers.wait_gone(&id).await;
        self.containers.begin(&id);
        // Two mounts of one writable layer at a time are one too many.
        self.files.settle(&id, files::PATIENCE).await;
        // What fails in there has given back what it held.
        let (process, started) = self.start_reserved(&id, spec, since).await?;
        reservation.fill(process.clone());
        self.kill_if_stopping(&process);
        Ok(started)
    }

    /// A process that was being started when everything was killed was not among what was killed.
    fn kill_if_stopping(&self, process: &Process) {
        if self.stopping.load(Ordering::SeqCst) {
            let _ = process.signal(libc::SIGKILL as u8);
        }
    }

    async fn start_reserved(
        self: &Arc<Self>,
        id: &ProcessId,
        spec: ContainerSpec,
        since: u64,
    ) -> Result<(Arc<Process>, Started)> {
        let mut phases = Phases { since, phases: Vec::new() };
        let (agent, owned) = (self.clone(), id.clone());
        let prepared = blocking(move || agent.prepare(&owned, &spec).map(|prepared| (prepared, spec))).await;
        let (prepared, spec) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.containers.gone(id);
                return Err(error);
            }
        };
        phases.mark("prepared");
        let Prepared {
            mut holdings,
            files,
            volumes,
            trees,
            seccomp,
            shm,
            shared,
            devices_ruled,
            donors,
            network,
            names,
        } = prepared;
        holdings.ports.names = names.and_then(|sockets| self.serve_names(id, &spec, sockets));
        if let (Network::Endpoints(_), Some(network)) = (&spec.network, &network) {
            let (listeners, namespace) = (self.listeners.clone(), network.cookie());
            listeners.publish(namespace, id, &spec.published_ports);
            holdings.ports.published = Some(Published { listeners, namespace });
        }
        let process = spec.process.clone();
        let new_network = spec.network.clone();
        let all_capabilities = spec.privileged;
        let mount_point = self.mount_point.clone();
        let new = NewContainer { spec, mount_point, files, volumes, trees, devices_ruled, shm };
        let task = Task {
            place: Place::New(Box::new(new)),
            process,
            all_capabilities,
            seccomp: seccomp.as_deref().cloned(),
            die_with_agent: self.die_with_agent,
        };
        let site = Site {
            cgroup: &holdings.cgroup,
            place: holdings.root.as_fd(),
            donors: donors.fds(),
            network: network.as_ref().map(|network| network.as_fd()),
        };
        let own_network = matches!(new_network, Network::Endpoints(_));
        let ports = own_network.then(|| holdings.ports.ports.clone());
        match self.launch(id, id, &task, site, &mut phases).await {
            Ok((process, started)) => {
                let pidfd = process.pidfd.clone();
                let cgroup = holdings.cgroup.clone();
                let container = Container {
                    id: id.clone(),
                    cgroup: cgroup.clone(),
                    seccomp,
                    shm: shared,
                    network,
                    ports,
                    pidfd,
                };
                self.containers.runs(Arc::new(container));
                self.supervise(process.clone(), cgroup, Some(holdings));
                Ok((process, started))
            }
            Err(error) => {
                self.give_back(id.clone(), holdings).await;
                Err(error)
            }
        }
    }

    fn prepare(&self, id: &ProcessId, spec: &ContainerSpec) -> Result<Prepared> {
        let donors = Donors {
            pid: match &spec.pid {
                PidMode::Container(donor) => Some(self.running(donor)?),
                PidMode::Private | PidMode::Host => None,
            },
            ipc: match &spec.ipc {
                IpcMode::Container(donor) => Some(self.running(donor)?),
                _ => None,
            },
        };
        let seccomp = self.seccomp.filter(&spec.seccomp, &spec.process.capabilities)?;
        let devices = devices(spec)?;
        let devices_ruled = self.cgroups.rule_devices() || spec.privileged;
        let layers = self.layers.hold(&spec.layers)?;
        let root = self.storage.mount_root(id, &layers.lower_directories(), devices_ruled)?;
        let files = self.storage.write_files(id, &spec.files)?;
        let volumes = self.volumes.prepare(&root, &spec.volumes)?;
        let engine = self.engine_socket(id, spec)?;
        let trees = self.host_trees.locate(&spec.binds, engine.as_ref().map(EngineSocket::path))?;
        let (shm, shared, owned_shm) = self.shared_memory(id, spec, &donors)?;
        let cgroup = Arc::new(self.cgroups.create(id, &spec.cgroup_parent, &spec.resources, &devices)?);
        let ports = Interfaces::new(&self.networks, id);
        let holdings = Holdings { cgroup, root, layers, shm: owned_shm, ports, engine };
        match self.connect_prepared(id, spec, &holdings) {
            Ok((network, names)) => Ok(Prepared {
                holdings,
                files,
                volumes,
                trees,
                seccomp,
                shm,
                shared,
                devices_ruled,
                donors,
                network,
                names,
            }),
            Err(error) => {
                holdings.give_back(id);
                Err(error)
            }
        }
    }

    fn connect_prepared(
        &self,
        id: &ProcessId,
        spec: &ContainerSpec,
        holdings: &Holdings,
    ) -> Result<(Option<Arc<Namespace>>, Option<names::Sockets>)> {
        let network = self.network(&spec.network, &holdings.ports)?;
        let names = self.name_sockets(id, &spec.network, network.as_ref(), &holdings.cgroup)?;
        Ok((network, names))
    }

    /// The socket of the daemon's API, if the container mounts it.
    fn engine_socket(&self, id: &ProcessId, spec: &ContainerSpec) -> Result<Option<EngineSocket>> {
        let wanted = spec.binds.iter().any(|bind| bind.source == TreeSource::Engine);
        wanted
            .then(|| EngineSocket::open(&self.engine_sockets, id, &self.egress))
            .transpose()
            .at("make the engine's socket")
    }

    /// A container's network namespace, and in it what the container is connected to.
    fn network(&self, network: &Network, interfaces: &Interfaces) -> Result<Option<Arc<Namespace>>> {
        match network {
            Network::Host => Ok(None),
            Network::Container(donor) => Ok(self.running(donor)?.network.clone()),
            Network::Endpoints(endpoints) => {
                let namespace = Namespace::new().at("make a network namespace")?;
                if let Some(ports) = interfaces.ports.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
                {
                    self.networks.connect(&namespace, endpoints, ports)?;
                }
                Ok(Some(Arc::new(namespace)))
            }
        }
    }

    /// The sockets of a container's name server, if it is to have one: one that shares another container's namespace has that one's.
    fn name_sockets(
        &self,
        id: &ProcessId,
        network: &Network,
        namespace: Option<&Arc<Namespace>>,
        cgroup: &Cgroup,
    ) -> Result<Option<names::Sockets>> {
        const STEP: &str = "open the name server's sockets";
        match (network, namespace) {
            (Network::Endpoints(endpoints), Some(namespace)) if !endpoints.is_empty() => {
                names::Sockets::open(namespace.clone()).at(STEP).map(Some)
            }
            (_, None) => {
                let group = cgroup.identity().at(STEP)?;
                names::Sockets::open_in_guest(id, group).at(STEP).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn serve_names(
        &self,
        id: &ProcessId,
        spec: &ContainerSpec,
        sockets: names::Sockets,
    ) -> Option<names::Server> {
        let knowledge = names::Knowledge {
            container: id.clone(),
            directory: self.networks.directory().clone(),
            upstream: self.upstream.clone(),
            servers: spec.name_servers.clone(),
            descriptors: self.descriptors().clone(),
        };
        names::serve(sockets, knowledge, self.egress.runtime())
            .inspect_err(|error| tracing::error!(container = id.short(), "it has no names: {error}"))
            .ok()
    }

    /// What /dev/shm is, where others find it, and what of it the container holds.
    fn shared_memory(
        &self,
        id: &ProcessId,
        spec: &ContainerSpec,
        donors: &Donors,
    ) -> Result<(Shm, Option<String>, Option<SharedMemory>)> {
        const OF_THE_GUEST: &str = "/dev/shm";
        Ok(match &spec.ipc {
            IpcMode::Private => (Shm::New, None, None),
            IpcMode::None => (Shm::Missing, None, None),
            IpcMode::Host => {
                let path = OF_THE_GUEST.to_owned();
                (Shm::Shared(path.clone()), Some(path), None)
            }
            IpcMode::Shareable => {
                let made =
                    SharedMemory::new(self.shm.join(id.as_str()), spec.shm_size).at("make /dev/shm")?;
                let path = made.path().to_string_lossy().into_owned();
                (Shm::Shared(path.clone()), Some(path), Some(made))
            }
            IpcMode::Container(donor) => {
                let shared = donors.ipc.as_ref().and_then(|donor| donor.shm.clone());
                let path = shared.ok_or_else(|| {
                    conflict(format!("the IPC namespace of container {} is not shareable", donor.short()))
                })?;
                (Shm::Shared(path.clone()), Some(path), None)
            }
        })
    }

    /// Starts a process in a running container.
    pub(crate) async fn start_exec(
        self: &Arc<Self>,
        id: ProcessId,
        spec: ExecSpec,
        since: u64,
    ) -> Result<Started> {
        check::process(&spec.process)?;
        let container = self.running(&spec.container)?;
        if container.cgroup.is_frozen() {
            // The new process would stand still before it could say anything.
            return Err(conflict(format!("container {} is paused", container.id.short())));
        }
        let reservation = self.processes.reserve(&id)?;
        let mut phases = Phases { since, phases: Vec::new() };
        let task = Task {
            place: Place::Joined,
            process: spec.process,
            all_capabilities: spec.privileged,
            seccomp: container.seccomp.as_deref().cloned(),
            die_with_agent: self.die_with_agent,
        };
        let place = container.pidfd.get_ref().as_fd();
        let site = Site { cgroup: &container.cgroup, place, donors: [None, None], network: None };
        let launched = self.launch(&id, &container.id, &task, site, &mut phases).await;
        let (process, started) = launched.map_err(|error| match self.containers.running(&container.id) {
            Some(_) => error,
            // It ended meanwhile: that is the reason, whatever the symptom.
            None => conflict(format!("container {} is not running", container.id.short())),
        })?;
        self.supervise(process.clone(), container.cgroup.clone(), None);
        reservation.fill(process.clone());
        self.kill_if_stopping(&process);
        Ok(started)
    }

    /// Clones, waits until the program runs, and ties its streams to the event loop.
    async fn launch(
        self: &Arc<Self>,
        id: &ProcessId,
        container: &ProcessId,
        task: &Task,
        site: Site<'_>,
        phases: &mut Phases,
    ) -> Result<(Arc<Process>, Started)> {
        let (ours, theirs) = streams(&task.process).at("make the standard streams")?;
        let (report, child_report) = packet::pair().at("make the report socket")?;
        let report = watch_fd(report, "the report socket")?;
        let cloned = {
            let _starting = self.reaper.starting();
            let stdio = theirs
                .as_ref()
                .map(|[stdin, stdout, stderr]| [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]);
            let Site { cgroup, place, donors: [pid_donor, ipc_donor], network } = site;
            let (report, cgroup) = (child_report.as_fd(), cgroup.as_fd());
            let fds = TaskFds { report, cgroup, place, pid_donor, ipc_donor, network, stdio };
            let cloned = self.fork_server.spawn(OrderRef::Process(task), fds).await?;
            self.reaper.is_awaited(cloned.pid);
            cloned
        };
        drop((theirs, child_report));
        phases.mark("clone");
        let pidfd = Arc::new(watch_fd(cloned.pidfd, "the process")?);
        let set_up = match follow(&report).await {
            Ok(set_up) => set_up,
            Err(error) => {
                // It ends by itself after it has reported; if it did not report, it is gone already.
                let _ = processes::wait(&pidfd).await;
                self.reaper.was_reaped(cloned.pid);
                return Err(error);
            }
        };
        let started_unix_nanos = clock::unix_nanos();
        phases.merge(&set_up.moments);
        phases.mark("exec");
        let started =
            Started { pid: cloned.pid, started_unix_nanos, phases: std::mem::take(&mut phases.phases) };
        let attached = attach(id, container, &task.process, ours, set_up.terminal, &started, pidfd.clone());
        let process = match attached {
            Ok(process) => process,
            Err(error) => {
                let _ = sys::pidfd_send_signal(pidfd.get_ref().as_fd(), libc::SIGKILL as u8);
                let _ = processes::wait(&pidfd).await;
                self.reaper.was_reaped(cloned.pid);
                return Err(error);
            }
        };
        tracing::info!(process = id.short(), container = container.short(), pid = cloned.pid, "started");
        Ok((process, started))
    }
}

/// What a container may do with devices.
fn devices(spec: &ContainerSpec) -> Result<Devices> {
    if spec.privileged {
        return Ok(Devices::All);
    }
    let mut rules = spec.device_rules.clone();
    for device in &spec.devices {
        rules.extend(child::expand_device(device)?.iter().map(|node| DeviceRule {
            kind: if node.is_block { DeviceKind::Block } else { DeviceKind::Char },
            major: Some(node.major),
            minor: Some(node.minor),
            access: device.access,
        }));
    }
    // A longer program than the kernel takes.
    if rules.len() > MAX_DEVICE_RULES {
        return Err(invalid(format!("more than {MAX_DEVICE_RULES} devices were asked for")));
    }
    Ok(Devices::Rules(rules))
}

/// Makes a process's standard streams: the agent's ends and the process's. With a terminal it makes them itself.
fn streams(process: &ProcessSpec) -> std::io::Result<(Ours, Option<[OwnedFd; 3]>)> {
    if process.tty {
        return Ok((Ours::Terminal, None));
    }
    let (stdin, their_stdin) = match process.stdin {
        true => {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            (Some(write), read)
        }
        false => (None, std::fs::File::open("/dev/null")?.into()),
    };
    let (stdout, their_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Ours::Pipes { stdin, stdout, stderr }, Some([their_stdin, their_stdout, their_stderr])))
}

/// Hears the new process until its program runs.
async fn follow(report: &AsyncFd<OwnedFd>) -> Result<SetUp> {
    let mut set_up = SetUp { terminal: None, moments: Vec::new() };
    let mut executing = false;
    loop {
        let (bytes, fds) = report
            .async_io(Interest::READABLE, packet::receive)
            .await
            .at_kind(ErrorKind::Internal, "hear the new process")?;
        if bytes.is_empty() {
            return match executing {
                true => Ok(set_up),
                false => Err(ApiError::new(
                    ErrorKind::StartFailed,
                    "the container's process was killed while it was set up",
                )),
            };
        }
        let message = serde_json::from_slice(&bytes)
            .map_err(|error| ApiError::new(ErrorKind::Internal, format!("a malformed report: {error}")))?;
        match message {
            Report::Terminal => {
                let mut fds = fds.into_iter();
                set_up.terminal = fds.next().zip(fds.next());
            }
            Report::Executing { moments } => {
                executing = true;
                set_up.moments = moments;
            }
            Report::Failed(error) => return Err(error),
        }
    }
}

/// Makes the record of a process whose program runs, and starts reading what it writes.
fn attach(
    id: &ProcessId,
    container: &ProcessId,
    spec: &ProcessSpec,
    ours: Ours,
    terminal: Option<(OwnedFd, OwnedFd)>,
    started: &Started,
    pidfd: Arc<AsyncFd<OwnedFd>>,
) -> Result<Arc<Process>> {
    let mut process = Process {
        id: id.clone(),
        container: container.clone(),
        pid: started.pid,
        started_unix_nanos: started.started_unix_nanos,
        spool: Spool::new(if spec.tty { 1 } else { 2 }),
        stdin: None,
        terminal: None,
        pidfd,
        exit: watch::Sender::new(None),
    };
    match ours {
        Ours::Terminal => {
            let (outer, inner) = terminal
                .ok_or_else(|| ApiError::new(ErrorKind::Internal, "the new process made no terminal"))?;
            let outer = Arc::new(watch_fd(outer, "the terminal")?);
            process.stdin = spec.stdin.then(|| Stdin::terminal(outer.clone()));
            process.terminal = Some(outer);
            let process = Arc::new(process);
            tokio::spawn(read_terminal(process.clone(), inner));
            Ok(process)
        }
        Ours::Pipes { stdin, stdout, stderr } => {
            if let Some(stdin) = stdin {
                process.stdin = Some(Stdin::pipe(watch_fd(stdin, "standard input")?));
            }
            let stdout = watch_fd(stdout, "standard output")?;
            let stderr = watch_fd(stderr, "standard error")?;
            let process = Arc::new(process);
            tokio::spawn(read_pipe(process.clone(), stdout, Kind::Stdout));
            tokio::spawn(read_pipe(process.clone(), stderr, Kind::Stderr));
            Ok(process)
        }
    }
}

/// When which part of a start was finished.
struct Phases {
    since: u64,
    phases: Vec<StartPhase>,
}

impl Phases {
    fn mark(&mut self, name: &str) {
        self.add(name, clock::monotonic_nanos());
    }

    fn merge(&mut self, moments: &[(String, u64)]) {
        for (name, nanos) in moments {
            self.add(name, *nanos);
        }
    }

    fn add(&mut self, name: &str, nanos: u64) {
        let micros = nanos.saturating_sub(self.since) / 1000;
        self.phases.push(StartPhase { name: name.to_owned(), micros });
    }
}
