//! Decides whether a container may have what the agent asks for in its name, and notes it. The agent says which address a packet
//! came from; whose address that is, and what that container may do, the daemon knows by itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Instant,
};

use coracle_agent_api::{
    ProcessId,
    egress::{Failure, Flow},
};

use super::{
    audit::Line,
    names,
    policy::{Learnt, Policy},
    reach,
};
use crate::{
    container::{Container, record::ContainerId},
    core::Core,
    sandbox::SandboxId,
};

const NOT_ALLOWED: &str = "its label coracle.egress does not allow it";
const UNREACHABLE: &str = "this address is not reached through the host";
const NOBODY: &str = "no container has the address that it came from";

/// See the module.
#[derive(Clone)]
pub(super) struct Guard {
    core: Weak<Core>,
    /// The one that asks; it speaks for its own containers only.
    sandbox: SandboxId,
    learnt: Arc<Mutex<HashMap<ContainerId, Learnt>>>,
}

impl Guard {
    pub(super) fn new(core: Weak<Core>, sandbox: SandboxId) -> Self {
        Self { core, sandbox, learnt: Arc::default() }
    }

    fn learnt(&self) -> MutexGuard<'_, HashMap<ContainerId, Learnt>> {
        self.learnt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a flow may begin.
    pub(super) fn admit(&self, protocol: &'static str, flow: &Flow) -> Result<(), Failure> {
        let core = self.core.upgrade().ok_or(Failure::Exhausted)?;
        let owner = core.networks.owner(flow.source.ip()).and_then(|id| self.own(&core, id.as_str()));
        let (line, admitted) = match &owner {
            None => (Line::new(protocol, Some(flow.destination), None, Some(NOBODY)), false),
            Some(container) => self.judge(container, protocol, flow),
        };
        note(&core, owner.as_deref(), line);
        if admitted { Ok(()) } else { Err(Failure::Prohibited) }
    }

    /// A container of the sandbox's.
    fn own(&self, core: &Core, id: &str) -> Option<Arc<Container>> {
        let container = core.containers.find(id).ok()?;
        let is_own = container.record().sandbox == self.sandbox;
        is_own.then_some(container)
    }

    fn judge(&self, container: &Container, protocol: &'static str, flow: &Flow) -> (Line, bool) {
        let all = self.learnt();
        let none = Learnt::default();
        let learnt = all.get(container.id()).unwrap_or(&none);
        let (allowed, name) = learnt.allows(&policy(container), flow.destination.ip(), Instant::now());
        let refused = match (allowed, reach::reachable(flow.destination)) {
            (false, _) => Some(NOT_ALLOWED),
            (true, Err(_)) => Some(UNREACHABLE),
            (true, Ok(_)) => None,
        };
        (Line::new(protocol, Some(flow.destination), name, refused), refused.is_none())
    }

    /// The container with this id, if it has the engine's socket now, and the engine.
    pub(super) fn admit_client(&self, asker: &ProcessId) -> Result<(Arc<Core>, Arc<Container>), Failure> {
        let core = self.core.upgrade().ok_or(Failure::Exhausted)?;
        let container = self.own(&core, asker.as_str()).ok_or(Failure::Prohibited)?;
        let admitted = *container.has_engine().borrow();
        match admitted {
            true => Ok((core, container)),
            false => Err(Failure::Prohibited),
        }
    }

    /// Whether a container may ask for the name in a question. What is allowed to everybody is not noted: it is no connection.
    pub(super) fn admit_question(&self, asker: &ProcessId, question: &[u8]) -> Result<(), Failure> {
        let core = self.core.upgrade().ok_or(Failure::Exhausted)?;
        let container = self.own(&core, asker.as_str()).ok_or(Failure::Prohibited)?;
        let policy = policy(&container);
        if policy == Policy::All {
            return Ok(());
        }
        let name = names::asked(question).unwrap_or_default();
        let refused = (!policy.allows_name(&name)).then_some(NOT_ALLOWED);
        note(&core, Some(&container), Line::new("dns", None, Some(&name), refused));
        if refused.is_none() { Ok(()) } else { Err(Failure::Prohibited) }
    }

    /// Remembers what a container was told.
    pub(super) fn answered(&self, asker: &ProcessId, question: &[u8], answer: &[u8]) {
        let Some(core) = self.core.upgrade() else { return };
        let Some(container) = self.own(&core, asker.as_str()) else { return };
        let Some(name) = names::asked(question) else { return };
        if !matches!(policy(&container), Policy::List(_)) {
            return;
        }
        let mut learnt = self.learnt();
        learnt.retain(|id, _| core.containers.find(id.as_str()).is_ok());
        let own = learnt.entry(container.id().clone()).or_default();
        own.learn(&name, &names::addresses_in(answer), Instant::now());
    }
}

/// Labels were checked when the container was made; one that cannot be read any more allows nothing.
fn policy(container: &Container) -> Policy {
    Policy::of(container.record().config.labels.iter()).unwrap_or(Policy::None)
}

fn note(core: &Core, container: Option<&Container>, mut line: Line) {
    if let Some(container) = container {
        line.container = container.id().as_str().to_owned();
        line.name = container.record().name.clone();
    }
    core.audit.note(line);
}
