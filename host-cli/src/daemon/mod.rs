//! The daemon: one for each home. It holds a lock for as long as it lives, binds the API socket for its owner alone, and
//! serves until it is told to end. A signal (and `kill -9`) ends the daemon only: the machines and their containers go on,
//! and the next daemon takes them over. `coracle down` ends everything.

pub(crate) mod lock;
pub(crate) mod log;

use std::{fs, io, os::unix::fs::PermissionsExt, sync::Arc};

use anyhow::{Context, Result, bail};
use coracle_engine::{Engine, EngineConfig, HostFiles, ServeEnd, sandbox::SandboxFactory};
use coracle_image_store::ImageStore;
use rustix::process::{Resource, Rlimit};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};

use crate::{
    args::DaemonArgs,
    failure::{Outcome, describe},
    paths::Home,
    registries,
};
use lock::Lock;

/// Runs the daemon to its end.
pub(crate) fn run(home: &Home, args: &DaemonArgs) -> Outcome {
    let ready = Ready::new(args);
    // For people who look at the list of processes; nothing depends on it.
    let _ = rustix::thread::set_name(c"coracle-daemon");
    if args.detached {
        // It fails only where the process leads a session already.
        let _ = rustix::process::setsid();
    }
    log::start(args.detached);
    let served = serve(home, args, ready);
    if let Err((error, ready)) = served {
        if let Some(ready) = ready {
            ready.say(&describe(&error));
        }
        if !args.detached {
            return Err(error.into());
        }
        tracing::error!(error = %describe(&error), "the daemon failed");
        return Ok(1);
    }
    Ok(0)
}

type Failed = (anyhow::Error, Option<Ready>);

fn serve(home: &Home, args: &DaemonArgs, ready: Ready) -> Result<(), Failed> {
    let opened = open(home, args).and_then(|opened| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        Ok((opened, runtime.context("cannot start the event loop")?))
    });
    let ((_lock, starting), runtime) = match opened {
        Ok(opened) => opened,
        Err(error) => return Err((error, Some(ready))),
    };
    let ended = runtime.block_on(async {
        let (engine, listener) = match prepare(home).await {
            Ok(prepared) => prepared,
            Err(error) => return Err((error, Some(ready))),
        };
        tracing::info!(socket = %home.socket().display(), pid = std::process::id(), "the daemon listens");
        ready.say("ready");
        drop(starting);
        let shutdown = shutdown_signal().map_err(|error| (error, None))?;
        Ok(engine.serve(listener, shutdown).await)
    })?;
    // Nothing connects to a daemon that is going: whoever looks now starts a new one, which waits for the lock.
    let _ = fs::remove_file(home.socket());
    match ended {
        ServeEnd::Down => tracing::info!("everything is stopped; the daemon ends"),
        ServeEnd::Shutdown => tracing::info!("the daemon ends; machines and containers go on"),
    }
    runtime.shutdown_background();
    Ok(())
}

/// Takes the home's lock, and for the time of the start also the one that keeps others from starting a daemon, unless the
/// command that started this one has it.
fn open(home: &Home, args: &DaemonArgs) -> Result<(Lock, Option<Lock>)> {
    home.create()?;
    raise_file_limit();
    let path = home.daemon_lock();
    if args.detached {
        let lock = Lock::wait(&path).context("cannot lock the state directory")?;
        lock.write_pid();
        return Ok((lock, None));
    }
    let starting = Lock::wait(&home.start_lock()).context("cannot lock the start of the daemon")?;
    let Some(lock) = Lock::try_take(&path).context("cannot lock the state directory")? else {
        let who = lock::holder(&path).map_or_else(String::new, |pid| format!(" (process {pid})"));
        bail!("another daemon{who} already uses {}", home.root().display());
    };
    lock.write_pid();
    Ok((lock, Some(starting)))
}

async fn prepare(home: &Home) -> Result<(Engine, UnixListener)> {
    let store = home.images();
    let images = tokio::task::spawn_blocking(move || ImageStore::open(&store))
        .await?
        .context("cannot open the image store")?;
    let config = EngineConfig {
        home: home.root().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        git_commit: option_env!("CORACLE_GIT_COMMIT").unwrap_or_default().to_owned(),
        registries: registries::source(home),
        host_files: HostFiles::default(),
    };
    let engine =
        Engine::new(config, Arc::new(images), sandboxes(home)?).await.context("cannot start the engine")?;
    Ok((engine, bind(home)?))
}

/// The socket, for its owner only. The lock is held: one that is there already is a dead daemon's.
fn bind(home: &Home) -> Result<UnixListener> {
    let path = home.socket();
    let cannot = || format!("cannot listen on {}", path.display());
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(cannot),
        _ => {}
    }
    // The directory is closed to others, so nobody connects before the mode is set.
    let listener = UnixListener::bind(path).with_context(cannot)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(cannot)?;
    Ok(listener)
}

#[cfg(not(feature = "test-seam"))]
fn sandboxes(home: &Home) -> Result<Arc<dyn SandboxFactory>> {
    Ok(Arc::new(crate::vm::Vms::new(home.clone())))
}

/// A test seam: with `CORACLE_TEST_AGENT=/path/to/coracle-guest-agent` containers run through that agent as an ordinary
/// process of this machine, so that the daemon can be tested without KVM.
#[cfg(feature = "test-seam")]
fn sandboxes(home: &Home) -> Result<Arc<dyn SandboxFactory>> {
    match std::env::var_os("CORACLE_TEST_AGENT") {
        Some(agent) => {
            tracing::warn!(?agent, "containers run through a test agent, without a machine of their own");
            Ok(crate::test_seam::sandboxes(agent.into(), home))
        }
        None => Ok(Arc::new(crate::vm::Vms::new(home.clone()))),
    }
}

fn shutdown_signal() -> Result<impl Future<Output = ()> + Send> {
    let cannot = "cannot listen for signals";
    let mut terminate = signal(SignalKind::terminate()).context(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).context(cannot)?;
    // A terminal that closes is no reason to end.
    let mut hangup = signal(SignalKind::hangup()).context(cannot)?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => return,
                _ = interrupt.recv() => return,
                _ = hangup.recv() => {}
            }
        }
    })
}

/// Every stream of every container is a file descriptor: take as many as may be had.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Tells whoever started the daemon that it listens, or why it does not.
#[derive(Debug)]
struct Ready {
    wanted: bool,
}

impl Ready {
    fn new(args: &DaemonArgs) -> Self {
        Self { wanted: args.ready_fd.is_some() }
    }

    /// Writes a line to standard output, and lets go of it: the other end reads to its end of file.
    fn say(self, line: &str) {
        use std::io::Write;
        if !self.wanted {
            return;
        }
        let line = line.replace('\n', " ");
        let mut out = io::stdout().lock();
        // A reader that is gone wants to know no more.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        if let Ok(null) = fs::File::options().write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(&null);
        }
    }
}
