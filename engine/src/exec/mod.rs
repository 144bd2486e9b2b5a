//! Further processes in running containers (`docker exec`).
//!
//! They live in memory only: a daemon that was restarted lets them run on, but knows nothing of them, as Docker does.

pub(crate) mod probe;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use coracle_agent_api::{ErrorKind, ExecSpec, ProcessId, ProcessSpec, TerminalSize};
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::AgentError,
    container::{
        Container,
        actor::runtime_error,
        capability,
        names::new_id,
        options,
        record::{ContainerId, Record},
        refused, spec,
        state::Status,
    },
    core::Core,
    error::{Error, Result},
    io::{self, Fanout, Outcome, Pump, StdinPort},
};

/// How long an ended exec can still be inspected.
const KEPT: Duration = Duration::from_secs(300);
/// How long others may still write to an ended exec's output.
const LINGER: Duration = Duration::from_secs(2);
/// How long a client may be ahead of the start.
const START_TIME: Duration = Duration::from_secs(10);
/// How many execs are remembered at most.
const MAX_EXECS: usize = 10_000;

/// What a client asked for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct ExecConfig {
    pub(crate) attach_stdin: bool,
    pub(crate) attach_stdout: bool,
    pub(crate) attach_stderr: bool,
    /// Go knows members by their letters in any case, and docker-py writes this one so.
    #[serde(alias = "detachKeys")]
    pub(crate) detach_keys: String,
    pub(crate) tty: bool,
    pub(crate) env: Vec<String>,
    pub(crate) cmd: Vec<String>,
    pub(crate) privileged: bool,
    pub(crate) user: String,
    pub(crate) working_dir: String,
    pub(crate) console_size: Option<[u32; 2]>,
}

impl ExecConfig {
    /// Reads the body of a request to create one.
    pub(crate) fn parse(body: &[u8]) -> Result<Self> {
        let members = options::object(body)?;
        refused::check_exec(&members)?;
        let config: Self = options::typed(members)?;
        if config.cmd.is_empty() {
            return Err(Error::invalid("no exec command specified"));
        }
        options::check_env(&config.env)?;
        Ok(config)
    }
}

/// Where it is in its life.
#[derive(Debug, Clone, Default)]
pub(crate) struct ExecState {
    pub(crate) begun: bool,
    pub(crate) running: bool,
    pub(crate) exit_code: Option<i32>,
    pub(crate) pid: u32,
    ended: Option<Instant>,
}

/// An exec.
pub(crate) struct Exec {
    pub(crate) id: ProcessId,
    pub(crate) container: Arc<Container>,
    pub(crate) config: ExecConfig,
    pub(crate) fanout: Arc<Fanout>,
    pub(crate) stdin: StdinPort,
    state: watch::Sender<ExecState>,
}

/// All execs.
#[derive(Default)]
pub(crate) struct Execs {
    by_id: Mutex<HashMap<ProcessId, Arc<Exec>>>,
}

impl Execs {
    /// Makes one; it does not run yet.
    pub(crate) fn create(&self, container: &Arc<Container>, config: ExecConfig) -> Result<Arc<Exec>> {
        let exec = Arc::new(Exec {
            id: new_id(),
            container: Arc::clone(container),
            config,
            fanout: Arc::default(),
            stdin: StdinPort::new(),
            state: watch::Sender::default(),
        });
        let mut by_id = self.by_id.lock().expect("no holder panics");
        by_id.retain(|_, exec| exec.state().ended.is_none_or(|ended| ended.elapsed() < KEPT));
        if by_id.len() >= MAX_EXECS {
            return Err(Error::conflict(format!(
                "there are {MAX_EXECS} execs already: wait for some of them to end"
            )));
        }
        by_id.insert(exec.id.clone(), Arc::clone(&exec));
        Ok(exec)
    }

    /// The exec of an id.
    pub(crate) fn find(&self, id: &str) -> Result<Arc<Exec>> {
        let missing = || {
            Error::not_found(format!("No such exec instance: {}", id.chars().take(80).collect::<String>()))
        };
        let id: ProcessId = id.parse().map_err(|_| missing())?;
        self.by_id.lock().expect("no holder panics").get(&id).cloned().ok_or_else(missing)
    }

    /// The execs of a container that have not ended.
    pub(crate) fn of(&self, container: &ContainerId) -> Vec<String> {
        let by_id = self.by_id.lock().expect("no holder panics");
        let live =
            by_id.values().filter(|exec| exec.container.id() == container && exec.state().ended.is_none());
        live.map(|exec| exec.id.to_string()).collect()
    }

    /// Forgets one that no one will ask for.
    pub(crate) fn forget(&self, id: &ProcessId) {
        self.by_id.lock().expect("no holder panics").remove(id);
    }

    /// A container has ended: execs that were not started never will be.
    pub(crate) fn forget_container(&self, container: &ContainerId) {
        let mut by_id = self.by_id.lock().expect("no holder panics");
        by_id.retain(|_, exec| exec.container.id() != container || exec.state().begun);
    }
}

impl Exec {
    pub(crate) fn state(&self) -> ExecState {
        self.state.borrow().clone()
    }

    /// Waits until it runs, as clients may tell a terminal's size too early; not for ever.
    pub(crate) async fn wait_for_start(&self) -> Result<()> {
        let mut state = self.state.subscribe();
        let started = state.wait_for(|state| state.running || state.exit_code.is_some());
        match tokio::time::timeout(START_TIME, started).await {
            Ok(Ok(state)) if state.running => Ok(()),
            _ => Err(Error::conflict(format!("exec {} is not running", self.id))),
        }
    }

