//! Takes one process's output from the agent to its end.

use std::{sync::Arc, time::Duration};

use coracle_agent_api::{ErrorKind, ExitStatus, ProcessId};
use tokio::{sync::watch, time::Instant};

use super::{Chunk, Fanout};
use crate::{
    agent::{Agent, AgentError, Frame, OutputStream},
    error::chain,
    logs::Log,
    sandbox::SandboxState,
    timings::Trace,
};

/// How long after a failed connection the sandbox's state is given to explain it.
const GRACE: Duration = Duration::from_millis(250);
/// How often a connection is tried again while the sandbox is said to run.
const ATTEMPTS: u32 = 20;

/// How it ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Exited(ExitStatus),
    /// No one knows; the sentence says why.
    Lost(String),
}

/// See the module.
pub(crate) struct Pump {
    pub(crate) agent: Agent,
    pub(crate) sandbox: watch::Receiver<SandboxState>,
    pub(crate) process: ProcessId,
    pub(crate) fanout: Arc<Fanout>,
    pub(crate) log: Option<Arc<Log>>,
    /// Sequence number of the last frame that an earlier daemon acknowledged.
    pub(crate) after: u64,
    /// How long output may follow the exit (others may hold the pipes).
    pub(crate) linger: Duration,
    pub(crate) trace: Option<Arc<Trace>>,
}

enum Drained {
    Ended,
    Broken(AgentError),
}

impl Pump {
    /// Runs to the process's end; everything is delivered when it returns.
    pub(crate) async fn run(mut self) -> Outcome {
        let instance = self.instance();
        let mut exit = None;
        let mut failures = 0;
        loop {
            let problem = match self.agent.output(&self.process, self.after).await {
                Ok(stream) => match self.drain(stream, &mut exit, &mut failures).await {
                    Drained::Ended => break,
                    Drained::Broken(error) => error,
                },
                Err(error) if error.refusal() == Some(ErrorKind::NotFound) => {
                    return exit.map_or_else(
                        || Outcome::Lost("the sandbox does not know it any more".to_owned()),
                        Outcome::Exited,
                    );
                }
                Err(error) => error,
            };
            failures += 1;
            if exit.is_some() {
                break;
            }
            if let Some(reason) = self.explain(instance, &problem, failures).await {
                return Outcome::Lost(reason);
            }
        }
        exit.map_or_else(
            || Outcome::Lost("its output ended without its exit status".to_owned()),
            Outcome::Exited,
        )
    }

    async fn drain(
        &mut self,
        mut stream: OutputStream,
        exit: &mut Option<ExitStatus>,
        failures: &mut u32,
    ) -> Drained {
        let mut deadline = None;
        loop {
            let frame = match deadline {
                Some(deadline) => match tokio::time::timeout_at(deadline, stream.next()).await {
                    Ok(frame) => frame,
                    Err(_) => return Drained::Ended,
                },
                None => stream.next().await,
            };
            let acknowledged = match frame {
                Err(error) => return Drained::Broken(error),
                // Not acknowledged: the log may still hold something back; the whole process is forgotten soon.
                Ok(Frame::End) => return Drained::Ended,
                Ok(Frame::Exit(status)) => {
                    *exit = Some(status);
                    deadline = Some(Instant::now() + self.linger);
                    self.after = stream.sequence();
                    continue;
                }
                Ok(Frame::Output { stream: output, time, bytes }) => {
                    *failures = 0;
                    self.after = stream.sequence();
                    if let Some(trace) = &self.trace {
                        trace.mark_once("first-output");
                    }
                    let (safe, recipients) = self.fanout.record(self.log.as_deref(), output, time, &bytes);
                    let acknowledged = if safe { stream.acknowledge().await } else { Ok(()) };
                    for recipient in recipients {
                        // One that is gone is forgotten with the next piece.
                        let _ = recipient.send(Chunk { stream: output, bytes: bytes.clone() }).await;
                    }
                    acknowledged
                }
            };
            if let Err(error) = acknowledged {
                return Drained::Broken(error);
            }
        }
    }

    fn instance(&self) -> Option<u64> {
        self.sandbox.borrow().running().map(|running| running.instance)
    }

    /// Why the connection failed, if the process is lost by it.
    async fn explain(
        &mut self,
        instance: Option<u64>,
        problem: &AgentError,
        failures: u32,
    ) -> Option<String> {
        let same = |state: &SandboxState| {
            instance.is_some() && state.running().map(|running| running.instance) == instance
        };
        if same(&self.sandbox.borrow()) {
            let changed = self.sandbox.wait_for(|state| !same(state));
            let _ = tokio::time::timeout(GRACE, changed).await;
        }
        match &*self.sandbox.borrow() {
            SandboxState::Died { reason } => Some(format!("its sandbox died: {reason}")),
            state if !same(state) => Some("its sandbox was stopped".to_owned()),
            _ if failures >= ATTEMPTS => Some(format!("its sandbox does not answer: {}", chain(problem))),
            _ => None,
        }
    }
}
