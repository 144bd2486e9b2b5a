//! Runs a container's health check over and over, for as long as it runs.
//!
//! Each probe is an exec. Its output is untrusted and kept only in part; a probe that takes too long is killed.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{Exec, ExecConfig};
use crate::{
    container::{
        Container,
        health::{HealthStatus, Healthcheck, Outcome},
        signal::SIGKILL,
    },
    core::Core,
    time::UnixNanos,
};

/// How much of a probe's output is kept.
const KEPT_OUTPUT: usize = 4096;

/// Probes until `over`.
pub(crate) async fn watch(
    core: Arc<Core>,
    container: Arc<Container>,
    check: Healthcheck,
    over: CancellationToken,
) {
    let Some(command) = check.command() else { return };
    loop {
        let pause = check.pause(running(&container), container.health_status());
        tokio::select! {
            () = over.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let outcome = tokio::select! {
            () = over.cancelled() => return,
            outcome = probe(&core, &container, &command, check.timeout()) => outcome,
        };
        let started = container.record().state.started.unwrap_or_default();
        // A run that is over says nothing of the next one.
        if over.is_cancelled() {
            return;
        }
        let changed = container.update_health(|health| {
            let changed = health.take(&check, started, outcome);
            changed.then_some(health.status)
        });
        if let Some(status) = changed.flatten() {
            tell(&core, &container, status);
        }
    }
}

fn running(container: &Container) -> Duration {
    let started = container.record().state.started.unwrap_or_default();
    Duration::from_nanos(u64::try_from(UnixNanos::now().0.saturating_sub(started.0)).unwrap_or(0))
}

fn tell(core: &Core, container: &Container, status: HealthStatus) {
    let record = container.record();
    let action = format!("health_status: {}", status.name());
    core.events.container(&action, record.id.as_str(), &record.config.image, record.event_attributes());
    tracing::info!(status = status.name(), "the container's health changed");
}

async fn probe(
    core: &Arc<Core>,
    container: &Arc<Container>,
    command: &[String],
    timeout: Duration,
) -> Outcome {
    let start = UnixNanos::now();
    let (exit_code, output) = match begin(core, container, command) {
        Ok((exec, forget)) => {
            let (mut output, _) = exec.fanout.subscribe(true, true, None);
            let mut kept = Vec::new();
            let running = async {
                exec.start(core, None).await?;
                let reading = async {
                    while let Some(chunk) = output.recv().await {
                        let room = KEPT_OUTPUT.saturating_sub(kept.len()).min(chunk.bytes.len());
                        kept.extend_from_slice(&chunk.bytes[..room]);
                    }
                };
                Ok(tokio::time::timeout(timeout, reading).await.is_ok())
            };
            let ended: crate::error::Result<bool> = running.await;
            let text = |kept: &[u8]| String::from_utf8_lossy(kept).into_owned();
            let result = match ended {
                Ok(true) => (exec.state().exit_code.unwrap_or(-1), text(&kept)),
                Ok(false) => {
                    kill(core, container, &exec).await;
                    (-1, timed_out(timeout, &text(&kept)))
                }
                Err(error) => (-1, error.to_string()),
            };
            drop(forget);
            result
        }
        Err(error) => (-1, error.to_string()),
    };
    Outcome { start, end: UnixNanos::now(), exit_code, output }
}

fn timed_out(timeout: Duration, output: &str) -> String {
    let words = format!("Health check exceeded timeout ({timeout:?})");
    if output.is_empty() { words } else { format!("{words}: {output}") }
}

/// Takes a probe out of the list of execs, whatever became of it: no one asks for it later, and there are many.
struct Forget<'a>(&'a Core, Arc<Exec>);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.execs.forget(&self.1.id);
    }
}

fn begin<'a>(
    core: &'a Core,
    container: &Arc<Container>,
    command: &[String],
) -> crate::error::Result<(Arc<Exec>, Forget<'a>)> {
    let config = ExecConfig {
        attach_stdout: true,
        attach_stderr: true,
        cmd: command.to_vec(),
        ..ExecConfig::default()
    };
    let exec = core.execs.create(container, config)?;
    Ok((Arc::clone(&exec), Forget(core, exec)))
}

async fn kill(core: &Core, container: &Container, exec: &Exec) {
    let host = core.sandboxes.get(&container.record().sandbox);
    // One that has just ended is what is wanted.
    let _ = host.agent().signal(&exec.id, SIGKILL).await;
}
