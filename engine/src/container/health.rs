//! Health checks: what an image or a client asks for, and what the probes so far say of a container's health.
//!
//! Nothing here runs a probe or waits for one ([`crate::exec::probe`] does); the rules are Docker's.

use std::{collections::VecDeque, time::Duration};

use coracle_image_store::config::ContainerConfig as ImageConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    time::UnixNanos,
};

/// How many results are kept.
const KEPT: usize = 5;
/// The shortest time that makes sense, as in Docker.
const SHORTEST: i64 = 1_000_000;

/// Docker's `HealthConfig`: nanoseconds, and 0 for "not set".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct Healthcheck {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) test: Vec<String>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) interval: i64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) timeout: i64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) start_period: i64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) start_interval: i64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) retries: i64,
}

fn is_zero(value: &i64) -> bool {
    *value == 0
}

impl Healthcheck {
    /// What an image declares; nothing if that makes no sense.
    pub(crate) fn of_image(image: &ImageConfig) -> Option<Self> {
        let declared = image.healthcheck.as_ref().filter(|value| !value.is_null())?;
        serde_json::from_value(declared.clone()).ok().filter(|check: &Self| check.check().is_ok())
    }

    /// Takes from the image's what is not set here.
    pub(crate) fn fill(&mut self, image: &Self) {
        if self.test.is_empty() {
            self.test.clone_from(&image.test);
        }
        for (own, images) in [
            (&mut self.interval, image.interval),
            (&mut self.timeout, image.timeout),
            (&mut self.start_period, image.start_period),
            (&mut self.start_interval, image.start_interval),
            (&mut self.retries, image.retries),
        ] {
            if *own == 0 {
                *own = images;
            }
        }
    }

    /// Refuses numbers that make no sense, in Docker's words.
    pub(crate) fn check(&self) -> Result<()> {
        let times = [
            ("Interval", self.interval),
            ("Timeout", self.timeout),
            ("StartPeriod", self.start_period),
            ("StartInterval", self.start_interval),
        ];
        if let Some((name, _)) = times.into_iter().find(|(_, time)| *time != 0 && *time < SHORTEST) {
            return Err(Error::invalid(format!("{name} in Healthcheck cannot be less than 1ms")));
        }
        if self.retries < 0 {
            return Err(Error::invalid("Retries in Healthcheck cannot be negative"));
        }
        match self.test.first().map(String::as_str) {
            None | Some("" | "NONE" | "CMD" | "CMD-SHELL") => Ok(()),
            Some(other) => {
                let shown: String = other.chars().take(40).collect();
                Err(Error::invalid(format!("Unknown probe type '{shown}' in Healthcheck (expected 'CMD')")))
            }
        }
    }

    /// What to run as a probe; `None` if there is nothing to probe.
    pub(crate) fn command(&self) -> Option<Vec<String>> {
        let (kind, rest) = self.test.split_first()?;
        match kind.as_str() {
            "CMD" => Some(rest.to_vec()),
            "CMD-SHELL" => {
                let shell = ["/bin/sh", "-c"].map(str::to_owned);
                Some(shell.into_iter().chain(rest.first().cloned()).collect())
            }
            _ => None,
        }
    }

    fn time(value: i64, default: Duration) -> Duration {
        u64::try_from(value).ok().filter(|nanos| *nanos > 0).map_or(default, Duration::from_nanos)
    }

    /// How long a probe may take.
    pub(crate) fn timeout(&self) -> Duration {
        Self::time(self.timeout, Duration::from_secs(30))
    }

    /// How long to wait before the next probe of a container that has run for so long.
    pub(crate) fn pause(&self, running: Duration, status: HealthStatus) -> Duration {
        let starting = status == HealthStatus::Starting && running < self.start_period();
        if starting {
            Self::time(self.start_interval, Duration::from_secs(5))
        } else {
            Self::time(self.interval, Duration::from_secs(30))
        }
    }

    fn start_period(&self) -> Duration {
        Self::time(self.start_period, Duration::ZERO)
    }

    fn retries(&self) -> u64 {
        u64::try_from(self.retries).ok().filter(|retries| *retries > 0).unwrap_or(3)
    }
}

/// What is known of a container's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HealthStatus {
    Starting,
    Healthy,
    Unhealthy,
}

impl HealthStatus {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// What came of a probe.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) start: UnixNanos,
    pub(crate) end: UnixNanos,
    /// -1 if it could not be run or took too long.
    pub(crate) exit_code: i32,
    pub(crate) output: String,
}

/// A container's health, from its probes.
#[derive(Debug, Clone)]
pub(crate) struct Health {
    pub(crate) status: HealthStatus,
    failing_streak: u64,
    log: VecDeque<Outcome>,
}

