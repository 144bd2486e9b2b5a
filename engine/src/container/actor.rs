//! A container's task: it alone changes the container's record, one message at a time.
//!
//! A change is durable before anyone hears of it. What the agent says of a start or an exit is untrusted, and can at worst make
//! this container's own record untrue.

mod connect;
mod end;
mod probing;
pub(crate) mod trees;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use coracle_agent_api::{ErrorKind, IpcMode, Layer, PidMode, ProcessState, TreeName};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    Container,
    config::HostConfig,
    isolation,
    record::{ContainerId, Record},
    resources,
    restart::{Backoff, Policy},
    spec,
    state::{Change, Status, Told},
};
use crate::{
    agent::AgentError,
    core::Core,
    error::{Error, Kind, Result, chain},
    io::{self, Outcome, Pump},
    logs::LogError,
    networks::{endpoint::Wanted, files},
    sandboxes::{Host, LayerFile},
    time::UnixNanos,
};

/// How long output may follow the exit of a container's first process: its other processes die with it.
const LINGER: Duration = Duration::from_secs(10);

/// What a container can be asked.
pub(crate) enum Message {
    Start {
        asked: Instant,
        answer: oneshot::Sender<Result<()>>,
    },
    /// It is to end and not to be restarted; how it is made to end is the asker's matter.
    StopAsked {
        by_user: bool,
        answer: oneshot::Sender<Result<()>>,
    },
    /// A client's wish to change it was carried out by several messages: tell of it.
    Tell {
        action: &'static str,
    },
    /// Its limits change, or when it is started again.
    Update {
        update: Box<HostConfig>,
        answer: oneshot::Sender<Result<()>>,
    },
    /// It comes to be on a further network.
    Connect {
        network: String,
        wanted: Box<Wanted>,
        answer: oneshot::Sender<Result<()>>,
    },
    /// It leaves a network.
    Disconnect {
        network: String,
        answer: oneshot::Sender<Result<()>>,
    },
    /// Everything that ran is taken over.
    DaemonStarted,
    Signal {
        signal: u8,
        answer: oneshot::Sender<Result<()>>,
    },
    Pause {
        answer: oneshot::Sender<Result<()>>,
    },
    Unpause {
        answer: oneshot::Sender<Result<()>>,
    },
    Rename {
        name: String,
        answer: oneshot::Sender<Result<()>>,
    },
    Remove {
        /// With its volumes that have no name.
        volumes: bool,
        answer: oneshot::Sender<Result<()>>,
    },
    /// Its process is known to a sandbox that was taken over.
    Resume {
        process: Box<ProcessState>,
        done: oneshot::Sender<()>,
    },
    /// It was running, but no sandbox knows it.
    Lost {
        reason: String,
        done: oneshot::Sender<()>,
    },
    /// Its process has ended and everything it wrote is delivered.
    Ended {
        run: u64,
        outcome: Outcome,
    },
}

struct Actor {
    core: Arc<Core>,
    container: Arc<Container>,
    record: Record,
    /// Which run the pump is of; an older pump's word does not count.
    run: u64,
    /// Ends what belongs to a run and not to its output.
    run_over: CancellationToken,
    /// Ends the probes of its health, while there are any.
    probing: Option<CancellationToken>,
    probed_run: u64,
    /// The trees of the host that its sandbox was granted for it.
    trees: Vec<TreeName>,
    backoff: Backoff,
    /// When it is to be started again, while it waits for that.
    restart_due: Option<tokio::time::Instant>,
    removed: bool,
}

