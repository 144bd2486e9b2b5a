//! How a container's run ends, and what follows: another run, removal, or nothing.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::Actor;
use crate::{
    container::{
        restart::Policy,
        state::{Change, Status},
    },
    error::{Kind, Result, chain},
    io::Outcome,
    time::UnixNanos,
};

impl Actor {
    /// Its process has ended and everything it wrote is delivered.
    pub(super) async fn ended(&mut self, outcome: Outcome) {
        self.run_over.cancel();
        if let Some(log) = self.container.log() {
            log.end();
        }
        self.container.fanout.close();
        self.container.stdin.end();
        let run = self.run_length();
        let host = self.host();
        // Whoever hears of its end finds that it can reach nothing of the host any more.
        self.revoke_trees(&host).await;
        let change = match outcome {
            Outcome::Exited(status) => {
                Change::Exited { restarts: self.is_to_restart(i32::from(status.code)), status }
            }
            Outcome::Lost(reason) => {
                Change::Lost { reason, at: UnixNanos::now(), restarts: self.is_to_restart(255) }
            }
        };
        let lost = matches!(change, Change::Lost { .. });
        let duration = BTreeMap::from([("execDuration".to_owned(), run.as_secs().to_string())]);
        if let Err(error) = self.apply(change, duration).await {
            tracing::error!(%error, "cannot write down that a container ended");
        }
        self.core.tell_of_volumes("unmount", &self.record);
        self.core.unpublish_ports(&self.record.id).await;
        self.core.leave_networks(&self.record);
        self.core.tell_of_networks("disconnect", &self.record);
        self.let_go(&host).await;
        // Only now: until the end is on disk, the agent must be able to tell it again.
        if !lost && let Err(error) = host.agent().forget(&self.record.id).await {
            tracing::debug!(error = chain(&error), "cannot make the agent forget a container");
        }
        self.core.execs.forget_container(&self.record.id);
        if self.record.state.status == Status::Restarting {
            self.restart_after(run);
        } else if self.record.host_config.auto_remove {
            self.remove_by_itself().await;
        }
    }

    fn run_length(&self) -> Duration {
        let started = self.record.state.started.unwrap_or_default();
        Duration::from_nanos(u64::try_from(UnixNanos::now().0.saturating_sub(started.0)).unwrap_or(0))
    }

    fn policy(&self) -> Policy {
        Policy::of(&self.record.host_config.restart_policy)
    }

    fn is_to_restart(&self, exit_code: i32) -> bool {
        let state = &self.record.state;
        !state.stop_asked && !self.core.is_going_down() && self.policy().restarts(exit_code, state.restarts)
    }

    /// Plans the next run, after one of this length.
    pub(super) fn restart_after(&mut self, run: Duration) {
        let pause = self.backoff.after(run);
        tracing::info!(?pause, restarts = self.record.state.restarts, "the container is started again soon");
        self.restart_due = Some(tokio::time::Instant::now() + pause);
    }

    /// The pause is over.
    pub(super) async fn restart(&mut self) {
        self.restart_due = None;
        if self.record.state.status != Status::Restarting || self.core.is_going_down() {
            return;
        }
        self.begin_trace(Instant::now());
        let Err(failure) = self.start_in_sandbox().await else { return };
        let host = self.host();
        self.let_go(&host).await;
        if failure.error.kind() == Kind::Unavailable {
            // The sandbox is not there now, which says nothing of the container.
            tracing::warn!(error = %failure.error, "the container's sandbox does not start; this is tried again");
            self.restart_after(Duration::ZERO);
        } else {
            self.start_failed(failure).await;
        }
    }

    /// Someone wants it to end. Whoever asks then waits for the end of the run, if there is one.
    pub(super) async fn stop_asked(&mut self, by_user: bool) -> Result<()> {
        let state = &self.record.state;
        if !state.status.is_active() {
            return Ok(());
        }
        self.restart_due = None;
        if self.policy() == Policy::No {
            // Nothing depends on it after a crash, so it needs no write.
            return self.note(Change::StopAsked { by_user });
        }
        self.apply(Change::StopAsked { by_user }, BTreeMap::new()).await
    }

    /// The daemon comes up, and this container does not run.
    pub(super) async fn daemon_started(&mut self) {
        match self.record.state.status {
            Status::Restarting if self.restart_due.is_none() => self.restart_after(Duration::ZERO),
            Status::Exited if self.policy().starts_with_daemon(&self.record.state) => {
                // A failure is in the record and in the daemon's log.
                let _ = self.start(Instant::now()).await;
            }
            _ => {}
        }
    }
}
