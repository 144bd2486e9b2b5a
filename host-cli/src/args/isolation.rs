//! Options of `run` and `create` about what a container shares, which devices it may use, and limits beyond the usual ones.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use super::size;

#[derive(Debug, Default, Args)]
pub(crate) struct IsolationOptions {
    /// Give it all capabilities and devices of the VM
    #[arg(long)]
    privileged: bool,
    /// Give it a device of the VM
    #[arg(long, value_name = "DEVICE[:PATH][:rwm]")]
    device: Vec<String>,
    /// Let it use devices, for example `c 10:* rwm`
    #[arg(long, value_name = "RULE")]
    device_cgroup_rule: Vec<String>,
    /// Set parameters of its namespaces
    #[arg(long, value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
    /// Shared memory: private, shareable, none, host or container:NAME
    #[arg(long, value_name = "MODE")]
    ipc: Option<String>,
    /// Processes that it sees: host or container:NAME
    #[arg(long, value_name = "MODE")]
    pid: Option<String>,
    /// Host name: host is the VM's
    #[arg(long, value_name = "MODE")]
    uts: Option<String>,
    /// User namespace: host
    #[arg(long, value_name = "MODE")]
    userns: Option<String>,
    /// Cgroups that it sees: private or host
    #[arg(long, value_name = "MODE")]
    cgroupns: Option<String>,
    /// Cgroup that its own is made in
    #[arg(long, value_name = "PATH")]
    cgroup_parent: Option<String>,
    /// Annotations, KEY=VALUE
    #[arg(long, value_name = "KEY=VALUE")]
    annotation: Vec<String>,
    /// Its runtime
    #[arg(long, value_name = "NAME")]
    runtime: Option<String>,
    /// How readily the kernel ends it for want of memory, -1000 to 1000
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    oom_score_adj: Option<i64>,
    /// The memory nodes that it may use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Microseconds in which --cpu-quota counts
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_period: Option<i64>,
    /// Microseconds of processor time in each period
    #[arg(long, value_name = "MICROSECONDS", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// Weight of its block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Most bytes a second read from a device
    #[arg(long, value_name = "DEVICE:SIZE")]
    device_read_bps: Vec<String>,
    /// Most bytes a second written to a device
    #[arg(long, value_name = "DEVICE:SIZE")]
    device_write_bps: Vec<String>,
    /// Most reads a second from a device
    #[arg(long, value_name = "DEVICE:NUMBER")]
    device_read_iops: Vec<String>,
    /// Most writes a second to a device
    #[arg(long, value_name = "DEVICE:NUMBER")]
    device_write_iops: Vec<String>,
}

/// The part of a create request's `HostConfig` that these options make.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Isolation {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    privileged: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<Device>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    device_cgroup_rules: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    sysctls: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ipc_mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid_mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", rename = "UTSMode")]
    uts_mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    userns_mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroupns_mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup_parent: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    runtime: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    oom_score_adj: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpuset_mems: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_period: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_quota: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blkio_weight: Option<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    blkio_device_read_bps: Vec<Rate>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    blkio_device_write_bps: Vec<Rate>,
    #[serde(skip_serializing_if = "Vec::is_empty", rename = "BlkioDeviceReadIOps")]
    blkio_device_read_iops: Vec<Rate>,
    #[serde(skip_serializing_if = "Vec::is_empty", rename = "BlkioDeviceWriteIOps")]
    blkio_device_write_iops: Vec<Rate>,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Device {
    path_on_host: String,
    path_in_container: String,
    cgroup_permissions: String,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Rate {
    path: String,
    rate: u64,
}

impl IsolationOptions {
    /// The request's part.
    pub(crate) fn body(&self) -> Result<Isolation> {
        let bytes = |texts: &[String]| texts.iter().map(|text| rate(text, size)).collect::<Result<_>>();
        let operations = |texts: &[String]| {
            let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
            texts.iter().map(|text| rate(text, number)).collect::<Result<_>>()
        };
        Ok(Isolation {
            privileged: self.privileged,
            devices: self.device.iter().map(|text| device(text)).collect::<Result<_>>()?,
            device_cgroup_rules: self.device_cgroup_rule.clone(),
            sysctls: pairs(&self.sysctl),
            ipc_mode: self.ipc.clone(),
            pid_mode: self.pid.clone(),
            uts_mode: self.uts.clone(),
            userns_mode: self.userns.clone(),
            cgroupns_mode: self.cgroupns.clone(),
            cgroup_parent: self.cgroup_parent.clone(),
            annotations: pairs(&self.annotation),
            runtime: self.runtime.clone(),
            oom_score_adj: self.oom_score_adj,
            cpuset_mems: self.cpuset_mems.clone(),
            cpu_period: self.cpu_period,
            cpu_quota: self.cpu_quota,
            blkio_weight: self.blkio_weight,
            blkio_device_read_bps: bytes(&self.device_read_bps)?,
            blkio_device_write_bps: bytes(&self.device_write_bps)?,
            blkio_device_read_iops: operations(&self.device_read_iops)?,
            blkio_device_write_iops: operations(&self.device_write_iops)?,
        })
    }
}

/// `--security-opt` as the daemon takes it: a seccomp profile is sent whole.
pub(crate) fn security_option(text: &str) -> Result<String> {
    let profile = text.strip_prefix("seccomp=").or_else(|| text.strip_prefix("seccomp:"));
    match profile {
        None | Some("unconfined" | "builtin") => Ok(text.to_owned()),
        Some(file) => {
            let profile = std::fs::read_to_string(file)
                .with_context(|| format!("opening seccomp profile ({file}) failed"))?;
            let profile: serde_json::Value = serde_json::from_str(&profile)
                .with_context(|| format!("compacting json for seccomp profile ({file}) failed"))?;
            Ok(format!("seccomp={profile}"))
        }
    }
}

fn pairs(texts: &[String]) -> BTreeMap<String, String> {
    let pair = |text: &String| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        (key.to_owned(), value.to_owned())
    };
    texts.iter().map(pair).collect()
}