/// Makes a container and its task.
pub(crate) fn spawn(core: &Arc<Core>, record: Record) -> Result<Arc<Container>, LogError> {
    let (container, inbox) = Container::new(record.clone(), &core.container_folder(&record.id))?;
    let actor = Actor {
        core: Arc::clone(core),
        container: Arc::clone(&container),
        record,
        run: 0,
        run_over: CancellationToken::new(),
        probing: None,
        probed_run: 0,
        trees: Vec::new(),
        backoff: Backoff::default(),
        restart_due: None,
        removed: false,
    };
    let span = tracing::info_span!("container", id = container.id().short());
    core.tasks.spawn(actor.run(inbox).instrument(span));
    Ok(container)
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        let closing = self.core.closing.clone();
        while !self.removed {
            let message = tokio::select! {
                () = closing.cancelled() => return,
                () = until(self.restart_due) => {
                    self.restart().await;
                    continue;
                }
                message = inbox.recv() => message,
            };
            // The container itself holds a sender, so there is always another message.
            let Some(message) = message else { return };
            self.handle(message).await;
        }
    }

    async fn handle(&mut self, message: Message) {
        // An asker that is gone needs no answer.
        match message {
            Message::Start { asked, answer } => drop(answer.send(self.start(asked).await)),
            Message::StopAsked { by_user, answer } => drop(answer.send(self.stop_asked(by_user).await)),
            Message::Tell { action } => self.tell(action, BTreeMap::new()),
            Message::Update { update, answer } => drop(answer.send(self.update(*update).await)),
            Message::Connect { network, wanted, answer } => {
                drop(answer.send(self.connect(&network, *wanted).await));
            }
            Message::Disconnect { network, answer } => {
                drop(answer.send(self.disconnect(&network).await));
            }
            Message::DaemonStarted => self.daemon_started().await,
            Message::Signal { signal, answer } => drop(answer.send(self.signal(signal).await)),
            Message::Pause { answer } => drop(answer.send(self.pause().await)),
            Message::Unpause { answer } => drop(answer.send(self.unpause().await)),
            Message::Rename { name, answer } => drop(answer.send(self.rename(&name).await)),
            Message::Remove { volumes, answer } => drop(answer.send(self.remove(volumes).await)),
            Message::Resume { process, done } => {
                self.resume(*process).await;
                let _ = done.send(());
            }
            Message::Lost { reason, done } => {
                self.ended(Outcome::Lost(reason)).await;
                let _ = done.send(());
            }
            Message::Ended { run, outcome } if run == self.run => self.ended(outcome).await,
            Message::Ended { .. } => {}
        }
    }

    fn host(&self) -> Arc<Host> {
        self.core.sandboxes.get(&self.record.sandbox)
    }

    async fn start(&mut self, asked: Instant) -> Result<()> {
        let status = self.record.state.status;
        if status == Status::Paused {
            return Err(Error::conflict("cannot start a paused container, try unpause instead"));
        }
        if status.is_active() {
            return Err(Error::not_modified());
        }
        if !status.can_start() {
            return Err(Error::conflict("container is marked for removal and cannot be started"));
        }
        self.backoff.reset();
        self.note(Change::StartAsked)?;
        self.begin_trace(asked);
        let result = self.start_in_sandbox().await;
        if let Err(failure) = result {
            let host = self.host();
            self.let_go(&host).await;
            return Err(self.start_failed(failure).await);
        }
        Ok(())
    }

    fn begin_trace(&self, asked: Instant) {
        let fresh = self.container.trace().filter(|trace| !trace.has("start-requested"));
        let trace = fresh
            .unwrap_or_else(|| self.core.timings.begin(self.record.id.as_str(), &self.record.name, asked));
        trace.mark("start-requested");
        self.container.set_trace(trace);
    }

    fn mark(&self, name: &'static str) {
        if let Some(trace) = self.container.trace() {
            trace.mark(name);
        }
    }

    async fn start_in_sandbox(&mut self) -> Result<(), StartFailure> {
        let host = self.host();
        self.core.start_sandbox(&host).await?;
        self.mark("sandbox-ready");
        let layers = self.attach_layers(&host).await?;
        self.mark("layers-attached");
        let volumes = self.core.volume_mounts(&self.record)?;
        let binds = self.grant_trees(&host).await?;
        let network = self.join_networks().await?;
        self.mark("networks-joined");
        let search = files::host_search(&self.core.config.host_files.read_resolv_conf().await);
        let links = self.core.links(&self.record)?;
        let donors = spec::Donors { network, links, search, ..self.donors()? };
        let spec = spec::build(&self.record, layers, donors, spec::Mounts { volumes, binds })?;
        let id = self.record.id.clone();
        let started = match host.agent().start(&id, &spec).await {
            // Left from a start that an earlier daemon did not live to hear of.
            Err(error) if error.refusal() == Some(ErrorKind::Conflict) => {
                host.agent().forget(&id).await?;
                host.agent().start(&id, &spec).await?
            }
            other => other?,
        };
        self.mark("agent-started");
        if let Some(trace) = self.container.trace() {
            trace.agent(started.phases);
        }
        let change =
            Change::Started { pid: started.pid.max(1), at: UnixNanos::from_u64(started.started_unix_nanos) };
        if let Some(log) = self.container.log() {
            log.begin(None).map_err(Error::from)?;
        }
        self.core.tell_of_volumes("mount", &self.record);
        self.core.tell_of_networks("connect", &self.record);
        // Its first output need not wait for the disk: a daemon that ends now finds the process and its log again.
        self.attend(&host, 0);
        if let Err(error) = self.apply(change, BTreeMap::new()).await {
            self.run += 1;
            self.run_over.cancel();
            let _ = host.agent().signal(&id, super::signal::SIGKILL).await;
            self.core.tell_of_networks("disconnect", &self.record);
            return Err(error.into());
        }
        Ok(())
    }

    /// The containers whose namespaces it joins, which must run.
    fn donors(&self) -> Result<spec::Donors> {
        let host = &self.record.host_config;
        let donor = |mode: &str, what: &str| -> Result<Option<Arc<Container>>> {
            let Some(name) = isolation::donor(mode) else { return Ok(None) };
            let donor = self.core.containers.find(name)?;
            let record = donor.record();
            match record.state.status {
                Status::Running | Status::Paused if record.sandbox == self.record.sandbox => Ok(Some(donor)),
                Status::Running | Status::Paused => Err(Error::conflict(format!(
                    "cannot join {what} of container {}: it is in another VM",
                    record.id
                ))),
                Status::Restarting => Err(Error::conflict(format!(
                    "Container {} is restarting, wait until the container is running",
                    record.id
                ))),
                _ => Err(Error::conflict(format!(
                    "cannot join {what} of a non running container: {}",
                    record.id
                ))),
            }
        };
        let (ipc, pid) = (donor(&host.ipc_mode, "IPC")?, donor(&host.pid_mode, "PID")?);
        if let Some(donor) = &ipc
            && matches!(donor.record().host_config.ipc_mode.as_str(), "" | "private" | "none")
        {
            return Err(Error::conflict(format!(
                "can't join IPC of container {}: non-shareable IPC (hint: use IpcMode:shareable for the donor container)",
                donor.id()
            )));
        }
        let id = |donor: &Arc<Container>| donor.id().clone();
        Ok(spec::Donors {
            ipc: isolation::ipc(host, |_| ipc.as_ref().map(id).map(IpcMode::Container))?,
            pid: isolation::pid(host, |_| pid.as_ref().map(id).map(PidMode::Container))?,
            ..spec::Donors::default()
        })
    }

    async fn attach_layers(&self, host: &Host) -> Result<Vec<Layer>> {
        let layers = self.image_layers().await?;
        host.attach(&self.record.id, &layers).await
    }

    async fn image_layers(&self) -> Result<Vec<LayerFile>> {
        self.core.image_layers(&self.record.image()).await
    }

    /// Takes care of a running process: its output to the log and to those attached, their input to it.
    fn attend(&mut self, host: &Arc<Host>, after: u64) {
        self.run += 1;
        self.run_over = CancellationToken::new();
        let id = self.record.id.clone();
        if self.record.config.open_stdin {
            let forward = io::forward(host.agent().clone(), id.clone(), self.container.stdin.begin());
            let over = self.run_over.clone();
            self.core.tasks.spawn(self.core.closing.clone().run_until_cancelled_owned(async move {
                if let Some(Err(error)) = over.run_until_cancelled(forward).await {
                    tracing::debug!(error = chain(&error), "the container takes no more input");
                }
            }));
        }
        let pump = Pump {
            agent: host.agent().clone(),
            sandbox: host.state(),
            process: id,
            fanout: Arc::clone(&self.container.fanout),
            log: self.container.log().cloned(),
            after,
            linger: LINGER,
            trace: self.container.trace(),
        };
        let (container, run) = (Arc::clone(&self.container), self.run);
        let attended = async move {
            let outcome = pump.run().await;
            container.tell(Message::Ended { run, outcome }).await;
        };
        self.core
            .tasks
            .spawn(self.core.closing.clone().run_until_cancelled_owned(attended.in_current_span()));
    }

    async fn start_failed(&mut self, failure: StartFailure) -> Error {
        let StartFailure { exit_code, error } = failure;
        tracing::info!(exit_code, %error, "a container did not start");
        self.core.unpublish_ports(&self.record.id).await;
        self.core.leave_networks(&self.record);
        let change = Change::StartFailed { exit_code, error: error.to_string() };
        if let Err(error) = self.apply(change, BTreeMap::new()).await {
            tracing::error!(%error, "cannot write down that a container did not start");
        }
        self.container.fanout.close();
        self.container.stdin.end();
        if self.record.host_config.auto_remove {
            self.remove_by_itself().await;
        }
        error
    }

    async fn signal(&mut self, signal: u8) -> Result<()> {
        if !self.record.state.status.is_running() {
            let id = &self.record.id;
            return Err(Error::conflict(format!(
                "cannot kill container: {id}: container {id} is not running"
            )));
        }
        self.host().agent().signal(&self.record.id, signal).await?;
        self.tell("kill", BTreeMap::from([("signal".to_owned(), signal.to_string())]));
        // As in Docker, what is meant to end a container lets a paused one run on, so that it can.
        let ends = match self.record.config.stop_signal.as_deref().filter(|text| !text.is_empty()) {
            Some(_) => signal == super::signal::SIGKILL || signal == self.record.stop_signal(),
            None => true,
        };
        if ends && self.record.state.status == Status::Paused {
            self.thaw().await?;
        }
        Ok(())
    }

    async fn pause(&mut self) -> Result<()> {
        let id = &self.record.id;
        match self.record.state.status {
            Status::Running => {}
            Status::Paused => return Err(Error::conflict(format!("Container {id} is already paused"))),
            _ => return Err(Error::conflict(format!("Container {id} is not running"))),
        }
        self.host()
            .agent()
            .pause(id, true)
            .await
            .map_err(|error| Error::from(error).context(format!("Cannot pause container {id}")))?;
        if let Err(error) = self.apply(Change::Paused, BTreeMap::new()).await {
            let _ = self.host().agent().pause(&self.record.id, false).await;
            return Err(error);
        }
        Ok(())
    }

    async fn unpause(&mut self) -> Result<()> {
        if self.record.state.status != Status::Paused {
            return Err(Error::conflict(format!("Container {} is not paused", self.record.id)));
        }
        self.thaw().await
    }

    async fn thaw(&mut self) -> Result<()> {
        let id = &self.record.id;
        match self.host().agent().pause(id, false).await {
            // It has ended; that is told soon.
            Err(error) if error.refusal() == Some(ErrorKind::Conflict) => return Ok(()),
            result => result
                .map_err(|error| Error::from(error).context(format!("Cannot unpause container {id}")))?,
        }
        self.apply(Change::Unpaused, BTreeMap::new()).await
    }

    async fn rename(&mut self, name: &str) -> Result<()> {
        let old = self.record.name.clone();
        let name = self.core.containers.rename(&self.record.id, &old, name)?;
        self.record.name = name.clone();
        if let Err(error) = self.save().await {
            self.record.name = old.clone();
            let _ = self.core.containers.rename(&self.record.id, &name, &old);
            return Err(error);
        }
        self.rename_on_networks().await;
        self.tell("rename", BTreeMap::from([("oldName".to_owned(), format!("/{old}"))]));
        Ok(())
    }

    async fn remove(&mut self, volumes: bool) -> Result<()> {
        let status = self.record.state.status;
        if status == Status::Paused {
            return Err(Error::conflict(format!(
                "cannot remove container \"{}\": container is paused and must be unpaused first",
                self.record.name
            )));
        }
        if status.is_active() {
            let (name, status) = (&self.record.name, status.name());
            return Err(Error::conflict(format!(
                "cannot remove container \"{name}\": container is {status}: stop the container before removing or force remove"
            )));
        }
        self.record.state.apply(Change::Removing).map_err(|error| Error::conflict(error.to_string()))?;
        self.container.publish(Arc::new(self.record.clone()), false);
        if let Err(error) = self.remove_everything(volumes).await {
            let _ = self.record.state.apply(Change::RemoveFailed { error: error.to_string() });
            self.container.publish(Arc::new(self.record.clone()), false);
            return Err(error);
        }
        self.removed = true;
        self.core.execs.forget_container(&self.record.id);
        self.core.containers.remove(&self.record);
        crate::api::images::forget_removed(&self.core).await;
        self.tell("destroy", BTreeMap::new());
        self.container.fanout.close();
        self.container.publish(Arc::new(self.record.clone()), true);
        Ok(())
    }

    /// As `--rm` asks for.
    async fn remove_by_itself(&mut self) {
        if let Err(error) = self.remove(true).await {
            tracing::error!(%error, "cannot remove a container that has ended");
        }
    }

    async fn remove_everything(&mut self, volumes: bool) -> Result<()> {
        let host = self.host();
        self.revoke_trees(&host).await;
        if host.is_running() {
            // What a stopped sandbox keeps of it goes when the sandbox is started again.
            match host.agent().remove_container(&self.record.id).await {
                Err(error) if error.refusal().is_some() => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "cannot remove a container's writable layer now")
                }
                Ok(()) => {}
            }
        }
        let folder = self.core.container_folder(&self.record.id);
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder)).await?;
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::internal(format!("cannot remove the container's log: {error}")));
            }
            _ => {}
        }
        let core = &self.core;
        // Until they are gone, no other container may come to use them.
        let _alone = if volumes { Some(core.volumes.gate.write().await) } else { None };
        let volumes = if volumes { core.volumes_of_no_other(&self.record) } else { Vec::new() };
        let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        core.store.delete(self.record.id.as_str(), &names).await?;
        for volume in &volumes {
            core.volume_is_gone(volume).await;
        }
        Ok(())
    }

    /// Goes on with a process that an earlier daemon started.
    async fn resume(&mut self, process: ProcessState) {
        let host = self.host();
        self.core.rejoin_networks(&self.record);
        if process.exit.is_none() {
            self.core.republish_ports(&self.record);
        }
        self.adopt_trees(&host).await;
        let at = UnixNanos::from_u64(process.started_unix_nanos);
        if !self.record.state.status.is_running() {
            let change = Change::Started { pid: process.pid.max(1), at };
            if let Err(error) = self.apply(change, BTreeMap::new()).await {
                tracing::error!(%error, "cannot take over a container that runs");
                return;
            }
        }
        // An earlier daemon may have ended between what the agent did and what it wrote down.
        let paused = process.exit.is_none().then_some(process.paused);
        let change = match (self.record.state.status, paused) {
            (Status::Running, Some(true)) => Some(Change::Paused),
            (Status::Paused, Some(false)) => Some(Change::Unpaused),
            _ => None,
        };
        if let Some(change) = change
            && let Err(error) = self.apply(change, BTreeMap::new()).await
        {
            tracing::error!(%error, "cannot write down whether a container is paused");
        }
        if let Some(log) = self.container.log()
            && let Err(error) = log.begin(Some(at))
        {
            tracing::error!(
                error = chain(&error),
                "cannot read the end of a container's log; some of it may come twice"
            );
        }
        match self.image_layers().await {
            Ok(layers) => {
                host.uses(&self.record.id, layers.into_iter().map(|layer| layer.diff_id).collect()).await
            }
            Err(error) => tracing::error!(%error, "cannot read the image of a container that runs"),
        }
        self.attend(&host, process.acknowledged);
        self.follow_with_probes();
    }

    /// Makes a change, writes it down, and only then lets everyone know.
    async fn apply(&mut self, change: Change, attributes: BTreeMap<String, String>) -> Result<()> {
        let before = self.record.state.clone();
        let unheard_end = matches!(change, Change::Exited { .. } | Change::Lost { .. });
        let told = self.record.state.apply(change).map_err(|error| Error::conflict(error.to_string()))?;
        if let Err(error) = self.save().await {
            if !unheard_end {
                self.record.state = before;
                return Err(error);
            }
            // It has ended whether or not that can be written down.
            tracing::error!(%error, "cannot write down that a container ended");
            self.container.publish(Arc::new(self.record.clone()), false);
        }
        for event in told {
            self.tell_told(*event, &attributes);
        }
        self.follow_with_probes();
        Ok(())
    }

    /// Makes a change that no one else needs to hear of and that the next write takes along.
    fn note(&mut self, change: Change) -> Result<()> {
        let told = self.record.state.apply(change).map_err(|error| Error::conflict(error.to_string()))?;
        debug_assert!(told.is_empty());
        Ok(())
    }

    async fn update(&mut self, update: HostConfig) -> Result<()> {
        let cannot = |error: Error, id: &ContainerId| error.context(format!("Cannot update container {id}"));
        let before = self.record.host_config.clone();
        self.merge(update).map_err(|error| cannot(error, &self.record.id))?;
        let limits = resources::convert(&self.record.host_config);
        let changed = limits != resources::convert(&before);
        let running = self.record.state.status.is_running();
        let result = match changed && running {
            true => self.host().agent().change_limits(&self.record.id, &limits).await.map_err(Error::from),
            false => Ok(()),
        };
        let result = match result {
            Ok(()) => self.save().await,
            failed => failed,
        };
        if let Err(error) = result {
            if changed && running {
                let old = resources::convert(&before);
                let _ = self.host().agent().change_limits(&self.record.id, &old).await;
            }
            self.record.host_config = before;
            return Err(cannot(error, &self.record.id));
        }
        self.tell("update", BTreeMap::new());
        Ok(())
    }

    /// Puts the changes into the record; what makes no sense leaves it as it was.
    fn merge(&mut self, update: HostConfig) -> Result<()> {
        let mut merged = self.record.host_config.clone();
        resources::merge(&mut merged, &update)?;
        if !update.restart_policy.name.is_empty() {
            if merged.auto_remove && Policy::parse(&update.restart_policy)? != Policy::No {
                return Err(Error::conflict(
                    "Restart policy cannot be updated because AutoRemove is enabled for the container",
                ));
            }
            merged.restart_policy = update.restart_policy;
        }
        self.record.host_config = merged;
        Ok(())
    }

    async fn save(&self) -> Result<()> {
        self.core.store.put(self.record.id.as_str(), self.record.encode()).await?;
        self.container.publish(Arc::new(self.record.clone()), false);
        Ok(())
    }

    fn tell_told(&self, told: Told, attributes: &BTreeMap<String, String>) {
        match told {
            Told::Start => self.tell("start", BTreeMap::new()),
            Told::Pause => self.tell("pause", BTreeMap::new()),
            Told::Unpause => self.tell("unpause", BTreeMap::new()),
            Told::Oom => self.tell("oom", BTreeMap::new()),
            Told::Stop => self.tell("stop", BTreeMap::new()),
            Told::Die => {
                let mut attributes = attributes.clone();
                attributes.insert("exitCode".to_owned(), self.record.state.exit_code.to_string());
                self.tell("die", attributes);
            }
        }
    }

    fn tell(&self, action: &str, further: BTreeMap<String, String>) {
        let mut attributes = self.record.event_attributes();
        attributes.extend(further);
        self.core.events.container(action, self.record.id.as_str(), &self.record.config.image, attributes);
        tracing::info!(action, name = %self.record.name, "container");
    }
}

