//! A process's capabilities: the bounding set is what the daemon names, for root also the permitted and effective ones;
//! nothing is inheritable or ambient.

use coracle_agent_api::{ApiError, ErrorKind};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{AtStep, Result, invalid};

/// By number.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The set of `CAP_…` names.
pub(crate) fn parse(names: &[String]) -> Result<CapabilitySet, ApiError> {
    let mut set = CapabilitySet::empty();
    for name in names {
        let number =
            name.strip_prefix("CAP_").and_then(|short| NAMES.iter().position(|known| *known == short));
        match number {
            Some(number) => set |= CapabilitySet::from_bits_retain(1 << number),
            None => return Err(invalid(format!("unknown capability `{name}`"))),
        }
    }
    Ok(set)
}

/// The wanted capabilities, or all that the agent has; asking for one that the agent lacks is an error.
pub(super) fn wanted(names: &[String], all: bool) -> Result<CapabilitySet> {
    let own = rustix::thread::capabilities(None).at("read the capabilities")?.permitted;
    if all {
        return Ok(own);
    }
    let wanted = parse(names)?;
    let lacking = wanted.difference(own);
    match NAMES.iter().enumerate().find(|(number, _)| lacking.bits() & (1 << number) != 0) {
        Some((_, name)) => {
            let message = format!("the capability CAP_{name} is not available here");
            Err(ApiError::new(ErrorKind::Unsupported, message))
        }
        None => Ok(wanted),
    }
}

/// Takes all others out of the bounding set; needs CAP_SETPCAP.
pub(super) fn bound(wanted: CapabilitySet) -> Result<()> {
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if wanted.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // The kernel knows no capability with this or a higher number.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error).at("drop capabilities"),
        }
    }
    rustix::thread::clear_ambient_capability_set().at("drop ambient capabilities")
}

/// What the process holds until it executes its program.
pub(super) fn hold(effective: CapabilitySet, permitted: CapabilitySet) -> Result<()> {
    let sets = CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).at("set capabilities")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_kernels() {
        let parse_one = |name: &str| parse(&[name.to_owned()]);
        assert_eq!(parse_one("CAP_CHOWN").unwrap(), CapabilitySet::CHOWN);
        assert_eq!(parse_one("CAP_SYS_ADMIN").unwrap(), CapabilitySet::SYS_ADMIN);
        assert_eq!(parse_one("CAP_CHECKPOINT_RESTORE").unwrap(), CapabilitySet::CHECKPOINT_RESTORE);
        for bad in ["CHOWN", "cap_chown", "CAP_NOPE", ""] {
            assert!(parse_one(bad).is_err(), "{bad}");
        }
    }
}
