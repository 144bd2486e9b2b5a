//! Which capabilities a container gets.

use crate::error::{Error, Result};

/// Every capability of Linux 6.12, in the order of their numbers.
const ALL: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Docker's default set.
const DEFAULT: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
    "CAP_SETFCAP",
];

/// The set that `--cap-add` and `--cap-drop` make of the default one, by Docker's rules.
pub(crate) fn resolve(add: &[String], drop: &[String]) -> Result<Vec<String>> {
    let add = names(add)?;
    let drop = names(drop)?;
    let base: &[&str] = match (add.contains(&"ALL"), drop.contains(&"ALL")) {
        (true, _) => ALL,
        (false, true) => &[],
        (false, false) => DEFAULT,
    };
    let wanted = |name: &&&str| add.contains(*name) || base.contains(*name) && !drop.contains(*name);
    let all_added = add.contains(&"ALL");
    let set = ALL.iter().filter(|name| if all_added { !drop.contains(*name) } else { wanted(name) });
    Ok(set.map(|name| (*name).to_owned()).collect())
}

/// Every capability.
pub(crate) fn all() -> Vec<String> {
    ALL.iter().map(|name| (*name).to_owned()).collect()
}

fn names(given: &[String]) -> Result<Vec<&'static str>> {
    given.iter().map(|text| name(text)).collect()
}

fn name(text: &str) -> Result<&'static str> {
    let upper = text.to_ascii_uppercase();
    if upper == "ALL" || upper == "CAP_ALL" {
        return Ok("ALL");
    }
    let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    let known = ALL.iter().find(|known| **known == full);
    known.copied().ok_or_else(|| {
        Error::invalid(format!("invalid capability: {:?}", full.chars().take(60).collect::<String>()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(add: &[&str], drop: &[&str]) -> Vec<String> {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        resolve(&own(add), &own(drop)).unwrap()
    }

    #[test]
    fn additions_and_drops_follow_dockers_rules() {
        assert_eq!(set(&[], &[]).len(), 14);
        assert!(set(&["sys_admin"], &[]).contains(&"CAP_SYS_ADMIN".to_owned()));
        assert!(!set(&[], &["CAP_CHOWN"]).contains(&"CAP_CHOWN".to_owned()));
        assert_eq!(set(&["NET_ADMIN"], &["ALL"]), ["CAP_NET_ADMIN"]);
        assert_eq!(set(&["ALL"], &["CHOWN"]).len(), ALL.len() - 1);
        assert!(resolve(&["FLY".to_owned()], &[]).is_err());
    }
}
