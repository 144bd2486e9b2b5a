//! What the person chose with `coracle up`: the size of the virtual machine, with defaults that suit the host, and how
//! registries are spoken to.
//!
//! It is kept in `config.json` in the state directory, and read each time that the machine starts or a registry is asked.

use std::{fs, io, num::NonZeroUsize, path::Path, thread};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{files, units::human_binary_size};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// A machine gets no more processors than this unless it is asked for.
const DEFAULT_MAX_CPUS: usize = 8;
/// The most processors that a machine can have.
const MAX_CPUS: u32 = 64;
/// A machine gets half of the host's memory, but no more than this unless it is asked for.
const DEFAULT_MAX_MEMORY: u64 = 8 * GIB;
/// Less does not run a useful container.
const MIN_MEMORY: u64 = 256 * MIB;
/// The data disk is sparse: this is what it may grow to.
const DEFAULT_DISK: u64 = 64 * GIB;
const MIN_DISK: u64 = GIB;
const MAX_DISK: u64 = 16 << 40;

/// What the person chose; `None` is the default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Settings {
    /// Processors.
    pub(crate) cpus: Option<u32>,
    /// Memory in bytes.
    pub(crate) memory: Option<u64>,
    /// Size of the data disk in bytes.
    pub(crate) disk: Option<u64>,
    /// Registries without a checked certificate, by Docker's name for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) insecure_registries: Option<Vec<String>>,
    /// Registries that are asked before Docker Hub, by Docker's name for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) registry_mirrors: Option<Vec<String>>,
}

/// A machine's size, complete and within limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MachineSize {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) disk: u64,
}

impl Settings {
    /// What was chosen; nothing if there is no such file.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let cannot = || format!("cannot read the settings in {}", path.display());
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(cannot),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(cannot),
        }
    }

    /// Keeps the choice.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self).context("cannot write the settings as JSON")?;
        files::replace(path, &bytes)
            .with_context(|| format!("cannot write the settings to {}", path.display()))
    }

    /// These, with what `newer` says instead.
    pub(crate) fn merged(self, newer: Self) -> Self {
        Self {
            cpus: newer.cpus.or(self.cpus),
            memory: newer.memory.or(self.memory),
            disk: newer.disk.or(self.disk),
            insecure_registries: newer.insecure_registries.or(self.insecure_registries),
            registry_mirrors: newer.registry_mirrors.or(self.registry_mirrors),
        }
    }

    /// Whether they say anything of the machine's size.
    pub(crate) fn has_size(&self) -> bool {
        self.cpus.is_some() || self.memory.is_some() || self.disk.is_some()
    }

    /// A complete size for this host.
    pub(crate) fn machine_size(&self) -> Result<MachineSize> {
        let host_cpus = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.size_on(host_cpus, host_memory())
    }

    fn size_on(&self, host_cpus: usize, host_memory: u64) -> Result<MachineSize> {
        let default_cpus = u32::try_from(host_cpus.clamp(1, DEFAULT_MAX_CPUS))?;
        let cpus = self.cpus.unwrap_or(default_cpus);
        if !(1..=MAX_CPUS).contains(&cpus) {
            bail!("a virtual machine cannot have {cpus} processors: choose 1 to {MAX_CPUS}");
        }
        let memory = self.memory.unwrap_or((host_memory / 2).clamp(MIN_MEMORY, DEFAULT_MAX_MEMORY));
        if memory < MIN_MEMORY {
            let (chosen, least) = (human_binary_size(memory), human_binary_size(MIN_MEMORY));
            bail!("{chosen} of memory is too little for a virtual machine: choose {least} or more");
        }
        if self.memory.is_some() && memory > host_memory {
            let (chosen, there) = (human_binary_size(memory), human_binary_size(host_memory));
            bail!("a virtual machine cannot have {chosen} of memory: this computer has {there}");
        }
        let disk = self.disk.unwrap_or(DEFAULT_DISK);
        if !(MIN_DISK..=MAX_DISK).contains(&disk) {
            let chosen = human_binary_size(disk);
            bail!("the data disk cannot have {chosen}: choose 1GiB to 16TiB");
        }
        Ok(MachineSize { cpus, memory_mib: memory / MIB / 2 * 2, disk: disk / MIB * MIB })
    }
}

/// The host's memory in bytes.
fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_fits_its_host() {
        let size = Settings::default().size_on(2, 23 * GIB).unwrap();
        assert_eq!(size, MachineSize { cpus: 2, memory_mib: 8192, disk: 64 * GIB });
        let small = Settings::default().size_on(64, GIB).unwrap();
        assert_eq!((small.cpus, small.memory_mib), (8, 512));
        let odd = Settings { memory: Some(513 * MIB), ..Settings::default() }.size_on(1, GIB).unwrap();
        assert_eq!(odd.memory_mib, 512);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for settings in [
            Settings { cpus: Some(0), ..Settings::default() },
            Settings { cpus: Some(65), ..Settings::default() },
            Settings { memory: Some(MIB), ..Settings::default() },
            Settings { memory: Some(2 * GIB), ..Settings::default() },
            Settings { disk: Some(MIB), ..Settings::default() },
            Settings { disk: Some(u64::MAX), ..Settings::default() },
        ] {
            assert!(settings.size_on(4, GIB).is_err(), "{settings:?}");
        }
    }

    #[test]
    fn settings_survive_and_merge() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        assert_eq!(Settings::load(&path).unwrap(), Settings::default());
        let first = Settings { cpus: Some(2), disk: Some(GIB), ..Settings::default() };
        first.save(&path).unwrap();
        let merged = Settings::load(&path).unwrap().merged(Settings { cpus: Some(3), ..Settings::default() });
        assert_eq!(merged, Settings { cpus: Some(3), disk: Some(GIB), ..Settings::default() });
        fs::write(&path, r#"{"insecure-registries":["a:5000"],"registry-mirrors":["https://m"]}"#).unwrap();
        let read = Settings::load(&path)
            .unwrap()
            .merged(Settings { registry_mirrors: Some(Vec::new()), ..Settings::default() });
        assert_eq!(read.insecure_registries.as_deref(), Some(&["a:5000".to_owned()][..]));
        assert_eq!(read.registry_mirrors, Some(Vec::new()));
        fs::write(&path, r#"{"cpu":3}"#).unwrap();
        assert!(Settings::load(&path).is_err());
    }
}
