//! Limits as files of a cgroup: which value goes into which file. A limit whose controller is missing is refused by name; the
//! absence of one is not.

use std::collections::HashSet;
use std::path::PathBuf;

use coracle_agent_api::{ApiError, ErrorKind, IoLimitKind, Resources};
use rustix::fs::FileType;

use crate::error::{AtStep, Result, invalid};

/// A value for a file of a group.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct File {
    pub name: &'static str,
    pub value: String,
}

/// What limits there can be.
pub(super) struct Limits {
    /// The controllers that groups of containers have.
    pub controllers: HashSet<String>,
    /// The mounted file system.
    pub root: PathBuf,
    /// The most processes of one container, where all of them together are limited.
    pub processes: Option<u64>,
}

/// `u64::MAX` is no limit.
fn amount(value: u64) -> String {
    if value == u64::MAX { "max".to_owned() } else { value.to_string() }
}

impl Limits {
    /// The files that give a group these limits.
    pub(super) fn files(&self, resources: &Resources) -> Result<Vec<File>> {
        let mut files = Vec::new();
        let mut limit = |controller: &str, name, value: Option<String>| -> Result<(), ApiError> {
            let Some(value) = value else { return Ok(()) };
            if self.controllers.contains(controller) {
                files.push(File { name, value });
            } else if value != "max" {
                let message =
                    format!("{name} cannot be set: there is no cgroup controller `{controller}` here");
                return Err(ApiError::new(ErrorKind::Unsupported, message));
            }
            Ok(())
        };
        limit("memory", "memory.max", resources.memory.map(amount))?;
        limit("memory", "memory.low", resources.memory_reservation.map(amount))?;
        limit("memory", "memory.swap.max", resources.memory_swap.map(amount))?;
        limit("cpu", "cpu.max", cpu_max(resources)?)?;
        let weight = resources.cpu_shares.map(cpu_weight).transpose()?;
        limit("cpu", "cpu.weight", weight.map(|weight| weight.to_string()))?;
        limit("cpuset", "cpuset.cpus", resources.cpuset_cpus.clone())?;
        limit("cpuset", "cpuset.mems", resources.cpuset_mems.clone())?;
        let pids = match (resources.pids, self.processes) {
            (Some(pids), Some(most)) => Some(pids.min(most)),
            (pids, most) => pids.or(most),
        };
        limit("pids", "pids.max", pids.map(amount))?;
        if resources.io_weight.is_some() || !resources.io_device_weights.is_empty() {
            self.share_io();
        }
        let weight = resources.io_weight.map(io_weight).transpose()?;
        limit("io", "io.weight", weight.map(|weight| format!("default {weight}")))?;
        for device in &resources.io_device_weights {
            let (major, minor) = block_device(&device.path)?;
            limit("io", "io.weight", Some(format!("{major}:{minor} {}", io_weight(device.weight)?)))?;
        }
        for device in &resources.io_limits {
            let (major, minor) = block_device(&device.path)?;
            let what = match device.what {
                IoLimitKind::ReadBytes => "rbps",
                IoLimitKind::WriteBytes => "wbps",
                IoLimitKind::ReadOperations => "riops",
                IoLimitKind::WriteOperations => "wiops",
            };
            limit("io", "io.max", Some(format!("{major}:{minor} {what}={}", amount(device.rate))))?;
        }
        Ok(files)
    }

    /// Weights of I/O have an effect only where the kernel weighs what I/O costs, which it does for a device when it is asked
    /// to. That costs a little, so it is asked when the first weight is set.
    fn share_io(&self) {
        let Ok(disks) = std::fs::read_dir("/sys/block") else { return };
        for disk in disks.flatten() {
            if let Ok(number) = std::fs::read_to_string(disk.path().join("dev")) {
                let line = format!("{} enable=1", number.trim());
                if let Err(error) = std::fs::write(self.root.join("io.cost.qos"), &line) {
                    tracing::debug!("I/O of {number} cannot be weighed: {error}");
                }
            }
        }
    }
}

