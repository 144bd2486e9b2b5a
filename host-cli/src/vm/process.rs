//! The processes that serve a virtual machine, its VMM and its file server: this same program under other names, in sessions of their own,
//! each with its control socket and nothing else of the daemon's.

use std::{
    ffi::CStr,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    process::{ExitStatus, Stdio},
};

use anyhow::{Context, Result};
use tokio::{process::Command, sync::watch};

use crate::files;

/// The name by which the program knows that it is the VMM.
pub(crate) const VMM_NAME: &str = "coracle-vmm";

/// The name by which the program knows that it is the file server.
pub(crate) const FILE_SERVER_NAME: &str = "coracle-fsd";

/// A VMM or file server that this daemon started. It outlives the daemon, and this handle.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    /// Its process id.
    pub(crate) pid: u32,
    /// Becomes `Some` when it has ended.
    pub(crate) ended: watch::Receiver<Option<ExitStatus>>,
    kill: tokio::sync::mpsc::Sender<()>,
}

/// Starts a VMM whose clients come through `control`.
pub(crate) fn spawn(control: OwnedFd, log: File) -> Result<VmmProcess> {
    spawn_as(VMM_NAME, control, log)
}

/// Starts a VMM or file server, by its name, whose clients come through `control`.
pub(crate) fn spawn_as(name: &'static str, control: OwnedFd, log: File) -> Result<VmmProcess> {
    let mut child = Command::new("/proc/self/exe")
        .arg0(name)
        .stdin(Stdio::from(control))
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/")
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let pid = child.id().with_context(|| format!("{name} ended at once"))?;
    let (report, ended) = watch::channel(None);
    let (kill, mut kill_asked) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                Some(()) = kill_asked.recv() => {
                    let _ = child.start_kill();
                }
            }
        };
        tracing::info!(pid, ?status, "{name} has ended");
        report.send_replace(Some(status.unwrap_or_default()));
    });
    Ok(VmmProcess { pid, ended, kill })
}

impl VmmProcess {
    /// Ends it by force.
    pub(crate) fn kill(&self) {
        let _ = self.kill.try_send(());
    }

    /// Waits until it has ended.
    pub(crate) async fn wait(&self) -> Option<ExitStatus> {
        self.ended.clone().wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }
}

/// The VMM's role in this program: takes the control socket from standard input, leaves the daemon's session, and serves.
pub(crate) fn run() -> Result<()> {
    crate::daemon::log::start(true);
    let control = begin(c"coracle-vmm")?;
    let reason = coracle_vmm::run(control).context("the virtual machine monitor failed")?;
    tracing::info!(%reason, "the machine has ended");
    Ok(())
}

/// The file server's role in this program.
pub(crate) fn run_file_server() -> Result<()> {
    crate::daemon::log::start_for_file_server();
    let control = begin(c"coracle-fsd")?;
    coracle_file_server::run(control).context("the file server failed")
}

/// Takes the control socket from standard input and leaves the daemon's session.
fn begin(name: &CStr) -> Result<OwnedFd> {
    // For people who look at the list of processes; nothing depends on it.
    let _ = rustix::thread::set_name(name);
    // It fails only where the process leads a session already.
    let _ = rustix::process::setsid();
    let stdin = std::io::stdin();
    let control =
        stdin.as_fd().try_clone_to_owned().context("there is no control socket on standard input")?;
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("cannot let go of standard input")?;
    // These processes close every descriptor that they do not know: none may be left that something here owns.
    drop(null);
    Ok(control)
}

/// The last words of a VMM, for an error message.
pub(crate) fn last_words(log: &std::path::Path) -> String {
    let text = files::tail(log, 4096);
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains(" INFO ")).collect();
    lines[lines.len().saturating_sub(5)..].join("; ")
}
