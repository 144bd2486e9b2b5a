//! The life of a container, in one place.
//!
//! ```text
//!                       paused
//!                   pause ▲│ unpause
//!                         │▼
//!  created ──start──▶ running, paused ──exit, loss──▶ exited ──start──▶ running …
//!     │                                                  │
//!     └────────────remove──▶ removing ◀──remove──────────┘        (removing ──failure──▶ dead ──remove──▶ removing)
//! ```
//!
//! Every change goes through [`State::apply`], which refuses what is not an arrow and names the events to tell.

use coracle_agent_api::ExitStatus;
use serde::{Deserialize, Serialize};

use crate::time::UnixNanos;

/// Exit code of a container whose real one is not known.
const LOST_EXIT: i32 = 255;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Created,
    Running,
    /// It runs, but all its processes stand still.
    Paused,
    Exited,
    Removing,
    Dead,
}

impl Status {
    /// Docker's word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited => "exited",
            Self::Removing => "removing",
            Self::Dead => "dead",
        }
    }

    /// Whether it has processes; a paused one has.
    pub(crate) fn is_running(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }

    pub(crate) fn can_start(self) -> bool {
        matches!(self, Self::Created | Self::Exited)
    }

    pub(crate) fn can_remove(self) -> bool {
        matches!(self, Self::Created | Self::Exited | Self::Dead)
    }
}

/// Something that happens to a container.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// Its first process runs.
    Started { pid: u32, at: UnixNanos },
    /// It could not be started; it stays where it was, with this exit code.
    StartFailed { exit_code: i32, error: String },
    /// Its first process has ended, and all its output is delivered.
    Exited(ExitStatus),
    /// Its processes stand still.
    Paused,
    /// They run on.
    Unpaused,
    /// Its sandbox or the knowledge of its end is gone.
    Lost { reason: String, at: UnixNanos },
    /// It is being removed.
    Removing,
    /// Removing it failed half way.
    RemoveFailed { error: String },
}

/// An event to tell after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Start,
    Pause,
    Unpause,
    Oom,
    Die,
}

/// A change that is no arrow of the diagram.
#[derive(Debug, thiserror::Error)]
#[error("a container that is {from} cannot be {what}")]
pub(crate) struct Illegal {
    from: &'static str,
    what: &'static str,
}

/// What is known of a container's life; kept on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) status: Status,
    pub(crate) pid: u32,
    pub(crate) exit_code: i32,
    pub(crate) error: String,
    pub(crate) oom_killed: bool,
    pub(crate) started: Option<UnixNanos>,
    pub(crate) finished: Option<UnixNanos>,
    /// How often it has ended.
    pub(crate) exits: u64,
}

impl State {
    /// A container that was just created.
    pub(crate) fn created() -> Self {
        Self {
            status: Status::Created,
            pid: 0,
            exit_code: 0,
            error: String::new(),
            oom_killed: false,
            started: None,
            finished: None,
            exits: 0,
        }
    }