impl Health {
    /// Of a container that starts; results of an earlier run stay to be read.
    pub(crate) fn starting(earlier: Option<Self>) -> Self {
        let log = earlier.map(|health| health.log).unwrap_or_default();
        Self { status: HealthStatus::Starting, failing_streak: 0, log }
    }

    /// Takes a result in; `true` if the status changed.
    pub(crate) fn take(&mut self, check: &Healthcheck, started: UnixNanos, outcome: Outcome) -> bool {
        let before = self.status;
        let running = u64::try_from(outcome.start.0.saturating_sub(started.0)).unwrap_or(0);
        let forgiven =
            self.status == HealthStatus::Starting && Duration::from_nanos(running) < check.start_period();
        if outcome.exit_code == 0 {
            self.failing_streak = 0;
            self.status = HealthStatus::Healthy;
        } else if !forgiven {
            self.failing_streak += 1;
            if self.failing_streak >= check.retries() {
                self.status = HealthStatus::Unhealthy;
            }
        }
        if self.log.len() == KEPT {
            self.log.pop_front();
        }
        self.log.push_back(outcome);
        self.status != before
    }

    /// As `inspect` shows it.
    pub(crate) fn describe(&self) -> Value {
        let result = |outcome: &Outcome| {
            json!({
                "Start": outcome.start.rfc3339(),
                "End": outcome.end.rfc3339(),
                "ExitCode": outcome.exit_code,
                "Output": outcome.output,
            })
        };
        json!({
            "Status": self.status.name(),
            "FailingStreak": self.failing_streak,
            "Log": self.log.iter().map(result).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn check(json: &str) -> Healthcheck {
        serde_json::from_str(json).unwrap()
    }

    fn outcome(at: i64, exit_code: i32) -> Outcome {
        let at = UnixNanos(at * SECOND);
        Outcome { start: at, end: at, exit_code, output: String::new() }
    }

    #[test]
    fn failures_count_after_the_start_period_and_one_success_ends_it() {
        let check = check(r#"{"Test":["CMD","x"],"StartPeriod":10000000000,"Retries":2}"#);
        let mut health = Health::starting(None);
        for at in 0..9 {
            assert!(!health.take(&check, UnixNanos(0), outcome(at, 1)));
        }
        assert_eq!((health.status, health.failing_streak), (HealthStatus::Starting, 0));
        assert!(!health.take(&check, UnixNanos(0), outcome(10, 1)));
        assert!(health.take(&check, UnixNanos(0), outcome(11, -1)));
        assert_eq!(health.status, HealthStatus::Unhealthy);
        assert!(health.take(&check, UnixNanos(0), outcome(12, 0)));
        assert_eq!(health.describe()["Log"].as_array().unwrap().len(), KEPT);

        let mut health = Health::starting(Some(health));
        assert!(health.take(&check, UnixNanos(0), outcome(1, 0)));
        assert!(!health.take(&check, UnixNanos(0), outcome(2, 1)));
        assert!(
            health.take(&check, UnixNanos(0), outcome(3, 1)),
            "the start period is over with the first success"
        );
    }

    #[test]
    fn pauses_are_shorter_while_it_starts() {
        let check = check(r#"{"Test":["CMD","x"],"StartPeriod":10000000000,"StartInterval":1000000000}"#);
        for (running, status, pause) in
            [(3, HealthStatus::Starting, 1), (3, HealthStatus::Healthy, 30), (11, HealthStatus::Starting, 30)]
        {
            assert_eq!(check.pause(Duration::from_secs(running), status), Duration::from_secs(pause));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            r#"{"Interval":1}"#,
            r#"{"Timeout":-5}"#,
            r#"{"StartPeriod":999999}"#,
            r#"{"StartInterval":7}"#,
            r#"{"Retries":-1}"#,
            r#"{"Test":["GUESS","x"]}"#,
        ] {
            assert_eq!(check(bad).check().unwrap_err().status(), 400, "{bad}");
        }
        assert!(check(r#"{"Test":["NONE"]}"#).command().is_none());
        assert_eq!(check(r#"{"Test":["CMD-SHELL","a b"]}"#).command().unwrap(), ["/bin/sh", "-c", "a b"]);
    }

    #[test]
    fn the_client_wins_over_the_image() {
        let mut own = check(r#"{"Interval":2000000000}"#);
        own.fill(&check(r#"{"Test":["CMD","x"],"Interval":5000000000,"Retries":4}"#));
        assert_eq!(own, check(r#"{"Test":["CMD","x"],"Interval":2000000000,"Retries":4}"#));
    }
}
