//! Starts the daemon when a command needs it.
//!
//! Whoever wants to start one takes a lock first and looks again once it has it, so that any number of commands at the same
//! time start one daemon. The new daemon inherits a pipe as its standard output and writes one line to it when it listens,
//! or says there why it cannot; its end of file without a line means that it died.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::{net::UnixStream, process::CommandExt},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Docker;
use crate::{daemon, paths::Home, progress};

/// The longest that a daemon may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A client of the daemon, which is started if it does not run.
pub(crate) async fn connect(home: &Home) -> Result<Docker> {
    if !is_listening(home)? {
        let home = home.clone();
        let started = tokio::task::spawn_blocking(move || start(&home));
        progress::while_waiting("starting the daemon", started).await??;
    }
    Ok(Docker::new(home.socket()))
}

/// A client of the daemon, if it runs.
pub(crate) fn connect_running(home: &Home) -> Result<Option<Docker>> {
    Ok(is_listening(home)?.then(|| Docker::new(home.socket())))
}

/// Whether somebody accepts connections on the socket.
fn is_listening(home: &Home) -> Result<bool> {
    match UnixStream::connect(home.socket()) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Ok(false)
        }
        Err(error) => {
            Err(error).with_context(|| format!("cannot reach the daemon at {}", home.socket().display()))
        }
    }
}

fn start(home: &Home) -> Result<()> {
    home.create()?;
    let _starting =
        daemon::lock::Lock::wait(&home.start_lock()).context("cannot lock the start of the daemon")?;
    if is_listening(home)? {
        return Ok(());
    }
    let (ready, inherited) = io::pipe().context("cannot make a pipe")?;
    let log = daemon::log::open(home).context("cannot open the daemon's log")?;
    // The file that runs now, even if another has taken its name.
    Command::new("/proc/self/exe")
        .arg0("coracle")
        .args(["daemon", "--detached", "--ready-fd", "1"])
        .stdin(Stdio::null())
        .stdout(inherited)
        .stderr(log)
        .current_dir("/")
        .spawn()
        .context("cannot start the daemon")?;
    await_ready(home, File::from(std::os::fd::OwnedFd::from(ready)))
}

fn await_ready(home: &Home, mut ready: File) -> Result<()> {
    let timeout = Timespec { tv_sec: START_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
    let line = {
        let mut fds = [PollFd::new(&ready, PollFlags::IN)];
        if poll(&mut fds, Some(&timeout)).context("cannot wait for the daemon")? == 0 {
            bail!(
                "the daemon did not start within {} seconds; its log is {}",
                START_TIMEOUT.as_secs(),
                home.daemon_log().display()
            );
        }
        let mut line = String::new();
        ready.read_to_string(&mut line).context("cannot read what the daemon says")?;
        line
    };
    match line.trim_end() {
        "ready" => Ok(()),
        "" => Err(anyhow!("the daemon died while it started; its log is {}", home.daemon_log().display())),
        reason => Err(anyhow!("{reason}")).context("the daemon did not start"),
    }
}