fn cpu_max(resources: &Resources) -> Result<Option<String>> {
    const PERIODS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;
    let period = resources.cpu_period.unwrap_or(100_000);
    if !PERIODS.contains(&period) {
        return Err(invalid(format!("a CPU period of {period} µs is not between 1000 and 1000000")));
    }
    Ok(match (resources.cpu_quota, resources.cpu_period) {
        (None, None) => None,
        (Some(u64::MAX), None) => Some("max".to_owned()),
        (None | Some(u64::MAX), Some(_)) => Some(format!("max {period}")),
        (Some(quota), _) if quota < 1_000 => {
            return Err(invalid(format!("a CPU quota of {quota} µs is less than 1000")));
        }
        (Some(quota), _) => Some(format!("{quota} {period}")),
    })
}

/// Docker's shares as a weight, as the OCI runtimes convert them.
fn cpu_weight(shares: u64) -> Result<u64> {
    match shares {
        2..=262_144 => Ok(1 + (shares - 2) * 9999 / 262_142),
        _ => Err(invalid(format!("{shares} CPU shares are not between 2 and 262144"))),
    }
}

/// Docker's weight of I/O as the kernel's, as the OCI runtimes convert it.
fn io_weight(weight: u16) -> Result<u64> {
    match weight {
        10..=1000 => Ok(1 + (u64::from(weight) - 10) * 9999 / 990),
        _ => Err(invalid("Range of blkio weight is from 10 to 1000")),
    }
}

fn block_device(path: &str) -> Result<(u32, u32)> {
    let stat = rustix::fs::stat(path).at(format!("stat {path}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return Err(invalid(format!("{path} is not a block device")));
    }
    Ok((rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(controllers: &[&str]) -> Limits {
        let controllers = controllers.iter().map(|name| name.to_string()).collect();
        Limits { controllers, root: PathBuf::from("/nonexistent"), processes: None }
    }

    #[test]
    fn shares_and_weights_are_converted_as_oci_runtimes_do() {
        for (shares, weight) in [(2, 1), (1024, 39), (262_144, 10_000)] {
            assert_eq!(cpu_weight(shares).unwrap(), weight);
        }
        assert!(cpu_weight(1).is_err());
        for (docker, kernel) in [(10, 1), (500, 4950), (1000, 10_000)] {
            assert_eq!(io_weight(docker).unwrap(), kernel);
        }
        assert!(io_weight(9).is_err());
    }

    #[test]
    fn a_limit_without_its_controller_is_refused_by_name() {
        let limits = limits(&["pids"]);
        let error = limits.files(&Resources { memory: Some(1), ..Resources::default() }).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
        assert!(error.message.contains("`memory`"), "{}", error.message);
        let unlimited = Resources {
            pids: Some(9),
            memory: Some(u64::MAX),
            cpu_quota: Some(u64::MAX),
            ..Resources::default()
        };
        assert_eq!(limits.files(&unlimited).unwrap(), [File { name: "pids.max", value: "9".to_owned() }]);
    }

    #[test]
    fn limits_have_the_kernels_form() {
        let limits = limits(&["pids", "memory", "cpu", "cpuset", "io"]);
        let given = Resources {
            memory: Some(1 << 20),
            memory_swap: Some(u64::MAX),
            cpu_quota: Some(50_000),
            cpuset_mems: Some("0".to_owned()),
            io_weight: Some(1000),
            ..Resources::default()
        };
        let files = limits.files(&given).unwrap();
        let value =
            |wanted: &str| files.iter().find(|file| file.name == wanted).map(|file| file.value.as_str());
        assert_eq!(value("memory.max"), Some("1048576"));
        assert_eq!(value("memory.swap.max"), Some("max"));
        assert_eq!(value("cpu.max"), Some("50000 100000"));
        assert_eq!(value("cpuset.mems"), Some("0"));
        assert_eq!(value("io.weight"), Some("default 10000"));
        let nowhere = Resources {
            io_limits: vec![coracle_agent_api::IoLimit {
                path: "/dev/null".to_owned(),
                what: IoLimitKind::ReadBytes,
                rate: 1,
            }],
            ..Resources::default()
        };
        assert!(limits.files(&nowhere).unwrap_err().message.contains("not a block device"));
    }
}
