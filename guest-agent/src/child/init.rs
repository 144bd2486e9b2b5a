//! `docker run --init`: a small init as the container's PID 1. It forwards signals to the one process it started, reaps
//! whatever is given to it, and ends as that process ended.

use std::ffi::c_int;

use rustix::process::{WaitOptions, WaitStatus};

use super::capabilities;
use crate::error::{AtStep, Result};
use crate::fork_server::Task;
use crate::sys::{self, Forked};

/// Forks; `None` in the process that shall run the program, the id of that process in the one that is to be init.
pub(super) fn fork_main() -> Result<Option<u32>> {
    // Before the fork, so that no signal is missed; the other process unblocks them again.
    sys::block_all_signals();
    match sys::fork_single_threaded().at("fork")? {
        Forked::Child => {
            sys::reset_signals();
            Ok(None)
        }
        Forked::Parent { pid } => Ok(Some(pid)),
    }
}

/// Is init.
pub(super) fn run(main: u32, task: &Task) -> ! {
    // The agent's descriptors are none of the container's business, nor are its capabilities.
    sys::close_everything();
    let _ = rustix::thread::set_name(c"coracle-init");
    // Where it is not the first process of a pid namespace, orphans are given to it all the same.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    if limit(task).is_err() {
        // The other process fails in the same way, and says so.
        sys::exit_now(255);
    }
    if task.die_with_agent {
        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    }
    loop {
        match sys::next_signal() {
            Some(libc::SIGCHLD) => {
                if let Some(code) = reap(main) {
                    sys::exit_now(code);
                }
            }
            Some(signal) => sys::kill(main, signal),
            None => {}
        }
    }
}

fn limit(task: &Task) -> Result<()> {
    let wanted = capabilities::wanted(&task.process.capabilities, task.all_capabilities)?;
    capabilities::bound(wanted)?;
    if let Some(filter) = &task.seccomp {
        sys::filter_system_calls(filter).at("install the seccomp filter")?;
    }
    capabilities::hold(wanted, wanted)
}

/// Reaps all that ended; the exit code of `main`, if it was among them.
fn reap(main: u32) -> Option<u8> {
    let mut code = None;
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        if pid.as_raw_nonzero().get() as u32 == main {
            code = Some(exit_code(status));
        }
    }
    code
}

fn exit_code(status: WaitStatus) -> u8 {
    let signal: Option<c_int> = status.terminating_signal();
    match (status.exit_status(), signal) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128u8.saturating_add(signal as u8),
        (None, None) => 255,
    }
}
