//! Limits of a container: Docker's rules and words for what a client asks, at first and later, and the agent's form of it.

use coracle_agent_api::{IoDeviceWeight, IoLimit, IoLimitKind, Resources};
use serde::{Deserialize, Serialize};

use super::config::HostConfig;
use crate::error::{Error, Result};

/// The least memory limit that makes sense, as in Docker.
const MIN_MEMORY: i64 = 6 * 1024 * 1024;
/// Docker's period of `--cpus`.
const CPU_PERIOD: u64 = 100_000;
/// What the agent takes for no limit.
const UNLIMITED: u64 = u64::MAX;

/// `--blkio-weight-device`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct WeightDevice {
    pub(crate) path: String,
    pub(crate) weight: u16,
}

/// `--device-read-bps` and its kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct ThrottleDevice {
    pub(crate) path: String,
    pub(crate) rate: u64,
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::invalid(message))
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

/// Checks limits and takes away what cgroup v2 does not have, with a warning as Docker's. `update` says that they are changes.
pub(crate) fn check(host: &mut HostConfig, update: bool) -> Result<Vec<String>> {
    let warnings = discard(host)?;
    memory(host, update)?;
    cpu(host)?;
    cpusets(host)?;
    if host.blkio_weight != 0 && !(10..=1000).contains(&host.blkio_weight)
        || host.blkio_weight_device.iter().any(|device| !(10..=1000).contains(&device.weight))
    {
        return invalid("Range of blkio weight is from 10 to 1000");
    }
    let weights = host.blkio_weight_device.iter().map(|device| &device.path);
    if let Some(path) =
        weights.chain(limits(host).map(|(_, device)| &device.path)).find(|path| !is_device(path))
    {
        let shown: String = path.chars().take(80).collect();
        return invalid(format!("stat {shown}: no such device in Coracle's VM: its devices are in /dev"));
    }
    Ok(warnings)
}

fn is_device(path: &str) -> bool {
    path.starts_with("/dev/") && !path.contains('\0') && !path.split('/').any(|part| part == "..")
}

fn discard(host: &mut HostConfig) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    if let Some(swappiness) = host.memory_swappiness.take().filter(|value| *value != -1) {
        if !(0..=100).contains(&swappiness) {
            return invalid(format!("Invalid value: {swappiness}, valid memory swappiness range is 0-100"));
        }
        warnings.push("Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.".to_owned());
    }
    for limit in [std::mem::take(&mut host.kernel_memory), std::mem::take(&mut host.kernel_memory_tcp)] {
        if limit > 0 {
            warnings.push("Your kernel does not support kernel memory limit capabilities or the cgroup is not mounted. Limitation discarded.".to_owned());
        }
    }
    if host.oom_kill_disable == Some(true) {
        return Err(Error::unsupported(
            "--oom-kill-disable (HostConfig.OomKillDisable) is not supported by Coracle: cgroup v2 has no such switch; leave it out",
        ));
    }
    Ok(warnings)
}

fn memory(host: &HostConfig, update: bool) -> Result<()> {
    if host.memory != 0 && host.memory < MIN_MEMORY {
        return invalid("Minimum memory limit allowed is 6MB");
    }
    if host.memory > 0 && host.memory_swap > 0 && host.memory_swap < host.memory {
        return invalid("Minimum memoryswap limit should be larger than memory limit, see usage");
    }
    if host.memory == 0 && host.memory_swap > 0 && !update {
        return invalid("You should always set the Memory limit when using Memoryswap limit, see usage");
    }
    if host.memory_swap < -1 {
        return invalid("invalid memoryswap limit: use -1 for unlimited swap");
    }
    if host.memory_reservation != 0 && host.memory_reservation < MIN_MEMORY {
        return invalid("Minimum memory reservation allowed is 6MB");
    }
    if host.memory > 0 && host.memory_reservation > host.memory {
        return invalid("Minimum memory limit can not be less than memory reservation limit, see usage");
    }
    Ok(())
}

fn cpu(host: &HostConfig) -> Result<()> {
    if host.nano_cpus > 0 && host.cpu_period > 0 {
        return invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set");
    }
    if host.nano_cpus > 0 && host.cpu_quota > 0 {
        return invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set");
    }
    // A hundredth of a processor is the least that the kernel takes.
    if host.nano_cpus != 0 && host.nano_cpus < 10_000_000 {
        return invalid("Range of CPUs is from 0.01 upwards");
    }
    if host.cpu_period != 0 && !(1000..=1_000_000).contains(&host.cpu_period) {
        return invalid(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)",
        );
    }
    if host.cpu_quota > 0 && host.cpu_quota < 1000 {
        return invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)");
    }
    if host.cpu_shares < 0 {
        return invalid(format!(
            "invalid CPU shares ({}): value must be a positive integer",
            host.cpu_shares
        ));
    }
    Ok(())
}

