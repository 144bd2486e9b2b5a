//! When a container that has ended is started again: Docker's restart policies and their back-off.
//!
//! Nothing here waits or starts anything; a container's task asks, and acts.

use std::time::Duration;

use super::{config::RestartPolicy, state::State};
use crate::error::{Error, Result};

/// The pause before the first restart; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A run that lasted as long as this was no failure: the next pause is the first one again.
const GOOD_RUN: Duration = Duration::from_secs(10);

/// A policy as Docker names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    No,
    Always,
    UnlessStopped,
    /// With the most restarts in a row; 0 is any number.
    OnFailure(u64),
}

impl Policy {
    /// Reads and checks what a client sent.
    pub(crate) fn parse(given: &RestartPolicy) -> Result<Self> {
        let RestartPolicy { name, maximum_retry_count: most } = given;
        let policy = match name.as_str() {
            // Any count, as clients before API 1.44 sent one.
            "" => return Ok(Self::No),
            "on-failure" => {
                return u64::try_from(*most).map(Self::OnFailure).map_err(|_| {
                    Error::invalid("invalid restart policy: maximum retry count cannot be negative")
                });
            }
            "no" => Self::No,
            "always" => Self::Always,
            "unless-stopped" => Self::UnlessStopped,
            other => {
                let shown: String = other.chars().take(40).collect();
                return Err(Error::invalid(format!(
                    "invalid restart policy: unknown policy '{shown}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"
                )));
            }
        };
        if *most == 0 {
            return Ok(policy);
        }
        let negative = if *most < 0 { " and cannot be negative" } else { "" };
        Err(Error::invalid(format!(
            "invalid restart policy: maximum retry count can only be used with 'on-failure'{negative}"
        )))
    }

    /// The policy of a record, which was checked when it was made.
    pub(crate) fn of(known: &RestartPolicy) -> Self {
        Self::parse(known).unwrap_or(Self::No)
    }

    /// Whether a run that ended with this code, after so many restarts and not because someone asked, is followed by another.
    pub(crate) fn restarts(self, exit_code: i32, restarts: u64) -> bool {
        match self {
            Self::No => false,
            Self::Always | Self::UnlessStopped => true,
            Self::OnFailure(most) => exit_code != 0 && (most == 0 || restarts < most),
        }
    }

    /// Whether a container that had ended before is started when the daemon comes up. As Docker's documentation has it,
    /// `on-failure` is about exits and not about daemons.
    pub(crate) fn starts_with_daemon(self, state: &State) -> bool {
        // One that was created and never started waits for its first start.
        state.started.is_some()
            && match self {
                Self::No | Self::OnFailure(_) => false,
                Self::Always => true,
                Self::UnlessStopped => !state.stopped_by_user,
            }
    }
}

/// How long to wait before the next restart.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    last: Option<Duration>,
}

impl Backoff {
    /// The pause after a run of this length.
    pub(crate) fn after(&mut self, run: Duration) -> Duration {
        let pause = match self.last.filter(|_| run < GOOD_RUN) {
            None => FIRST_PAUSE,
            Some(last) => last.saturating_mul(2).min(LONGEST_PAUSE),
        };
        self.last = Some(pause);
        pause
    }

    /// Someone started it by hand.
    pub(crate) fn reset(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str, most: i64) -> Result<Policy> {
        Policy::parse(&RestartPolicy { name: name.to_owned(), maximum_retry_count: most })
    }

    #[test]
    fn policies_are_read_with_dockers_rules() {
        assert_eq!(policy("", 5).unwrap(), Policy::No);
        assert_eq!(policy("on-failure", 3).unwrap(), Policy::OnFailure(3));
        assert_eq!(policy("unless-stopped", 0).unwrap(), Policy::UnlessStopped);
        for (name, most, words) in [
            ("always", 1, "can only be used with 'on-failure'"),
            ("no", -1, "and cannot be negative"),
            ("on-failure", -1, "maximum retry count cannot be negative"),
            ("sometimes", 0, "unknown policy 'sometimes'"),
        ] {
            let error = policy(name, most).unwrap_err();
            assert!(error.status() == 400 && error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn failures_are_counted_and_successes_end_on_failure() {
        for (policy, code, restarts, again) in [
            (Policy::No, 1, 0, false),
            (Policy::Always, 0, 1000, true),
            (Policy::UnlessStopped, 0, 0, true),
            (Policy::OnFailure(0), 0, 0, false),
            (Policy::OnFailure(0), 1, 1000, true),
            (Policy::OnFailure(2), 1, 1, true),
            (Policy::OnFailure(2), 1, 2, false),
        ] {
            assert_eq!(policy.restarts(code, restarts), again, "{policy:?} {code} {restarts}");
        }
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_begin_anew_after_a_good_run() {
        let mut backoff = Backoff::default();
        let short = Duration::from_millis(9_999);
        let pauses: Vec<u128> = (0..12).map(|_| backoff.after(short).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 51_200, 60_000, 60_000]);
        assert_eq!(backoff.after(GOOD_RUN), FIRST_PAUSE);
        backoff.after(short);
        backoff.reset();
        assert_eq!(backoff.after(short), FIRST_PAUSE);
    }
}
