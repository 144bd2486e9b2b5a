//! Which log a container has: Docker's log drivers and their options.
//!
//! Logs are bounded unless a client wants otherwise, since a container that writes without end must not fill the disk.

use std::collections::BTreeMap;

use super::{
    config::{Config, LogConfig, env_name},
    refused,
};
use crate::{
    error::{Error, Result},
    logs::Limits,
};

/// What a json-file log may take if nothing is said: four files of 64 MiB. (Docker's has no bound; `max-size=-1` asks for that.)
const DEFAULT: Limits = Limits { max_size: Some(64 << 20), max_file: 4 };
/// Docker's bounds for its `local` driver.
const LOCAL: Limits = Limits { max_size: Some(20 << 20), max_file: 5 };
/// Drivers that Docker has and that send logs elsewhere.
const ELSEWHERE: [&str; 8] =
    ["syslog", "journald", "gelf", "fluentd", "awslogs", "splunk", "gcplogs", "etwlogs"];

/// Which log a container has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogKind {
    /// Docker's json-file format, whose path clients are told.
    JsonFile(Limits),
    /// The same, in a place of our own.
    Local(Limits),
    /// Output is kept nowhere.
    None,
}

/// Reads a log configuration.
pub(crate) fn check(log: &LogConfig) -> Result<LogKind> {
    match log.driver.as_str() {
        "" | "json-file" => limits(log, "json-file", DEFAULT).map(LogKind::JsonFile),
        "local" => limits(log, "local", LOCAL).map(LogKind::Local),
        "none" => Ok(LogKind::None),
        other if ELSEWHERE.contains(&other) => {
            Err(refused::missing(&format!("--log-driver {other}"), "HostConfig.LogConfig.Type"))
        }
        other => {
            let shown: String = other.chars().take(60).collect();
            Err(Error::invalid(format!("logger: no log driver named '{shown}' is registered")))
        }
    }
}

fn limits(log: &LogConfig, driver: &str, defaults: Limits) -> Result<Limits> {
    let mut limits = defaults;
    // As in Docker, whoever says how large a json-file may become gets one unless they say how many.
    if driver == "json-file" && log.config.contains_key("max-size") {
        limits.max_file = 1;
    }
    for (name, value) in &log.config {
        match name.as_str() {
            "max-size" if value == "-1" && driver == "json-file" => limits.max_size = None,
            "max-size" => {
                let given = size(value).filter(|size| *size > 0);
                limits.max_size = Some(given.ok_or_else(|| {
                    Error::invalid(format!(
                        "invalid value for max-size: {value}, expected a size such as 10m"
                    ))
                })?);
            }
            "max-file" => {
                let given = value.parse().ok().filter(|count| (1..=1000).contains(count));
                limits.max_file = given.ok_or_else(|| {
                    Error::invalid(format!(
                        "invalid value for max-file: {value}, expected a number from 1 to 1000"
                    ))
                })?;
            }
            "compress" if value == "false" => {}
            "labels" | "env" if driver == "json-file" => {}
            "compress" | "labels-regex" | "env-regex" | "tag" | "mode" | "max-buffer-size" => {
                return Err(refused::missing(&format!("--log-opt {name}"), "HostConfig.LogConfig.Config"));
            }
            other => {
                let shown: String = other.chars().take(60).collect();
                return Err(Error::invalid(format!("unknown log opt '{shown}' for {driver} log driver")));
            }
        }
    }
    Ok(limits)
}

/// What is noted with each line: the labels and variables that the options name.
pub(crate) fn attributes(log: &LogConfig, config: &Config) -> BTreeMap<String, String> {
    let named = |option: &str| -> Vec<&str> {
        log.config.get(option).into_iter().flat_map(|names| names.split(',')).map(str::trim).collect()
    };
    let mut attributes = BTreeMap::new();
    for label in named("labels") {
        if let Some(value) = config.labels.get(label) {
            attributes.insert(label.to_owned(), value.clone());
        }
    }
    for name in named("env") {
        let known = config.env.iter().rev().find(|variable| env_name(variable) == name);
        if let Some((_, value)) = known.and_then(|variable| variable.split_once('=')) {
            attributes.insert(name.to_owned(), value.to_owned());
        }
    }
    attributes
}

/// Reads `10m`, `1g`, `512` (bytes, powers of 1024).
fn size(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let lower = lower.strip_suffix('i').unwrap_or(lower);
    let (digits, shift) = match lower.chars().last()? {
        'k' => (&lower[..lower.len() - 1], 10),
        'm' => (&lower[..lower.len() - 1], 20),
        'g' => (&lower[..lower.len() - 1], 30),
        't' => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(driver: &str, options: &[(&str, &str)]) -> LogConfig {
        let config = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        LogConfig { driver: driver.to_owned(), config }
    }

    #[test]
    fn options_are_read_and_a_log_has_a_bound_unless_told_otherwise() {
        let file = |max_size, max_file| LogKind::JsonFile(Limits { max_size, max_file });
        for (given, kind) in [
            (log("", &[]), LogKind::JsonFile(DEFAULT)),
            (log("json-file", &[("max-size", "10m"), ("max-file", "3")]), file(Some(10 << 20), 3)),
            (log("json-file", &[("max-size", "1k")]), file(Some(1024), 1)),
            (log("json-file", &[("max-size", "-1")]), file(None, 1)),
            (log("json-file", &[("max-file", "7")]), file(Some(64 << 20), 7)),
            (log("local", &[]), LogKind::Local(LOCAL)),
            (log("none", &[]), LogKind::None),
        ] {
            assert_eq!(check(&given).unwrap(), kind, "{given:?}");
        }
        for (given, status) in [
            (log("json-file", &[("max-size", "big")]), 400),
            (log("json-file", &[("max-file", "0")]), 400),
            (log("json-file", &[("color", "red")]), 400),
            (log("json-file", &[("compress", "true")]), 501),
            (log("local", &[("max-size", "-1")]), 400),
            (log("syslog", &[]), 501),
            (log("asdf", &[]), 400),
        ] {
            assert_eq!(check(&given).unwrap_err().status(), status, "{given:?}");
        }
    }

    #[test]
    fn labels_and_variables_are_noted_with_each_line() {
        let config: Config =
            serde_json::from_str(r#"{"Labels":{"tier":"front","x":"y"},"Env":["A=1","B=2","A=3"]}"#).unwrap();
        let log = log("json-file", &[("labels", "tier,none"), ("env", "A")]);
        let expected = [("A", "3"), ("tier", "front")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(attributes(&log, &config), BTreeMap::from(expected));
    }
}