fn cpusets(host: &HostConfig) -> Result<()> {
    for (list, what) in [(&host.cpuset_cpus, "cpus"), (&host.cpuset_mems, "mems")] {
        let part = |part: &str| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            matches!((from.parse::<u16>(), to.parse::<u16>()), (Ok(from), Ok(to)) if from <= to)
        };
        if !list.is_empty() && !list.split(',').all(part) {
            return invalid(format!(
                "Invalid value {} for cpuset {what}",
                list.chars().take(60).collect::<String>()
            ));
        }
    }
    Ok(())
}

fn limits(host: &HostConfig) -> impl Iterator<Item = (IoLimitKind, &ThrottleDevice)> {
    [
        (IoLimitKind::ReadBytes, &host.blkio_device_read_bps),
        (IoLimitKind::WriteBytes, &host.blkio_device_write_bps),
        (IoLimitKind::ReadOperations, &host.blkio_device_read_iops),
        (IoLimitKind::WriteOperations, &host.blkio_device_write_iops),
    ]
    .into_iter()
    .flat_map(|(kind, devices)| devices.iter().map(move |device| (kind, device)))
}

/// The agent's form of checked limits.
pub(crate) fn convert(host: &HostConfig) -> Resources {
    let memory_swap = match (host.memory, host.memory_swap) {
        (_, -1) => Some(UNLIMITED),
        (memory, _) if memory <= 0 => None,
        // As much swap as memory unless said otherwise.
        (memory, 0) => positive(memory),
        (memory, both) => u64::try_from(both - memory).ok(),
    };
    let (cpu_quota, cpu_period) = match positive(host.nano_cpus) {
        Some(nanos) => (Some(nanos / (1_000_000_000 / CPU_PERIOD)), Some(CPU_PERIOD)),
        None if host.cpu_quota < 0 => (Some(UNLIMITED), positive(host.cpu_period)),
        None => (positive(host.cpu_quota), positive(host.cpu_period)),
    };
    let list = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    Resources {
        memory: positive(host.memory),
        memory_swap,
        memory_reservation: positive(host.memory_reservation),
        cpu_quota,
        cpu_period,
        cpu_shares: positive(host.cpu_shares).map(|shares| shares.clamp(2, 262_144)),
        cpuset_cpus: list(&host.cpuset_cpus),
        cpuset_mems: list(&host.cpuset_mems),
        // Clients send 0 where nothing was said.
        pids: host.pids_limit.filter(|limit| *limit != 0).map(|limit| positive(limit).unwrap_or(UNLIMITED)),
        io_weight: Some(host.blkio_weight).filter(|weight| *weight != 0),
        io_device_weights: host
            .blkio_weight_device
            .iter()
            .map(|device| IoDeviceWeight { path: device.path.clone(), weight: device.weight })
            .collect(),
        io_limits: limits(host)
            .map(|(what, device)| IoLimit {
                path: device.path.clone(),
                what,
                // As in Docker, 0 takes a limit away.
                rate: if device.rate == 0 { UNLIMITED } else { device.rate },
            })
            .collect(),
    }
}

