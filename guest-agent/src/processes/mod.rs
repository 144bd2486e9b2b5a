//! The processes that the agent knows: from the moment an id is reserved for a start until the daemon forgets it.

pub(crate) mod spool;
mod stdin;
mod streams;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_agent_api::{ExitStatus, ProcessId, ProcessState, TerminalSize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::error::{AtStep, Result, conflict, invalid, not_found};
use crate::sys;
use coracle_agent_api::ErrorKind;
use spool::Spool;
pub(crate) use stdin::Stdin;
pub(crate) use streams::{read_pipe, read_terminal};

/// A process: the first one of a container, or one that joined it.
pub(crate) struct Process {
    /// Its id.
    pub id: ProcessId,
    /// The container it is in.
    pub container: ProcessId,
    /// Its number outside the container.
    pub pid: u32,
    /// When its program was executed.
    pub started_unix_nanos: u64,
    /// Its output.
    pub spool: Spool,
    /// Its standard input, if it is kept open.
    pub stdin: Option<Stdin>,
    /// The outer end of its terminal.
    pub terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Its pidfd.
    pub pidfd: Arc<AsyncFd<OwnedFd>>,
    /// How it ended.
    pub exit: watch::Sender<Option<ExitStatus>>,
}

impl Process {
    /// What `GET /v1/state` says about it.
    pub(crate) fn state(&self) -> ProcessState {
        ProcessState {
            id: self.id.clone(),
            container: self.container.clone(),
            pid: self.pid,
            started_unix_nanos: self.started_unix_nanos,
            exit: self.exit.borrow().clone(),
            acknowledged: self.spool.acknowledged(),
            paused: false,
        }
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: u8) -> Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(invalid(format!("there is no signal {signal}")));
        }
        match sys::pidfd_send_signal(self.pidfd.get_ref().as_fd(), signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(conflict(format!("process {} has ended", self.id.short())))
            }
            result => result.at_kind(ErrorKind::Internal, format!("send signal {signal}")),
        }
    }

    /// Sets the terminal's size.
    pub(crate) fn resize(&self, size: TerminalSize) -> Result<()> {
        let Some(terminal) = &self.terminal else {
            return Err(conflict(format!("process {} has no terminal", self.id.short())));
        };
        let size =
            rustix::termios::Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal.get_ref(), size)
            .at_kind(ErrorKind::Internal, "resize the terminal")
    }
}

/// Waits for the end of a process and reaps it; its exit code as a shell would say it.
pub(crate) async fn wait(pidfd: &AsyncFd<OwnedFd>) -> std::io::Result<u8> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    pidfd
        .async_io(Interest::READABLE, |fd| {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let Some(status) = waitid(WaitId::PidFd(fd.as_fd()), options)? else {
                return Err(std::io::ErrorKind::WouldBlock.into());
            };
            Ok(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code as u8,
                (None, Some(signal)) => 128u8.saturating_add(signal as u8),
                (None, None) => 255,
            })
        })
        .await
}

/// All processes by id.
#[derive(Default)]
pub(crate) struct Registry {
    slots: Mutex<HashMap<ProcessId, Slot>>,
}

enum Slot {
    Starting,
    Known(Arc<Process>),
}

/// An id that is taken while its process is being started; given back when the start fails.
pub(crate) struct Reservation<'a> {
    registry: &'a Registry,
    id: Option<ProcessId>,
}

impl Registry {
    fn slots(&self) -> MutexGuard<'_, HashMap<ProcessId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an id that is not known.
    pub(crate) fn reserve(&self, id: &ProcessId) -> Result<Reservation<'_>> {
        let mut slots = self.slots();
        if slots.contains_key(id) {
            return Err(conflict(format!("process {} is already known", id.short())));
        }
        slots.insert(id.clone(), Slot::Starting);
        Ok(Reservation { registry: self, id: Some(id.clone()) })
    }

    /// A process that was started.
    pub(crate) fn get(&self, id: &ProcessId) -> Result<Arc<Process>> {
        match self.slots().get(id) {
            Some(Slot::Known(process)) => Ok(process.clone()),
            Some(Slot::Starting) => Err(conflict(format!("process {} is being started", id.short()))),
            None => Err(not_found(format!("there is no process {}", id.short()))),
        }
    }

    /// Forgets an ended process.
    pub(crate) fn forget(&self, id: &ProcessId) -> Result<()> {
        let process = self.get(id)?;
        if !process.has_ended() {
            return Err(conflict(format!("process {} is running", id.short())));
        }
        self.slots().remove(id);
        // Whoever still reads its output is told that nothing follows.
        process.spool.subscribe();
        Ok(())
    }

    /// Every process that was started.
    pub(crate) fn all(&self) -> Vec<Arc<Process>> {
        let slots = self.slots();
        slots
            .values()
            .filter_map(|slot| match slot {
                Slot::Known(process) => Some(process.clone()),
                Slot::Starting => None,
            })
            .collect()
    }

    /// Whether a process with this id is being started or runs.
    pub(crate) fn is_active(&self, id: &ProcessId) -> bool {
        match self.slots().get(id) {
            Some(Slot::Starting) => true,
            Some(Slot::Known(process)) => !process.has_ended(),
            None => false,
        }
    }
}

impl Reservation<'_> {
    /// The process runs.
    pub(crate) fn fill(mut self, process: Arc<Process>) {
        if let Some(id) = self.id.take() {
            self.registry.slots().insert(id, Slot::Known(process));
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.registry.slots().remove(&id);
        }
    }
}

/// Ties a descriptor to the event loop.
pub(crate) fn watch_fd(fd: OwnedFd, what: &str) -> Result<AsyncFd<OwnedFd>> {
    sys::watch(fd).at_kind(ErrorKind::Internal, format!("watch {what}"))
}
