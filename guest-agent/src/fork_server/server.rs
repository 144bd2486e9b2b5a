//! The fork server's own process: receives an order, clones, answers with the pidfd, forgets.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};

use super::{JOIN, NO_IPC, NO_NAMESPACES, NO_PID, NO_UTS};
use crate::child::{self, ChildFds};
use crate::sys::Cloned;
use crate::{packet, sys};

/// A container's network namespace is made by the agent.
const NEW_NAMESPACES: u64 =
    (libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC) as u64;

/// Serves until the agent closes its end.
pub(super) fn run(socket: OwnedFd) -> ! {
    // Its own session, so that no terminal's signals reach it; not dumpable, so that no process in a container can look
    // into a process that is being set up there.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"coracle-fork");
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    // Needs CAP_SYS_RESOURCE, which an agent that is not PID 1 may lack.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-999");
    sys::reset_signals();
    let code = match serve(&socket) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("coracle-agent: the fork server failed: {error}");
            1
        }
    };
    sys::exit_now(code)
}

fn serve(socket: &OwnedFd) -> io::Result<()> {
    let own_pid_namespace = std::fs::File::open("/proc/self/ns/pid")?;
    loop {
        let (bytes, fds) = packet::receive(socket)?;
        let Ok(flags) = <[u8; 2]>::try_from(bytes.as_slice()) else { return Ok(()) };
        let flags = u16::from_le_bytes(flags);
        let Some(fds) = ChildFds::from_packet(fds, |flag| flags & flag != 0) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match clone(&fds, flags, &own_pid_namespace) {
            Ok(None) => child::run(fds),
            Ok(Some(Cloned { pid, pidfd })) => packet::send(socket, &pid.to_le_bytes(), &[pidfd.as_fd()])?,
            Err(error) => {
                let number = error.raw_os_error().unwrap_or(libc::EINVAL);
                packet::send(socket, &number.to_le_bytes(), &[])?;
            }
        }
    }
}

fn clone(fds: &ChildFds, flags: u16, own_pid_namespace: &std::fs::File) -> io::Result<Option<Cloned>> {
    let join = flags & JOIN != 0;
    let not_made = [(NO_PID, libc::CLONE_NEWPID), (NO_IPC, libc::CLONE_NEWIPC), (NO_UTS, libc::CLONE_NEWUTS)];
    let mut namespaces = if join || flags & NO_NAMESPACES != 0 { 0 } else { NEW_NAMESPACES };
    for (flag, namespace) in not_made {
        if flags & flag != 0 {
            namespaces &= !(namespace as u64);
        }
    }
    let donor = if join { Some(&fds.place) } else { fds.pid_donor.as_ref() };
    let Some(donor) = donor else { return sys::clone_into(fds.cgroup.as_fd(), namespaces) };
    // Only children change their pid namespace: the process must be born in it.
    rustix::thread::move_into_thread_name_spaces(donor.as_fd(), ThreadNameSpaceType::PROCESS_ID)?;
    let cloned = sys::clone_into(fds.cgroup.as_fd(), namespaces);
    if !matches!(cloned, Ok(None)) {
        rustix::thread::move_into_link_name_space(
            own_pid_namespace.as_fd(),
            Some(LinkNameSpaceType::ProcessID),
        )?;
    }
    cloned
}
