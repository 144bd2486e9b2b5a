//! Where the time of a container's start went; for `coracle` and the benchmarks, see [`crate::api::private`].

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Instant,
};

use coracle_agent_api::StartPhase;
use serde::Serialize;

use crate::time::UnixNanos;

/// How many starts are remembered.
const KEPT: usize = 256;
/// How many moments of one start are remembered.
const MAX_PHASES: usize = 64;

/// A moment of a start.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Moment {
    name: &'static str,
    micros: u64,
}

#[derive(Debug, Default)]
struct Marks {
    phases: Vec<Moment>,
    agent: Vec<StartPhase>,
}

/// The moments of one container's way to its first byte.
#[derive(Debug)]
pub(crate) struct Trace {
    id: String,
    name: String,
    begun: Instant,
    begun_unix: UnixNanos,
    marks: Mutex<Marks>,
}

/// A trace as it is given to clients.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    id: String,
    name: String,
    unix_nanos: UnixNanos,
    phases: Vec<Moment>,
    agent: Vec<StartPhase>,
}

impl Trace {
    /// Begins at a moment that has just passed.
    pub(crate) fn new(id: &str, name: &str, begun: Instant) -> Self {
        let passed = i64::try_from(begun.elapsed().as_nanos()).unwrap_or(0);
        let begun_unix = UnixNanos(UnixNanos::now().0 - passed);
        Self { id: id.to_owned(), name: name.to_owned(), begun, begun_unix, marks: Mutex::default() }
    }

    /// Now is when this happened.
    pub(crate) fn mark(&self, name: &'static str) {
        let micros = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut marks = self.marks.lock().expect("no holder panics");
        if marks.phases.len() < MAX_PHASES {
            marks.phases.push(Moment { name, micros });
        }
    }

    /// Now is when this happened for the first time.
    pub(crate) fn mark_once(&self, name: &'static str) {
        let known = self.has(name);
        if !known {
            self.mark(name);
        }
    }

    /// Whether this has happened.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.marks.lock().expect("no holder panics").phases.iter().any(|phase| phase.name == name)
    }

    /// What the agent says of its part.
    pub(crate) fn agent(&self, phases: Vec<StartPhase>) {
        let mut marks = self.marks.lock().expect("no holder panics");
        marks.agent = phases;
        marks.agent.truncate(MAX_PHASES);
    }

    fn report(&self) -> Report {
        let marks = self.marks.lock().expect("no holder panics");
        Report {
            id: self.id.clone(),
            name: self.name.clone(),
            unix_nanos: self.begun_unix,
            phases: marks.phases.clone(),
            agent: marks.agent.clone(),
        }
    }
}

/// The newest traces; they outlive their containers.
#[derive(Debug, Default)]
pub(crate) struct Timings {
    traces: Mutex<VecDeque<Arc<Trace>>>,
}

impl Timings {
    /// Begins a trace.
    pub(crate) fn begin(&self, id: &str, name: &str, begun: Instant) -> Arc<Trace> {
        let trace = Arc::new(Trace::new(id, name, begun));
        let mut traces = self.traces.lock().expect("no holder panics");
        if traces.len() == KEPT {
            traces.pop_front();
        }
        traces.push_back(Arc::clone(&trace));
        trace
    }

    /// The newest trace of a container, by id, beginning of an id, or name.
    pub(crate) fn find(&self, container: &str) -> Option<Report> {
        let traces = self.traces.lock().expect("no holder panics");
        let found =
            traces.iter().rev().find(|trace| trace.name == container || trace.id.starts_with(container));
        found.map(|trace| trace.report())
    }
}