    /// Makes a change if it is legal, and says which events it means.
    pub(crate) fn apply(&mut self, change: Change) -> Result<&'static [Told], Illegal> {
        let illegal = |what| Err(Illegal { from: self.status.name(), what });
        match change {
            Change::Started { .. } | Change::StartFailed { .. } if !self.status.can_start() => {
                illegal("started")
            }
            Change::Exited(_) | Change::Lost { .. } if !self.status.is_running() => illegal("ended"),
            Change::Paused if self.status != Status::Running => illegal("paused"),
            Change::Unpaused if self.status != Status::Paused => illegal("unpaused"),
            Change::Removing if !self.status.can_remove() => illegal("removed"),
            Change::RemoveFailed { .. } if self.status != Status::Removing => illegal("given up"),
            Change::Started { pid, at } => {
                let exits = self.exits;
                let finished = self.finished;
                *self = Self {
                    status: Status::Running,
                    pid,
                    started: Some(at),
                    finished,
                    exits,
                    ..Self::created()
                };
                Ok(&[Told::Start])
            }
            Change::StartFailed { exit_code, error } => {
                self.exit_code = exit_code;
                self.error = error;
                Ok(&[])
            }
            Change::Paused => {
                self.status = Status::Paused;
                Ok(&[Told::Pause])
            }
            Change::Unpaused => {
                self.status = Status::Running;
                Ok(&[Told::Unpause])
            }
            Change::Exited(status) => {
                self.ended(i32::from(status.code), UnixNanos::from_u64(status.finished_unix_nanos));
                self.oom_killed = status.oom_killed;
                Ok(if status.oom_killed { &[Told::Oom, Told::Die] } else { &[Told::Die] })
            }
            Change::Lost { reason, at } => {
                self.ended(LOST_EXIT, at);
                self.error = reason;
                Ok(&[Told::Die])
            }
            Change::Removing => {
                self.status = Status::Removing;
                Ok(&[])
            }
            Change::RemoveFailed { error } => {
                self.status = Status::Dead;
                self.error = error;
                Ok(&[])
            }
        }
    }

    fn ended(&mut self, exit_code: i32, at: UnixNanos) {
        self.status = Status::Exited;
        self.pid = 0;
        self.exit_code = exit_code;
        self.finished = Some(at);
        self.exits += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exit(code: u8, oom_killed: bool) -> Change {
        Change::Exited(ExitStatus { code, oom_killed, finished_unix_nanos: 7 })
    }

    fn changes() -> [Change; 8] {
        [
            Change::Started { pid: 1, at: UnixNanos(1) },
            Change::StartFailed { exit_code: 127, error: "no".to_owned() },
            exit(3, false),
            Change::Lost { reason: "gone".to_owned(), at: UnixNanos(2) },
            Change::Removing,
            Change::RemoveFailed { error: "busy".to_owned() },
            Change::Paused,
            Change::Unpaused,
        ]
    }

    #[test]
    fn only_the_arrows_of_the_diagram_are_legal() {
        use Status::*;
        let table = [
            (Created, [Some(Running), Some(Created), None, None, Some(Removing), None, None, None]),
            (Running, [None, None, Some(Exited), Some(Exited), None, None, Some(Paused), None]),
            (Paused, [None, None, Some(Exited), Some(Exited), None, None, None, Some(Running)]),
            (Exited, [Some(Running), Some(Exited), None, None, Some(Removing), None, None, None]),
            (Removing, [None, None, None, None, None, Some(Dead), None, None]),
            (Dead, [None, None, None, None, Some(Removing), None, None, None]),
        ];
        for (from, expected) in table {
            for (change, expected) in changes().into_iter().zip(expected) {
                let mut state = State { status: from, ..State::created() };
                let result = state.apply(change.clone());
                assert_eq!(result.is_ok(), expected.is_some(), "{from:?} {change:?}");
                assert_eq!(state.status, expected.unwrap_or(from), "{from:?} {change:?}");
            }
        }
    }

    #[test]
    fn an_exit_keeps_its_code_until_the_next_start() {
        let mut state = State::created();
        assert_eq!(state.apply(Change::Started { pid: 9, at: UnixNanos(1) }).unwrap(), [Told::Start]);
        assert_eq!(state.apply(exit(137, true)).unwrap(), [Told::Oom, Told::Die]);
        assert_eq!((state.exit_code, state.oom_killed, state.pid, state.exits), (137, true, 0, 1));
        state.apply(Change::Started { pid: 9, at: UnixNanos(1) }).unwrap();
        assert_eq!((state.exit_code, state.oom_killed, state.exits), (0, false, 1));
        state.apply(Change::Lost { reason: "gone".to_owned(), at: UnixNanos(2) }).unwrap();
        assert_eq!((state.exit_code, state.error.as_str()), (255, "gone"));
    }

    proptest! {
        #[test]
        fn a_running_container_has_a_pid_and_no_other_has(steps in proptest::collection::vec(0usize..8, 0..40)) {
            let mut state = State::created();
            for step in steps {
                let _ = state.apply(changes()[step].clone());
                prop_assert_eq!(state.status.is_running(), state.pid != 0);
            }
        }
    }
}