async fn until(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Why a start failed, with Docker's exit code for it.
struct StartFailure {
    exit_code: i32,
    error: Error,
}

impl From<Error> for StartFailure {
    fn from(error: Error) -> Self {
        Self { exit_code: 128, error }
    }
}

impl From<AgentError> for StartFailure {
    fn from(error: AgentError) -> Self {
        let exit_code = match error.refusal() {
            Some(ErrorKind::CommandNotFound) => 127,
            Some(ErrorKind::CommandNotExecutable) => 126,
            _ => 128,
        };
        Self { exit_code, error: runtime_error(error, "create", "failed to create task for container") }
    }
}

/// The agent's error in the words that Docker's clients look for.
pub(crate) fn runtime_error(error: AgentError, action: &str, prefix: &str) -> Error {
    let refused = matches!(
        error.refusal(),
        Some(
            ErrorKind::CommandNotFound
                | ErrorKind::CommandNotExecutable
                | ErrorKind::StartFailed
                | ErrorKind::Invalid
        )
    );
    let error = Error::from(error);
    if !refused {
        return error.context(prefix);
    }
    let error =
        error.context(format!("{prefix}: OCI runtime {action} failed: unable to start container process"));
    debug_assert_eq!(error.kind(), Kind::Invalid);
    error
}
