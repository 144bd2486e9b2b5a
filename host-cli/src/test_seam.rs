//! Sandboxes that are an agent as an ordinary process: a test seam, which is compiled with the feature `test-seam` only.

use std::{path::PathBuf, sync::Arc};

use coracle_engine::sandbox::{Sandbox, SandboxFactory, SandboxId, process::ProcessSandbox};

use crate::paths::Home;

/// Makes sandboxes whose agent is the program `agent`; each keeps its files where a machine's would be.
pub(crate) fn sandboxes(agent: PathBuf, home: &Home) -> Arc<dyn SandboxFactory> {
    let vms = home.vms();
    Arc::new(move |id: &SandboxId| -> Arc<dyn Sandbox> {
        Arc::new(ProcessSandbox::new(id.clone(), &agent, &vms.join(id.as_str())))
    })
}
