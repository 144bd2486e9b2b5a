//! Containers: what they were asked to be, where they are in their lives, and who may change that.
//!
//! Each container is an object with a task and an inbox of its own: changes to one container happen one after the other, those
//! to different containers at the same time. Anyone may read its newest record at any time.

pub(crate) mod actor;
pub(crate) mod capability;
pub(crate) mod config;
pub(crate) mod files;
pub(crate) mod health;
pub(crate) mod isolation;
pub(crate) mod log_options;
pub(crate) mod mounts;
pub(crate) mod names;
pub(crate) mod options;
pub(crate) mod record;
pub(crate) mod refused;
pub(crate) mod registry;
pub(crate) mod resources;
pub(crate) mod restart;
pub(crate) mod seccomp;
pub(crate) mod signal;
pub(crate) mod spec;
pub(crate) mod state;

use std::{
    path::Path,
    sync::{Arc, Mutex, RwLock},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    error::{Error, Kind, Result},
    io::{Fanout, StdinPort},
    logs::{Log, LogError},
    networks::endpoint::Wanted,
    timings::Trace,
};
use actor::Message;
use config::HostConfig;
use health::{Health, HealthStatus};
use log_options::LogKind;
use record::{ContainerId, Record};
use state::Status;

/// How long a container may take to die of SIGKILL.
const KILL_TIME: Duration = Duration::from_secs(10);
const INBOX: usize = 64;

/// How a container is asked to end.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stop {
    /// Instead of the container's own.
    pub(crate) signal: Option<u8>,
    /// Instead of the container's own; seconds, negative is for ever.
    pub(crate) timeout: Option<i64>,
    /// A client wants it, and not the end of the daemon.
    pub(crate) by_user: bool,
}

/// What waiters wait for.
#[derive(Debug, Clone)]
pub(crate) struct Lifecycle {
    pub(crate) status: Status,
    pub(crate) exits: u64,
    pub(crate) exit_code: i32,
    pub(crate) error: String,
    pub(crate) removed: bool,
}

impl Lifecycle {
    fn of(record: &Record, removed: bool) -> Self {
        let state = &record.state;
        Self {
            status: state.status,
            exits: state.exits,
            exit_code: state.exit_code,
            error: state.error.clone(),
            removed,
        }
    }
}

/// Everyone's handle to a container.
pub(crate) struct Container {
    id: ContainerId,
    inbox: mpsc::Sender<Message>,
    record: RwLock<Arc<Record>>,
    lifecycle: watch::Sender<Lifecycle>,
    pub(crate) fanout: Arc<Fanout>,
    pub(crate) stdin: StdinPort,
    log: Option<Arc<Log>>,
    /// In memory only: a daemon that was restarted has yet to find out.
    health: Mutex<Option<Health>>,
    trace: Mutex<Option<Arc<Trace>>>,
    /// Whether its processes may speak to the engine: its run has the engine's socket.
    has_engine: watch::Sender<bool>,
}

impl Container {
    /// A container, and the receiving end for its task.
    fn new(record: Record, folder: &Path) -> Result<(Arc<Self>, mpsc::Receiver<Message>), LogError> {
        let options = &record.host_config.log_config;
        let log = match log_options::check(options) {
            Ok(LogKind::JsonFile(limits)) => {
                let path = folder.join(format!("{}-json.log", record.id));
                let attributes = log_options::attributes(options, &record.config);
                Some(Arc::new(Log::with_attributes(&path, limits, attributes)?))
            }
            Ok(LogKind::Local(limits)) => Some(Arc::new(Log::open(&folder.join("container.log"), limits)?)),
            _ => None,
        };
        let (inbox, messages) = mpsc::channel(INBOX);
        let (lifecycle, _) = watch::channel(Lifecycle::of(&record, false));
        let container = Self {
            id: record.id.clone(),
            inbox,
            record: RwLock::new(Arc::new(record)),
            lifecycle,
            fanout: Arc::default(),
            stdin: StdinPort::new(),
            log,
            health: Mutex::default(),
            trace: Mutex::default(),
            has_engine: watch::Sender::new(false),
        };
        Ok((Arc::new(container), messages))
    }

