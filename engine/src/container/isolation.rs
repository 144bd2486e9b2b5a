//! What a container shares with others, which devices it may use and how much of the machine is hidden from it: Docker's rules and
//! words for what a client asks, and the agent's form of it.

use coracle_agent_api::{Device, DeviceAccess, DeviceKind, DeviceRule, IpcMode, PidMode};
use serde::{Deserialize, Serialize};

use super::config::{Config, HostConfig};
use crate::error::{Error, Result};

/// Names under which Docker's clients know the usual runtime; there is one here.
const RUNTIMES: &[&str] = &["", "runc", "io.containerd.runc.v2", "coracle"];
/// Parameters of a container's own IPC namespace.
const IPC_SYSCTLS: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// `--device`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct DeviceMapping {
    pub(crate) path_on_host: String,
    pub(crate) path_in_container: String,
    pub(crate) cgroup_permissions: String,
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::invalid(message))
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Checks what does not depend on other containers.
pub(crate) fn check(config: &Config, host: &HostConfig) -> Result<()> {
    ipc(host, |_| None)?;
    pid(host, |_| None)?;
    match host.uts_mode.as_str() {
        "" => {}
        "host" if !config.hostname.is_empty() => {
            return invalid("conflicting options: hostname and the UTS mode");
        }
        "host" if !config.domainname.is_empty() => {
            return invalid("conflicting options: domainname and the UTS mode");
        }
        "host" => {}
        other => return invalid(format!("invalid UTS mode: {}", shown(other))),
    }
    if !matches!(host.userns_mode.as_str(), "" | "host") {
        return invalid(format!("invalid user namespace mode: {}", shown(&host.userns_mode)));
    }
    if !matches!(host.cgroupns_mode.as_str(), "" | "private" | "host") {
        return invalid(format!("invalid cgroup namespace mode: {}", shown(&host.cgroupns_mode)));
    }
    if !RUNTIMES.contains(&host.runtime.as_str()) {
        return invalid(format!("unknown or invalid runtime name: {}", shown(&host.runtime)));
    }
    if !matches!(host.isolation.as_str(), "" | "default") {
        return invalid(format!(
            "invalid --isolation: {:?} - linux only supports 'default'",
            shown(&host.isolation)
        ));
    }
    if host.annotations.keys().any(String::is_empty) {
        return invalid("invalid Annotation: the empty string is not permitted as an annotation key");
    }
    devices(host)?;
    device_rules(host)?;
    sysctls(host)
}

/// Whose memory it shares; `find` gives the id of a container that is named.
pub(crate) fn ipc(host: &HostConfig, find: impl Fn(&str) -> Option<IpcMode>) -> Result<IpcMode> {
    Ok(match host.ipc_mode.as_str() {
        "" | "private" => IpcMode::Private,
        "shareable" => IpcMode::Shareable,
        "none" => IpcMode::None,
        "host" => IpcMode::Host,
        other => match other.strip_prefix("container:").filter(|name| !name.is_empty()) {
            Some(name) => find(name).unwrap_or_default(),
            None => return invalid(format!("invalid IPC mode: {}", shown(other))),
        },
    })
}

/// Whose processes it sees.
pub(crate) fn pid(host: &HostConfig, find: impl Fn(&str) -> Option<PidMode>) -> Result<PidMode> {
    Ok(match host.pid_mode.as_str() {
        "" => PidMode::Private,
        "host" => PidMode::Host,
        other => match other.strip_prefix("container:").filter(|name| !name.is_empty()) {
            Some(name) => find(name).unwrap_or_default(),
            None => return invalid(format!("invalid PID mode: {}", shown(other))),
        },
    })
}

/// The container whose namespace is named by a mode.
pub(crate) fn donor(mode: &str) -> Option<&str> {
    mode.strip_prefix("container:").filter(|name| !name.is_empty())
}

fn access(text: &str) -> Option<DeviceAccess> {
    let legal = !text.is_empty() && text.len() <= 3 && text.bytes().all(|b| matches!(b, b'r' | b'w' | b'm'));
    let has = |letter| text.contains(letter);
    legal.then(|| DeviceAccess { read: has('r'), write: has('w'), mknod: has('m') })
}

/// Converts `--device`.
pub(crate) fn devices(host: &HostConfig) -> Result<Vec<Device>> {
    let convert = |mapping: &DeviceMapping| {
        let DeviceMapping { path_on_host: source, path_in_container: path, cgroup_permissions } = mapping;
        let path = if path.is_empty() { source } else { path };
        let permissions = if cgroup_permissions.is_empty() { "rwm" } else { cgroup_permissions };
        let Some(access) = access(permissions) else {
            return invalid(format!(
                "bad mode specified for device {}: {}",
                shown(source),
                shown(permissions)
            ));
        };
        let in_dev = source == "/dev" || source.starts_with("/dev/");
        if !in_dev || source.contains('\0') || source.split('/').any(|part| part == "..") {
            // The machine that Docker would look on is the VM, which has devices there and nowhere else.
            return invalid(format!(
                "error gathering device information while adding custom device \"{}\": no such file or directory",
                shown(source)
            ));
        }
        if !path.starts_with('/') || path == "/" || path.contains('\0') {
            return invalid(format!("{} is not an absolute path", shown(path)));
        }
        Ok(Device { source: source.clone(), path: path.clone(), access })
    };
    host.devices.iter().map(convert).collect()
}