/// Puts the limits that an update names into those that a container has.
pub(crate) fn merge(known: &mut HostConfig, update: &HostConfig) -> Result<()> {
    let conflict = |message: &str| Err(Error::conflict(format!("Conflicting options: {message}")));
    if update.nano_cpus > 0 && known.cpu_period > 0 {
        return conflict("Nano CPUs cannot be updated as CPU Period has already been set");
    }
    if update.nano_cpus > 0 && known.cpu_quota > 0 {
        return conflict("Nano CPUs cannot be updated as CPU Quota has already been set");
    }
    if update.cpu_period > 0 && known.nano_cpus > 0 {
        return conflict("CPU Period cannot be updated as NanoCPUs has already been set");
    }
    if update.cpu_quota > 0 && known.nano_cpus > 0 {
        return conflict("CPU Quota cannot be updated as NanoCPUs has already been set");
    }
    if update.memory > known.memory_swap && update.memory_swap == 0 && known.memory_swap > 0 {
        return Err(Error::conflict(
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time",
        ));
    }
    for (known, new) in [
        (&mut known.memory, update.memory),
        (&mut known.memory_swap, update.memory_swap),
        (&mut known.memory_reservation, update.memory_reservation),
        (&mut known.nano_cpus, update.nano_cpus),
        (&mut known.cpu_period, update.cpu_period),
        (&mut known.cpu_quota, update.cpu_quota),
        (&mut known.cpu_shares, update.cpu_shares),
    ] {
        if new != 0 {
            *known = new;
        }
    }
    if update.blkio_weight != 0 {
        known.blkio_weight = update.blkio_weight;
    }
    for (known, new) in
        [(&mut known.cpuset_cpus, &update.cpuset_cpus), (&mut known.cpuset_mems, &update.cpuset_mems)]
    {
        if !new.is_empty() {
            known.clone_from(new);
        }
    }
    for (known, new) in [
        (&mut known.blkio_device_read_bps, &update.blkio_device_read_bps),
        (&mut known.blkio_device_write_bps, &update.blkio_device_write_bps),
        (&mut known.blkio_device_read_iops, &update.blkio_device_read_iops),
        (&mut known.blkio_device_write_iops, &update.blkio_device_write_iops),
    ] {
        if !new.is_empty() {
            known.clone_from(new);
        }
    }
    // In an update, 0 takes the limit away.
    known.pids_limit =
        update.pids_limit.map(|limit| if limit == 0 { -1 } else { limit }).or(known.pids_limit);
    // The two together must make sense, too.
    memory(known, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(json: &str) -> HostConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn limits_become_cgroup_values() {
        let resources = convert(&host(
            r#"{"Memory":104857600,"NanoCpus":1500000000,"PidsLimit":-1,"CpuShares":1,"CpusetMems":"0",
                "BlkioWeight":300,"BlkioDeviceReadBps":[{"Path":"/dev/vda","Rate":1048576}],
                "BlkioDeviceWriteIOps":[{"Path":"/dev/vda","Rate":0}]}"#,
        ));
        assert_eq!(resources.memory, Some(104_857_600));
        assert_eq!(resources.memory_swap, Some(104_857_600));
        assert_eq!((resources.cpu_quota, resources.cpu_period), (Some(150_000), Some(100_000)));
        assert_eq!((resources.pids, resources.cpu_shares), (Some(UNLIMITED), Some(2)));
        assert_eq!((resources.io_weight, resources.cpuset_mems.as_deref()), (Some(300), Some("0")));
        let rates: Vec<_> = resources.io_limits.iter().map(|limit| (limit.what, limit.rate)).collect();
        assert_eq!(rates, [(IoLimitKind::ReadBytes, 1 << 20), (IoLimitKind::WriteOperations, UNLIMITED)]);
        assert_eq!(convert(&host(r#"{"Memory":104857600,"MemorySwap":-1}"#)).memory_swap, Some(UNLIMITED));
        assert_eq!(convert(&host("{}")), Resources::default());
    }

    #[test]
    fn values_that_make_no_sense_are_refused_in_dockers_words() {
        for (json, words) in [
            (r#"{"Memory":1}"#, "Minimum memory limit allowed is 6MB"),
            (r#"{"Memory":-5}"#, "Minimum memory limit allowed is 6MB"),
            (r#"{"MemorySwap":8000000}"#, "You should always set the Memory limit"),
            (r#"{"Memory":8000000,"MemorySwap":7000000}"#, "should be larger than memory limit"),
            (r#"{"Memory":8000000,"MemoryReservation":9000000}"#, "can not be less than memory reservation"),
            (r#"{"MemorySwappiness":101}"#, "valid memory swappiness range is 0-100"),
            (r#"{"NanoCpus":-1}"#, "Range of CPUs is from 0.01"),
            (r#"{"NanoCpus":1000000000,"CpuQuota":5000}"#, "Nano CPUs and CPU Quota cannot both be set"),
            (r#"{"CpuPeriod":10}"#, "CPU cfs period can not be less than 1ms"),
            (r#"{"CpuQuota":10}"#, "CPU cfs quota can not be less than 1ms"),
            (r#"{"CpusetCpus":"../x"}"#, "Invalid value ../x for cpuset cpus"),
            (r#"{"CpusetMems":"3-1"}"#, "Invalid value 3-1 for cpuset mems"),
            (r#"{"BlkioWeight":5}"#, "Range of blkio weight is from 10 to 1000"),
            (r#"{"BlkioDeviceReadBps":[{"Path":"/etc/passwd","Rate":1}]}"#, "stat /etc/passwd"),
            (r#"{"OomKillDisable":true}"#, "--oom-kill-disable"),
        ] {
            let error = check(&mut host(json), false).unwrap_err();
            assert!(error.to_string().contains(words), "{json}: {error}");
        }
    }

    #[test]
    fn what_cgroup_v2_does_not_have_is_discarded_with_a_warning() {
        let mut given = host(r#"{"MemorySwappiness":10,"KernelMemory":80000000,"OomKillDisable":false}"#);
        let warnings = check(&mut given, false).unwrap();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert_eq!((given.memory_swappiness, given.kernel_memory), (None, 0));
        assert!(check(&mut host(r#"{"MemorySwappiness":-1}"#), false).unwrap().is_empty());
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let mut known = host(r#"{"Memory":100000000,"MemorySwap":200000000,"CpuShares":512,"PidsLimit":10}"#);
        merge(&mut known, &host(r#"{"Memory":150000000,"PidsLimit":-1,"CpusetCpus":"0"}"#)).unwrap();
        assert_eq!((known.memory, known.cpu_shares, known.pids_limit), (150_000_000, 512, Some(-1)));
        for (update, words) in [
            (r#"{"Memory":300000000}"#, "update the memoryswap at the same time"),
            (r#"{"MemorySwap":120000000}"#, "should be larger than memory limit"),
        ] {
            let error = merge(&mut known.clone(), &host(update)).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        let mut quota = host(r#"{"CpuQuota":50000}"#);
        assert_eq!(merge(&mut quota, &host(r#"{"NanoCpus":500000000}"#)).unwrap_err().status(), 409);
    }
}