    pub(crate) fn id(&self) -> &ContainerId {
        &self.id
    }

    /// The newest record.
    pub(crate) fn record(&self) -> Arc<Record> {
        Arc::clone(&self.record.read().expect("no holder panics"))
    }

    /// Its life, from now on.
    pub(crate) fn lifecycle(&self) -> watch::Receiver<Lifecycle> {
        self.lifecycle.subscribe()
    }

    /// Docker's idea of a running container.
    pub(crate) fn is_active(&self) -> bool {
        self.lifecycle.borrow().status.is_active()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.lifecycle.borrow().status.is_running()
    }

    /// Whether its processes may speak to the engine, from now on.
    pub(crate) fn has_engine(&self) -> watch::Receiver<bool> {
        self.has_engine.subscribe()
    }

    /// Its log, if it has one that can be read.
    pub(crate) fn log(&self) -> Option<&Arc<Log>> {
        self.log.as_ref()
    }

    /// What its probes say, if it has a health check and was started.
    pub(crate) fn health(&self) -> Option<Health> {
        self.health.lock().expect("no holder panics").clone()
    }

    /// As [`Container::health`], in a word.
    pub(crate) fn health_status(&self) -> HealthStatus {
        let health = self.health.lock().expect("no holder panics");
        health.as_ref().map_or(HealthStatus::Starting, |health| health.status)
    }

    /// Its probes begin anew.
    pub(crate) fn reset_health(&self) {
        let mut health = self.health.lock().expect("no holder panics");
        *health = Some(Health::starting(health.take()));
    }

    /// Changes what is known of its health, if anything is.
    pub(crate) fn update_health<T>(&self, change: impl FnOnce(&mut Health) -> T) -> Option<T> {
        self.health.lock().expect("no holder panics").as_mut().map(change)
    }

    pub(crate) fn trace(&self) -> Option<Arc<Trace>> {
        self.trace.lock().expect("no holder panics").clone()
    }

    pub(crate) fn set_trace(&self, trace: Arc<Trace>) {
        *self.trace.lock().expect("no holder panics") = Some(trace);
    }

    /// Starts it.
    pub(crate) async fn start(&self, asked: Instant) -> Result<()> {
        self.ask(|answer| Message::Start { asked, answer }).await
    }

    /// Sends a signal for a client. One that is meant to end it also ends its restarts, which Docker makes every signal do.
    pub(crate) async fn kill_with(&self, signal: u8) -> Result<()> {
        let restarting = self.lifecycle.borrow().status == Status::Restarting;
        if signal == signal::SIGKILL || signal == self.record().stop_signal() {
            self.ask(|answer| Message::StopAsked { by_user: true, answer }).await?;
        }
        if restarting && !self.is_running() { Ok(()) } else { self.signal(signal).await }
    }

    /// Sends its first process a signal.
    async fn signal(&self, signal: u8) -> Result<()> {
        self.ask(|answer| Message::Signal { signal, answer }).await
    }

    /// Lets all its processes stand still.
    pub(crate) async fn pause(&self) -> Result<()> {
        self.ask(|answer| Message::Pause { answer }).await
    }

    /// Lets them run on.
    pub(crate) async fn unpause(&self) -> Result<()> {
        self.ask(|answer| Message::Unpause { answer }).await
    }

    pub(crate) async fn rename(&self, name: String) -> Result<()> {
        self.ask(|answer| Message::Rename { name, answer }).await
    }

    /// Asks it to end; after the timeout (seconds; negative is for ever), kills it. Returns when it has ended.
    pub(crate) async fn stop(&self, stop: Stop) -> Result<()> {
        let record = self.record();
        let (active, exits) = {
            let lifecycle = self.lifecycle.borrow();
            (lifecycle.status.is_active(), lifecycle.exits)
        };
        if !active {
            return Err(Error::not_modified());
        }
        self.ask(|answer| Message::StopAsked { by_user: stop.by_user, answer }).await?;
        if !self.is_running() {
            return Ok(());
        }
        let timeout = stop.timeout.unwrap_or_else(|| record.stop_timeout());
        self.signal_if_running(stop.signal.unwrap_or_else(|| record.stop_signal())).await?;
        let ended = self.exited_since(exits);
        match u64::try_from(timeout) {
            Err(_) => ended.await,
            Ok(seconds) => {
                // A hundred years are as good as for ever, and no clock overflows.
                let limit = Duration::from_secs(seconds.min(3_153_600_000));
                if tokio::time::timeout(limit, ended).await.is_err() {
                    self.kill_and_wait(exits).await?;
                }
            }
        }
        Ok(())
    }

