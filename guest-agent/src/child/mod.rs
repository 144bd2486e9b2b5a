//! What a new process does between its birth in the fork server and the execution of its program: it sets up or joins a
//! container, becomes the user it shall be, and executes. It has one thread and reports over a socket that closes by
//! itself when the program starts.
//!
//! The image is hostile: every path inside it is resolved by [`root_dir::RootDir`] and no other way.

mod capabilities;
mod command;
mod container;
mod devices;
mod files;
mod identity;
mod init;
mod program;
mod root_dir;
mod terminal;
mod tmpfs;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use coracle_agent_api::{ApiError, ErrorKind};
use rustix::thread::ThreadNameSpaceType;

use crate::error::{AtStep, Result};
use crate::fork_server::{IPC_DONOR, NETWORK, Order, PID_DONOR, Place, Report, STDIO};
use crate::{packet, sys};

pub(crate) use capabilities::parse as parse_capabilities;
pub(crate) use container::{mount_volumes, sysctl_path};
pub(crate) use devices::expand as expand_device;
pub(crate) use files::{FilesPlace, FilesTask};
pub(crate) use program::resource_of;
pub(crate) use root_dir::{RootDir, open_directory};
pub(crate) use tmpfs::TmpfsOptions;

/// The descriptors that came with an order.
pub(crate) struct ChildFds {
    order: OwnedFd,
    report: OwnedFd,
    /// The cgroup to be born in.
    pub cgroup: OwnedFd,
    /// The root file system, or the pidfd of the container to join.
    pub place: OwnedFd,
    stdio: Option<[OwnedFd; 3]>,
    /// The container whose processes a new one shall see.
    pub pid_donor: Option<OwnedFd>,
    ipc_donor: Option<OwnedFd>,
    network: Option<OwnedFd>,
}

impl ChildFds {
    /// Takes the descriptors of a packet apart; `has` tells which there are, by the flags of the request.
    pub(crate) fn from_packet(fds: Vec<OwnedFd>, has: impl Fn(u16) -> bool) -> Option<Self> {
        let mut fds = fds.into_iter();
        let (order, report, cgroup, place) = (fds.next()?, fds.next()?, fds.next()?, fds.next()?);
        let stdio = match has(STDIO) {
            true => Some([fds.next()?, fds.next()?, fds.next()?]),
            false => None,
        };
        let mut next = |flag| if has(flag) { fds.next().map(Some) } else { Some(None) };
        let (pid_donor, ipc_donor, network) = (next(PID_DONOR)?, next(IPC_DONOR)?, next(NETWORK)?);
        Some(Self { order, report, cgroup, place, stdio, pid_donor, ipc_donor, network })
    }
}

/// Carries the order out; never returns.
pub(crate) fn run(fds: ChildFds) -> ! {
    let ChildFds { order, report, cgroup, place, stdio, pid_donor, ipc_donor, network } = fds;
    drop((cgroup, pid_donor));
    let work = || execute(order, &report, place, stdio, Joined { ipc_donor, network });
    let error = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Err(error)) => error,
        Ok(Ok(never)) => match never {},
        Err(_) => ApiError::new(ErrorKind::Internal, "the process panicked while it was set up"),
    };
    let _ = send_report(&report, &Report::Failed(error), &[]);
    sys::exit_now(255)
}

enum Never {}

/// What a new container has that is not its own.
struct Joined {
    /// The container whose memory it shares.
    ipc_donor: Option<OwnedFd>,
    /// Its network namespace.
    network: Option<OwnedFd>,
}

fn execute(
    order: OwnedFd,
    report: &OwnedFd,
    place: OwnedFd,
    stdio: Option<[OwnedFd; 3]>,
    joined: Joined,
) -> Result<Never> {
    let mut timeline = Timeline::default();
    let task = match read_order(order)? {
        Order::Process(task) => task,
        Order::Files(task) => {
            let stdio =
                stdio.ok_or_else(|| ApiError::new(ErrorKind::Internal, "work on files needs streams"))?;
            sys::exit_now(files::run(*task, place, stdio));
        }
    };
    let process = &task.process;
    let mut first_process = false;
    let mut with_init = false;
    // While /proc is still the agent's, and not one that the container could have changed.
    program::set_oom_score(process)?;
    let root = match &task.place {
        Place::New(new) => {
            first_process = true;
            with_init = new.spec.init;
            container::set_up(new, place, joined, process.tty)?
        }
        Place::Joined => join(place)?,
    };
    timeline.mark("namespaces");
    let stdio = match stdio {
        Some(stdio) => stdio,
        None => terminal::open(&root.dir, root.devpts.as_ref(), process, report, first_process)?,
    };
    if first_process {
        container::enter(&root.dir)?;
    }
    if with_init && let Some(main) = init::fork_main()? {
        // From here on this process is the container's init; the other one goes on.
        init::run(main, &task);
    }
    let prepared = program::prepare(&root.dir, &task, first_process, stdio)?;
    timeline.mark("process");
    send_report(report, &Report::Executing { moments: timeline.moments }, &[])
        .at_kind(ErrorKind::Internal, "report to the agent")?;
    Err(prepared.execute())
}

/// A container's root, seen from the process that sets it up or joins it.
struct Root {
    dir: RootDir,
    /// The devpts mount, where this process made it.
    devpts: Option<OwnedFd>,
}

fn join(container: OwnedFd) -> Result<Root> {
    let namespaces = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::CONTROL_GROUP;
    rustix::thread::move_into_thread_name_spaces(container.as_fd(), namespaces)
        .at_kind(ErrorKind::Conflict, "join the container")?;
    Ok(Root { dir: RootDir::current().at("open the container's root")?, devpts: None })
}

fn read_order(order: OwnedFd) -> Result<Order> {
    let mut bytes = Vec::new();
    // The agent wrote at offset 0 without moving the file's position.
    std::fs::File::from(order).read_to_end(&mut bytes).at_kind(ErrorKind::Internal, "read the order")?;
    serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::new(ErrorKind::Internal, format!("the order is malformed: {error}")))
}

fn send_report(
    socket: &OwnedFd,
    report: &Report,
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(report)?;
    if bytes.len() > packet::MAX_LEN {
        let short = ApiError::new(ErrorKind::StartFailed, "the error's text is too long to report");
        bytes = serde_json::to_vec(&Report::Failed(short))?;
    }
    packet::send(socket, &bytes, fds)
}

/// When which part of the set-up was finished.
#[derive(Default)]
struct Timeline {
    moments: Vec<(String, u64)>,
}

impl Timeline {
    fn mark(&mut self, name: &str) {
        self.moments.push((name.to_owned(), crate::clock::monotonic_nanos()));
    }
}