/// `/dev/x`, `/dev/x:/dev/y`, `/dev/x:rw`, `/dev/x:/dev/y:rw`.
fn device(text: &str) -> Result<Device> {
    let is_access = |text: &str| !text.is_empty() && text.chars().all(|letter| "rwm".contains(letter));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, path, access) = match parts.as_slice() {
        [source] => (source, source, "rwm"),
        [source, access] if is_access(access) => (source, source, *access),
        [source, path] => (source, path, "rwm"),
        [source, path, access] if is_access(access) => (source, path, *access),
        _ => bail!("bad format for device: {text}, expected DEVICE[:PATH][:rwm]"),
    };
    let (path_on_host, path_in_container) = ((*source).to_owned(), (*path).to_owned());
    Ok(Device { path_on_host, path_in_container, cgroup_permissions: access.to_owned() })
}

fn rate(text: &str, parse: impl Fn(&str) -> Result<u64, String>) -> Result<Rate> {
    let (path, value) =
        text.split_once(':').with_context(|| format!("bad format: {text}, expected DEVICE:RATE"))?;
    let rate = parse(value)
        .map_err(anyhow::Error::msg)
        .with_context(|| format!("invalid rate for device: {text}"))?;
    Ok(Rate { path: path.to_owned(), rate })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Options {
        #[command(flatten)]
        isolation: IsolationOptions,
    }

    #[test]
    fn options_become_dockers_fields() {
        let words = "run --privileged --device /dev/fuse:rw --device /dev/kmsg:/dev/log:r --sysctl net.core.somaxconn=9 --ipc host \
                     --uts host --annotation a=b --oom-score-adj -5 --device-read-bps /dev/vda:1m --device-write-iops /dev/vda:7";
        let made = Options::try_parse_from(words.split_whitespace()).unwrap().isolation.body().unwrap();
        let json = serde_json::to_value(&made).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "Privileged": true,
                "Devices": [
                    { "PathOnHost": "/dev/fuse", "PathInContainer": "/dev/fuse", "CgroupPermissions": "rw" },
                    { "PathOnHost": "/dev/kmsg", "PathInContainer": "/dev/log", "CgroupPermissions": "r" },
                ],
                "Sysctls": { "net.core.somaxconn": "9" },
                "IpcMode": "host",
                "UTSMode": "host",
                "Annotations": { "a": "b" },
                "OomScoreAdj": -5,
                "BlkioDeviceReadBps": [{ "Path": "/dev/vda", "Rate": 1048576 }],
                "BlkioDeviceWriteIOps": [{ "Path": "/dev/vda", "Rate": 7 }],
            })
        );
        assert!(device("/dev/x:/dev/y:z").is_err() && device("a:b:c:d").is_err());
    }

    #[test]
    fn a_seccomp_profile_is_sent_whole() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("profile.json");
        std::fs::write(&file, "{\n  \"defaultAction\": \"SCMP_ACT_ALLOW\"\n}\n").unwrap();
        let sent = security_option(&format!("seccomp={}", file.display())).unwrap();
        assert_eq!(sent, r#"seccomp={"defaultAction":"SCMP_ACT_ALLOW"}"#);
        assert_eq!(security_option("seccomp=unconfined").unwrap(), "seccomp=unconfined");
        assert!(
            security_option("seccomp=/no/such").unwrap_err().to_string().contains("opening seccomp profile")
        );
    }
}