    /// Stops it if it runs, and starts it.
    pub(crate) async fn restart(&self, stop: Stop) -> Result<()> {
        match self.stop(stop).await {
            Err(error) if error.kind() != Kind::NotModified => return Err(error),
            _ => {}
        }
        self.start(Instant::now()).await?;
        self.tell(Message::Tell { action: "restart" }).await;
        Ok(())
    }

    /// Kills it if it runs, and waits for its end.
    pub(crate) async fn kill(&self) -> Result<()> {
        let (active, exits) = {
            let lifecycle = self.lifecycle.borrow();
            (lifecycle.status.is_active(), lifecycle.exits)
        };
        if !active {
            return Ok(());
        }
        self.ask(|answer| Message::StopAsked { by_user: true, answer }).await?;
        if self.is_running() { self.kill_and_wait(exits).await } else { Ok(()) }
    }

    /// Changes its limits, and when it is started again; a policy without a name changes nothing.
    pub(crate) async fn update(&self, update: HostConfig) -> Result<()> {
        self.ask(|answer| Message::Update { update: Box::new(update), answer }).await
    }

    /// Puts it on a further network.
    pub(crate) async fn connect(&self, network: String, wanted: Wanted) -> Result<()> {
        self.ask(|answer| Message::Connect { network, wanted: Box::new(wanted), answer }).await
    }

    /// Takes it off a network.
    pub(crate) async fn disconnect(&self, network: String) -> Result<()> {
        self.ask(|answer| Message::Disconnect { network, answer }).await
    }

    /// Removes it; with `force`, kills it first; with `volumes`, those go with it that no one has named and no other container has.
    pub(crate) async fn remove(&self, force: bool, volumes: bool) -> Result<()> {
        if force {
            self.kill().await?;
        }
        match self.ask(|answer| Message::Remove { volumes, answer }).await {
            // It removed itself in the same moment (`--rm`).
            Err(_) if self.lifecycle.borrow().removed => Ok(()),
            other => other,
        }
    }

    /// Tells its task something that needs no answer.
    pub(crate) async fn tell(&self, message: Message) {
        // A task that has ended needs nothing.
        let _ = self.inbox.send(message).await;
    }

    async fn kill_and_wait(&self, exits: u64) -> Result<()> {
        self.signal_if_running(signal::SIGKILL).await?;
        let ended = tokio::time::timeout(KILL_TIME, self.exited_since(exits)).await;
        ended.map_err(|_| {
            Error::internal(format!(
                "cannot kill container {}: it did not end within {} s of SIGKILL",
                self.id,
                KILL_TIME.as_secs()
            ))
        })
    }

    /// A container that ends in the same moment needs no signal.
    async fn signal_if_running(&self, signal: u8) -> Result<()> {
        match self.signal(signal).await {
            Err(error) if matches!(error.kind(), Kind::Conflict | Kind::NotFound) => Ok(()),
            other => other,
        }
    }

    async fn exited_since(&self, exits: u64) {
        let mut lifecycle = self.lifecycle();
        // The sender lives as long as the container.
        let _ = lifecycle.wait_for(|now| now.exits > exits || now.removed).await;
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<Result<T>>) -> Message) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let gone = || registry::no_such_container(self.id.as_str());
        self.inbox.send(message(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    fn publish(&self, record: Arc<Record>, removed: bool) {
        let lifecycle = Lifecycle::of(&record, removed);
        *self.record.write().expect("no holder panics") = record;
        self.lifecycle.send_replace(lifecycle);
    }
}