/// Converts `--device-cgroup-rule`.
pub(crate) fn device_rules(host: &HostConfig) -> Result<Vec<DeviceRule>> {
    let parse = |text: &str| {
        let mut parts = text.split(' ');
        let (kind, numbers, letters) = (parts.next()?, parts.next()?, parts.next()?);
        let (major, minor) = numbers.split_once(':')?;
        let number = |text: &str| match text {
            "*" => Some(None),
            digits => digits.parse().ok().map(Some),
        };
        let kind = match kind {
            "a" => DeviceKind::Any,
            "c" => DeviceKind::Char,
            "b" => DeviceKind::Block,
            _ => return None,
        };
        let rule =
            DeviceRule { kind, major: number(major)?, minor: number(minor)?, access: access(letters)? };
        parts.next().is_none().then_some(rule)
    };
    let convert = |text: &String| {
        parse(text)
            .ok_or_else(|| Error::invalid(format!("invalid device cgroup rule format: '{}'", shown(text))))
    };
    host.device_cgroup_rules.iter().map(convert).collect()
}

/// Checks `--sysctl`: parameters of a namespace that is someone else's are not this container's to change.
pub(crate) fn sysctls(host: &HostConfig) -> Result<()> {
    for name in host.sysctls.keys() {
        let dotted = name.replace('/', ".");
        let of_network = dotted.starts_with("net.");
        if of_network && host.network_mode == "host" {
            return invalid(format!("sysctl {:?} not allowed in host network namespace", shown(name)));
        }
        if of_network && donor(&host.network_mode).is_some() {
            return invalid(format!("sysctl {:?} is not in a separate kernel namespace", shown(name)));
        }
        let of_ipc = IPC_SYSCTLS.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.");
        let own_ipc = host.ipc_mode != "host" && donor(&host.ipc_mode).is_none();
        if of_ipc && !own_ipc {
            return invalid(format!("sysctl {:?} is not in a separate kernel namespace", shown(name)));
        }
        let of_uts = dotted == "kernel.domainname" && host.uts_mode.is_empty();
        if !of_network && !of_ipc && !of_uts {
            return invalid(format!("sysctl {:?} is not in a separate kernel namespace", shown(name)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: &str) -> Result<HostConfig> {
        let host: HostConfig = serde_json::from_str(json).unwrap();
        check(&Config::default(), &host)?;
        Ok(host)
    }

    #[test]
    fn what_cannot_be_is_refused_in_dockers_words() {
        for (json, words) in [
            (r#"{"IpcMode":"everyone"}"#, "invalid IPC mode: everyone"),
            (r#"{"IpcMode":"container:"}"#, "invalid IPC mode"),
            (r#"{"PidMode":"private"}"#, "invalid PID mode: private"),
            (r#"{"UTSMode":"private"}"#, "invalid UTS mode: private"),
            (r#"{"UsernsMode":"keep-id"}"#, "invalid user namespace mode"),
            (r#"{"CgroupnsMode":"shared"}"#, "invalid cgroup namespace mode: shared"),
            (r#"{"Runtime":"kata"}"#, "unknown or invalid runtime name: kata"),
            (r#"{"Isolation":"hyperv"}"#, "linux only supports 'default'"),
            (r#"{"Annotations":{"":"x"}}"#, "the empty string is not permitted"),
            (r#"{"Devices":[{"PathOnHost":"/dev/x","CgroupPermissions":"rx"}]}"#, "bad mode specified"),
            (r#"{"Devices":[{"PathOnHost":"/etc/passwd"}]}"#, "error gathering device information"),
            (r#"{"Devices":[{"PathOnHost":"/dev/../etc/x"}]}"#, "error gathering device information"),
            (r#"{"DeviceCgroupRules":["c 1:3"]}"#, "invalid device cgroup rule format: 'c 1:3'"),
            (r#"{"DeviceCgroupRules":["c x:3 r"]}"#, "invalid device cgroup rule format"),
            (r#"{"Sysctls":{"kernel.core_pattern":"x"}}"#, "is not in a separate kernel namespace"),
            (
                r#"{"IpcMode":"host","Sysctls":{"kernel.shmmax":"1"}}"#,
                "is not in a separate kernel namespace",
            ),
            (
                r#"{"NetworkMode":"host","Sysctls":{"net.core.somaxconn":"1"}}"#,
                "not allowed in host network namespace",
            ),
            (
                r#"{"NetworkMode":"container:abc","Sysctls":{"net/core/somaxconn":"1"}}"#,
                "is not in a separate kernel namespace",
            ),
        ] {
            let error = checked(json).unwrap_err();
            assert_eq!(error.status(), 400);
            assert!(error.to_string().contains(words), "{json}: {error}");
        }
        let named = Config { hostname: "h".to_owned(), ..Config::default() };
        let host = HostConfig { uts_mode: "host".to_owned(), ..HostConfig::default() };
        assert!(check(&named, &host).unwrap_err().to_string().contains("hostname and the UTS mode"));
    }

    #[test]
    fn what_can_be_is_converted() {
        let host = checked(
            r#"{"IpcMode":"container:abc","PidMode":"host","UTSMode":"host","UsernsMode":"host","Runtime":"runc",
                "Sysctls":{"net.core.somaxconn":"1"},"Devices":[{"PathOnHost":"/dev/fuse"}],
                "DeviceCgroupRules":["a *:* rwm","b 8:* r"]}"#,
        )
        .unwrap();
        assert_eq!(donor(&host.ipc_mode), Some("abc"));
        assert_eq!(pid(&host, |_| None).unwrap(), PidMode::Host);
        let device = &devices(&host).unwrap()[0];
        assert!(device.path == "/dev/fuse" && device.access.mknod);
        let rules = device_rules(&host).unwrap();
        assert_eq!((rules[0].kind, rules[0].major), (DeviceKind::Any, None));
        assert!(rules[1].major == Some(8) && rules[1].minor.is_none() && !rules[1].access.write);
    }
}