    /// Starts it. What it writes goes to those who are attached by now or later.
    pub(crate) async fn start(self: &Arc<Self>, core: &Arc<Core>, size: Option<[u32; 2]>) -> Result<()> {
        let record = self.container.record();
        check_container(&record)?;
        self.claim()?;
        let host = core.sandboxes.get(&record.sandbox);
        let spec = self.spec(&record, size).inspect_err(|_| self.ended(core, 126))?;
        self.tell(core, "exec_create", &[]);
        let started = match host.agent().exec(&self.id, &spec).await {
            Ok(started) => started,
            Err(error) => {
                self.ended(core, exit_code_of(&error));
                return Err(runtime_error(error, "exec", "exec failed"));
            }
        };
        self.state.send_modify(|state| {
            state.running = true;
            state.pid = started.pid;
        });
        self.tell(core, "exec_start", &[]);
        self.attend(core);
        Ok(())
    }

    /// Takes the right to start it, once.
    fn claim(&self) -> Result<()> {
        let mut claimed = false;
        self.state.send_if_modified(|state| {
            claimed = !state.begun;
            state.begun = true;
            claimed
        });
        if claimed {
            Ok(())
        } else {
            Err(Error::conflict(format!("exec command {} is already running or has run", self.id)))
        }
    }

    fn spec(&self, record: &Record, size: Option<[u32; 2]>) -> Result<ExecSpec> {
        let (config, host) = (&self.config, &record.host_config);
        let mut container = record.config.clone();
        container.tty = config.tty;
        let size = size.or(config.console_size).unwrap_or(host.console_size);
        let [rows, cols] = size.map(|size| u16::try_from(size).unwrap_or(u16::MAX));
        let capabilities = if config.privileged || host.privileged {
            capability::all()
        } else {
            capability::resolve(&host.cap_add, &host.cap_drop)?
        };
        let process = ProcessSpec {
            args: config.cmd.clone(),
            env: spec::environment(&container, &config.env),
            cwd: if config.working_dir.is_empty() {
                spec::working_dir(&container)
            } else {
                config.working_dir.clone()
            },
            user: if config.user.is_empty() { container.user.clone() } else { config.user.clone() },
            additional_groups: host.group_add.clone(),
            tty: config.tty,
            terminal_size: (config.tty && rows > 0 && cols > 0).then_some(TerminalSize { rows, cols }),
            stdin: config.attach_stdin,
            capabilities,
            no_new_privileges: options::security(&host.security_opt)?.no_new_privileges,
            rlimits: options::rlimits(&host.ulimits)?,
            oom_score_adj: i16::try_from(host.oom_score_adj).ok().filter(|value| *value != 0),
        };
        Ok(ExecSpec {
            container: record.id.clone(),
            process,
            privileged: config.privileged || host.privileged,
        })
    }

    fn attend(self: &Arc<Self>, core: &Arc<Core>) {
        let host = core.sandboxes.get(&self.container.record().sandbox);
        let over = CancellationToken::new();
        if self.config.attach_stdin {
            let forward = io::forward(host.agent().clone(), self.id.clone(), self.stdin.begin());
            let over = over.clone();
            core.tasks.spawn(core.closing.clone().run_until_cancelled_owned(async move {
                let _ = over.run_until_cancelled(forward).await;
            }));
        }
        let pump = Pump {
            agent: host.agent().clone(),
            sandbox: host.state(),
            process: self.id.clone(),
            fanout: Arc::clone(&self.fanout),
            log: None,
            after: 0,
            linger: LINGER,
            trace: None,
        };
        let (exec, tracked) = (Arc::clone(self), Arc::clone(core));
        let attended = async move {
            let outcome = pump.run().await;
            over.cancel();
            let code = match outcome {
                Outcome::Exited(status) => i32::from(status.code),
                Outcome::Lost(_) => 255,
            };
            exec.ended(&tracked, code);
            let _ = host.agent().forget(&exec.id).await;
        };
        core.tasks.spawn(core.closing.clone().run_until_cancelled_owned(attended));
    }

    /// The exit code first, so that a client whose stream ends can ask for it.
    fn ended(&self, core: &Core, code: i32) {
        self.state.send_modify(|state| {
            state.running = false;
            state.exit_code = Some(code);
            state.ended = Some(Instant::now());
        });
        self.tell(core, "exec_die", &[("exitCode", code.to_string())]);
        self.fanout.close();
        self.stdin.end();
    }

    fn tell(&self, core: &Core, action: &str, further: &[(&str, String)]) {
        let record = self.container.record();
        let mut attributes: BTreeMap<String, String> = record.event_attributes();
        attributes.insert("execID".to_owned(), self.id.to_string());
        attributes.extend(further.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        let action = if action == "exec_die" {
            action.to_owned()
        } else {
            format!("{action}: {}", self.config.cmd.join(" "))
        };
        core.events.container(&action, record.id.as_str(), &record.config.image, attributes);
    }
}

/// Whether a process can be started in a container.
pub(crate) fn check_container(record: &Record) -> Result<()> {
    match record.state.status {
        Status::Running => Ok(()),
        Status::Paused => Err(Error::conflict(format!(
            "Container {} is paused, unpause the container before exec",
            record.id
        ))),
        _ => Err(not_running(record)),
    }
}

/// Docker's words for a container that does not run.
pub(crate) fn not_running(record: &Record) -> Error {
    if record.state.status == Status::Restarting {
        let id = &record.id;
        return Error::conflict(format!("Container {id} is restarting, wait until the container is running"));
    }
    Error::conflict(format!("container {} is not running", record.id))
}

fn exit_code_of(error: &AgentError) -> i32 {
    match error.refusal() {
        Some(ErrorKind::CommandNotFound) => 127,
        _ => 126,
    }
}
