//! Probes of a container's health follow its state: they run while it runs, and stand still while it is paused.

use std::sync::Arc;

use tracing::Instrument;

use super::Actor;
use crate::{
    container::{health::HealthStatus, state::Status},
    exec::probe,
};

impl Actor {
    /// Begins or ends the probes, as the state now wants it.
    pub(super) fn follow_with_probes(&mut self) {
        let status = self.record.state.status;
        if status == Status::Running {
            self.begin_probes();
            return;
        }
        if let Some(over) = self.probing.take() {
            over.cancel();
        }
        if !status.is_running() {
            // As Docker says of what does not run.
            self.container.update_health(|health| health.status = HealthStatus::Unhealthy);
        }
    }

    fn begin_probes(&mut self) {
        let check = self.record.config.healthcheck.clone().filter(|check| check.command().is_some());
        let Some(check) = check.filter(|_| self.probing.is_none()) else { return };
        // After a pause it is what it was before.
        if self.probed_run != self.run {
            self.probed_run = self.run;
            self.container.reset_health();
        }
        let over = self.core.closing.child_token();
        let (core, container) = (Arc::clone(&self.core), Arc::clone(&self.container));
        self.core.tasks.spawn(probe::watch(core, container, check, over.clone()).in_current_span());
        self.probing = Some(over);
    }
}
