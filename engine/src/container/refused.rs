//! Options that Docker knows and Coracle does not have yet: each is refused by name unless it has its default value.
//!
//! Nothing that a client asks for is silently ignored, except members that Docker itself does not know.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A member of a request and what people call it. Harmless is all that a Go client sends for "not set".
struct Refused {
    member: &'static str,
    option: &'static str,
}

const fn no(member: &'static str, option: &'static str) -> Refused {
    Refused { member, option }
}

const CONFIG: &[Refused] =
    &[no("ArgsEscaped", "ArgsEscaped"), no("OnBuild", "ONBUILD"), no("Shell", "SHELL")];

const HOST_CONFIG: &[Refused] = &[
    no("Cgroup", "Cgroup"),
    no("CpuCount", "--cpu-count"),
    no("CpuPercent", "--cpu-percent"),
    no("CpuRealtimePeriod", "--cpu-rt-period"),
    no("CpuRealtimeRuntime", "--cpu-rt-runtime"),
    no("DeviceRequests", "--gpus"),
    no("IOMaximumBandwidth", "--io-maxbandwidth"),
    no("IOMaximumIOps", "--io-maxiops"),
    no("StorageOpt", "--storage-opt"),
];

const EXEC: &[Refused] = &[];

/// Refuses what cannot be given of a `Config`.
pub(super) fn check_config(members: &Map<String, Value>) -> Result<()> {
    check(members, CONFIG, "")
}

/// Refuses what cannot be given of a `HostConfig`.
pub(super) fn check_host_config(members: &Map<String, Value>) -> Result<()> {
    check(members, HOST_CONFIG, "HostConfig.")
}

/// What an update may name: limits that a container's cgroup has.
const UPDATE: &[&str] = &[
    "BlkioDeviceReadBps",
    "BlkioDeviceReadIOps",
    "BlkioDeviceWriteBps",
    "BlkioDeviceWriteIOps",
    "BlkioWeight",
    "CpuPeriod",
    "CpuQuota",
    "CpuShares",
    "CpusetCpus",
    "CpusetMems",
    "KernelMemory",
    "KernelMemoryTCP",
    "Memory",
    "MemoryReservation",
    "MemorySwap",
    "MemorySwappiness",
    "NanoCpus",
    "OomKillDisable",
    "PidsLimit",
];

/// Refuses what a container keeps for life.
pub(crate) fn check_update(members: &Map<String, Value>) -> Result<()> {
    let fixed = |(member, value): &(&String, &Value)| !is_empty(value) && !UPDATE.contains(&member.as_str());
    match members.iter().find(fixed) {
        Some((member, _)) => Err(missing("changing this of a container", member)),
        None => Ok(()),
    }
}

/// Refuses what cannot be given of an exec's configuration.
pub(crate) fn check_exec(members: &Map<String, Value>) -> Result<()> {
    check(members, EXEC, "")
}

/// The error for an option that is not there yet.
pub(super) fn missing(option: &str, member: &str) -> Error {
    let shown: String = option.chars().take(120).collect();
    Error::unsupported(format!("{shown} ({member}) is not supported by Coracle yet: leave it out"))
}

fn check(members: &Map<String, Value>, table: &[Refused], prefix: &str) -> Result<()> {
    for Refused { member, option } in table {
        if members.get(*member).is_some_and(|value| !is_empty(value)) {
            return Err(missing(option, &format!("{prefix}{member}")));
        }
    }
    Ok(())
}

/// Whether a value is what a Go client sends for "not set".
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(json: &str) -> Map<String, Value> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn defaults_are_accepted_and_everything_else_is_refused_by_name() {
        let defaults = r#"{"Binds":null,"PortBindings":{}}"#;
        assert!(check_host_config(&object(defaults)).is_ok());
        for (json, option) in
            [(r#"{"StorageOpt":{"size":"1g"}}"#, "--storage-opt"), (r#"{"CpuCount":7}"#, "--cpu-count")]
        {
            let error = check_host_config(&object(json)).unwrap_err();
            assert_eq!(error.status(), 501);
            assert!(error.to_string().starts_with(option), "{error}");
        }
    }

    #[test]
    fn every_member_that_docker_knows_is_supported_or_refused() {
        use bollard_stubs::models;
        let known = |json: Value| json.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let ours = known(
            serde_json::to_value(super::super::config::HostConfig {
                init: Some(true),
                annotations: [(String::new(), String::new())].into(),
                ..Default::default()
            })
            .unwrap(),
        );
        // Every member of the model that has a value by default is one that its type gives; the others are listed from
        // the model's own field names.
        let text = format!("{:?}", models::HostConfig::default());
        // Read, and told as discarded.
        let discarded = ["KernelMemory", "KernelMemoryTCP"];
        let refused: Vec<String> =
            HOST_CONFIG.iter().map(|r| r.member).chain(discarded).map(str::to_owned).collect();
        let squeeze = |name: &str| name.replace('_', "").to_lowercase();
        let covered: Vec<String> = ours.iter().chain(&refused).map(|name| squeeze(name)).collect();
        let mut fields = 0;
        for field in
            text.split(['{', ',']).filter_map(|part| part.split_once(':')).map(|(name, _)| name.trim())
        {
            fields += 1;
            assert!(covered.contains(&squeeze(field)), "HostConfig.{field} is neither supported nor refused");
        }
        assert!(fields > 50, "the model's fields were not found: {text}");
    }
}
