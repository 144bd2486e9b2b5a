//! The life of a container, in one place.
//!
//! ```text
//!                       paused
//!                   pause ▲│ unpause
//!                         │▼
//!  created ──start──▶ running, paused ──exit, loss──▶ exited ──start──▶ running …
//!     │                 │   ▲                         ▲  │
//!     │      exit, loss │   │ start                   │  │
//!     │                 ▼   │                         │  │
//!     │               restarting ──stop, start fails──┘  │
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
    /// It has ended and will be started again in a moment.
    Restarting,
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
            Self::Restarting => "restarting",
            Self::Exited => "exited",
            Self::Removing => "removing",
            Self::Dead => "dead",
        }
    }

    /// Whether it has processes; a paused one has.
    pub(crate) fn is_running(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }

    /// What Docker's clients call running: it has a process or soon will have one.
    pub(crate) fn is_active(self) -> bool {
        self.is_running() || self == Self::Restarting
    }

    pub(crate) fn can_start(self) -> bool {
        matches!(self, Self::Created | Self::Exited | Self::Restarting)
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
    /// Its processes stand still.
    Paused,
    /// They run on.
    Unpaused,
    /// Its first process has ended, and all its output is delivered. If it `restarts`, another run follows.
    Exited { status: ExitStatus, restarts: bool },
    /// Its sandbox or the knowledge of its end is gone.
    Lost { reason: String, at: UnixNanos, restarts: bool },
    /// Someone wants it to end, or does not want it to be started again.
    StopAsked { by_user: bool },
    /// Someone wants it to run: what was known of earlier stops and restarts does not count any more.
    StartAsked,
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
    Stop,
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
    /// How often its restart policy has started it again since someone started it.
    #[serde(default)]
    pub(crate) restarts: u64,
    /// Someone wants it to end: no restart follows.
    #[serde(default)]
    pub(crate) stop_asked: bool,
    /// Someone stopped it, and has not started it again.
    #[serde(default)]
    pub(crate) stopped_by_user: bool,
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
            restarts: 0,
            stop_asked: false,
            stopped_by_user: false,
        }
    }

    /// Makes a change if it is legal, and says which events it means.
    pub(crate) fn apply(&mut self, change: Change) -> Result<&'static [Told], Illegal> {
        let illegal = |what| Err(Illegal { from: self.status.name(), what });
        match change {
            Change::Started { .. } | Change::StartFailed { .. } if !self.status.can_start() => {
                illegal("started")
            }
            Change::Paused if self.status != Status::Running => illegal("paused"),
            Change::Unpaused if self.status != Status::Paused => illegal("unpaused"),
            Change::Exited { .. } | Change::Lost { .. } if !self.status.is_running() => illegal("ended"),
            Change::StopAsked { .. } if !self.status.is_active() => illegal("stopped"),
            Change::StartAsked if !self.status.can_start() => illegal("started"),
            Change::Removing if !self.status.can_remove() => illegal("removed"),
            Change::RemoveFailed { .. } if self.status != Status::Removing => illegal("given up"),
            Change::Started { pid, at } => {
                *self = Self {
                    status: Status::Running,
                    pid,
                    started: Some(at),
                    finished: self.finished,
                    exits: self.exits,
                    restarts: self.restarts,
                    ..Self::created()
                };
                Ok(&[Told::Start])
            }
            Change::StartFailed { exit_code, error } => {
                if self.status == Status::Restarting {
                    self.status = Status::Exited;
                }
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
            Change::Exited { status, restarts } => {
                self.ended(i32::from(status.code), UnixNanos::from_u64(status.finished_unix_nanos), restarts);
                self.oom_killed = status.oom_killed;
                Ok(match (status.oom_killed, self.stop_asked) {
                    (false, false) => &[Told::Die],
                    (false, true) => &[Told::Die, Told::Stop],
                    (true, false) => &[Told::Oom, Told::Die],
                    (true, true) => &[Told::Oom, Told::Die, Told::Stop],
                })
            }
            Change::Lost { reason, at, restarts } => {
                self.ended(LOST_EXIT, at, restarts);
                self.error = reason;
                Ok(if self.stop_asked { &[Told::Die, Told::Stop] } else { &[Told::Die] })
            }
            Change::StopAsked { by_user } => {
                self.stopped_by_user |= by_user;
                if self.status.is_running() {
                    self.stop_asked = true;
                    return Ok(&[]);
                }
                self.status = Status::Exited;
                Ok(&[Told::Stop])
            }
            Change::StartAsked => {
                self.restarts = 0;
                self.stopped_by_user = false;
                Ok(&[])
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

    fn ended(&mut self, exit_code: i32, at: UnixNanos, restarts: bool) {
        self.status = if restarts { Status::Restarting } else { Status::Exited };
        self.restarts += u64::from(restarts);
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

    fn exit(code: u8, oom_killed: bool, restarts: bool) -> Change {
        Change::Exited { status: ExitStatus { code, oom_killed, finished_unix_nanos: 7 }, restarts }
    }

    fn lost() -> Change {
        Change::Lost { reason: "gone".to_owned(), at: UnixNanos(2), restarts: false }
    }

    fn changes() -> [Change; 11] {
        [
            Change::Started { pid: 1, at: UnixNanos(1) },
            Change::StartFailed { exit_code: 127, error: "no".to_owned() },
            exit(3, false, false),
            exit(3, false, true),
            lost(),
            Change::StopAsked { by_user: true },
            Change::StartAsked,
            Change::Removing,
            Change::RemoveFailed { error: "busy".to_owned() },
            Change::Paused,
            Change::Unpaused,
        ]
    }

    #[test]
    fn only_the_arrows_of_the_diagram_are_legal() {
        use Status::*;
        // Started, start failed, exited, exited to restart, lost, stop asked, start asked, removing, removal failed, paused,
        // unpaused.
        let table = [
            (Created, "running created - - - - created removing - - -"),
            (Running, "- - exited restarting exited running - - - paused -"),
            (Paused, "- - exited restarting exited paused - - - - running"),
            (Restarting, "running exited - - - exited restarting - - - -"),
            (Exited, "running exited - - - - exited removing - - -"),
            (Removing, "- - - - - - - - dead - -"),
            (Dead, "- - - - - - - removing - - -"),
        ];
        for (from, expected) in table {
            for (change, expected) in changes().into_iter().zip(expected.split(' ')) {
                let mut state = State { status: from, ..State::created() };
                let result = state.apply(change.clone());
                assert_eq!(result.is_ok(), expected != "-", "{from:?} {change:?}");
                let expected = if expected == "-" { from.name() } else { expected };
                assert_eq!(state.status.name(), expected, "{from:?} {change:?}");
            }
        }
    }

    #[test]
    fn an_exit_keeps_its_code_until_the_next_start() {
        let mut state = State::created();
        assert_eq!(state.apply(Change::Started { pid: 9, at: UnixNanos(1) }).unwrap(), [Told::Start]);
        assert_eq!(state.apply(exit(137, true, false)).unwrap(), [Told::Oom, Told::Die]);
        assert_eq!((state.exit_code, state.oom_killed, state.pid, state.exits), (137, true, 0, 1));
        state.apply(Change::Started { pid: 9, at: UnixNanos(1) }).unwrap();
        assert_eq!((state.exit_code, state.oom_killed, state.exits), (0, false, 1));
        state.apply(lost()).unwrap();
        assert_eq!((state.exit_code, state.error.as_str()), (255, "gone"));
    }

    #[test]
    fn restarts_are_counted_until_someone_starts_it_by_hand() {
        let started = || Change::Started { pid: 9, at: UnixNanos(1) };
        let mut state = State::created();
        for _ in 0..3 {
            state.apply(started()).unwrap();
            assert_eq!(state.apply(exit(1, false, true)).unwrap(), [Told::Die]);
        }
        assert_eq!((state.restarts, state.status), (3, Status::Restarting));
        assert_eq!(state.apply(Change::StopAsked { by_user: true }).unwrap(), [Told::Stop]);
        assert!(state.stopped_by_user && state.status == Status::Exited);
        state.apply(Change::StartAsked).unwrap();
        assert!(state.restarts == 0 && !state.stopped_by_user);
        state.apply(started()).unwrap();
        assert!(state.apply(Change::StopAsked { by_user: false }).unwrap().is_empty());
        assert_eq!(state.apply(exit(0, false, false)).unwrap(), [Told::Die, Told::Stop]);
        assert!(!state.stopped_by_user);
    }

    proptest! {
        #[test]
        fn a_running_container_has_a_pid_and_no_other_has(steps in proptest::collection::vec(0usize..11, 0..40)) {
            let mut state = State::created();
            for step in steps {
                let _ = state.apply(changes()[step].clone());
                prop_assert_eq!(state.status.is_running(), state.pid != 0);
            }
        }
    }
}
