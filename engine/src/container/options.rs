//! Reads and checks the body of a create request.
//!
//! The body is hostile: wrong types, out-of-range numbers and options that cannot be given are refused with a sentence;
//! nothing of it is acted on before it is checked.

use std::{collections::BTreeMap, net::IpAddr};

use coracle_agent_api::{Rlimit, Seccomp, TmpfsMount};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    capability,
    config::{Config, HostConfig, Ulimit, env_name},
    isolation, log_options, mounts, refused, resources,
    restart::Policy,
    seccomp, signal,
};
use crate::{
    error::{Error, Result},
    networks::{
        endpoint::{Wanted, split_link},
        files,
    },
    ports::wanted,
};

/// Docker's size of /dev/shm.
pub(crate) const DEFAULT_SHM: i64 = 64 * 1024 * 1024;

/// A create request that was checked on its own; the image is not merged in yet.
#[derive(Debug)]
pub(crate) struct CreateRequest {
    pub(crate) config: Config,
    pub(crate) host_config: HostConfig,
    /// Networks and what is wanted of them.
    pub(crate) networks: BTreeMap<String, Wanted>,
    /// What people should know of it.
    pub(crate) warnings: Vec<String>,
}

impl CreateRequest {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self> {
        let mut members = object(body)?;
        let host_members = take_object(&mut members, "HostConfig")?;
        let networking = take_object(&mut members, "NetworkingConfig")?;
        refused::check_config(&members)?;
        refused::check_host_config(&host_members)?;
        let config: Config = typed(members)?;
        let mut host_config: HostConfig = typed(host_members)?;
        if host_config.network_mode.is_empty() {
            "default".clone_into(&mut host_config.network_mode);
        }
        if config.network_disabled {
            "none".clone_into(&mut host_config.network_mode);
        }
        let networks = networks(networking)?;
        let warnings = resources::check(&mut host_config, false)?;
        let request = Self { config, host_config, networks, warnings };
        request.check()?;
        Ok(request)
    }

    fn check(&self) -> Result<()> {
        let Self { config, host_config, .. } = self;
        if config.image.is_empty() {
            return Err(Error::invalid("no image specified: name one in `Image`"));
        }
        if !config.working_dir.is_empty() && !config.working_dir.starts_with('/') {
            let given = &config.working_dir;
            return Err(Error::invalid(format!(
                "the working directory '{given}' is invalid, it needs to be an absolute path"
            )));
        }
        check_env(&config.env)?;
        check_host_name(&config.hostname)?;
        if let Some(text) = config.stop_signal.as_deref().filter(|text| !text.is_empty()) {
            signal::parse(text)?;
        }
        if let Some(check) = &config.healthcheck {
            check.check()?;
        }
        check_restart_policy(host_config)?;
        log_options::check(&host_config.log_config)?;
        isolation::check(config, host_config)?;
        security(&host_config.security_opt)?;
        capability::resolve(&host_config.cap_add, &host_config.cap_drop)?;
        rlimits(&host_config.ulimits)?;
        tmpfs(host_config)?;
        mounts::check(config, host_config)?;
        files::check(host_config)?;
        wanted::of(config, host_config)?;
        for port in config.exposed_ports.keys() {
            wanted::split(port)?;
        }
        for link in &host_config.links {
            split_link(link)?;
        }
        if host_config.network_mode == "host" && !host_config.links.is_empty() {
            return Err(Error::invalid(
                "conflicting options: host type networking can't be used with links. This would result in undefined behavior",
            ));
        }
        for host in &host_config.extra_hosts {
            split_host(host)?;
        }
        if host_config.shm_size < 0 {
            return Err(Error::invalid("SHM size can not be less than 0"));
        }
        if !(-1000..=1000).contains(&host_config.oom_score_adj) {
            let given = host_config.oom_score_adj;
            return Err(Error::invalid(format!(
                "Invalid value {given}, range for oom score adj is [-1000, 1000]"
            )));
        }
        Ok(())
    }
}

/// Reads a body that must be an object.
pub(crate) fn object(body: &[u8]) -> Result<Map<String, Value>> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(_) => Err(Error::invalid("invalid JSON: expected an object")),
        Err(error) => Err(Error::invalid(format!("invalid JSON: {error}"))),
    }
}

/// Reads an object into a type; as in Go, a `null` is the same as nothing.
pub(crate) fn typed<T: DeserializeOwned>(members: Map<String, Value>) -> Result<T> {
    let members = members
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name, without_nulls(value)));
    serde_json::from_value(Value::Object(members.collect()))
        .map_err(|error| Error::invalid(format!("invalid JSON: {error}")))
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let kept = members.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(name, value)| (name, without_nulls(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

fn take_object(members: &mut Map<String, Value>, name: &str) -> Result<Map<String, Value>> {
    match members.remove(name) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(members)) => Ok(members),
        Some(_) => Err(Error::invalid(format!("invalid JSON: {name} is not an object"))),
    }
}

/// Checks environment variables; one without `=` takes a variable away.
pub(crate) fn check_env(env: &[String]) -> Result<()> {
    match env.iter().find(|variable| env_name(variable).is_empty() || variable.contains('\0')) {
        Some(bad) => Err(Error::invalid(format!(
            "invalid environment variable: {}",
            bad.chars().take(80).collect::<String>()
        ))),
        None => Ok(()),
    }
}

fn check_host_name(name: &str) -> Result<()> {
    let legal = name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if legal {
        Ok(())
    } else {
        Err(Error::invalid(format!("invalid hostname format: {}", name.chars().take(80).collect::<String>())))
    }
}

/// `NetworkingConfig.EndpointsConfig`.
fn networks(mut networking: Map<String, Value>) -> Result<BTreeMap<String, Wanted>> {
    let mut networks = BTreeMap::new();
    for (network, endpoint) in take_object(&mut networking, "EndpointsConfig")? {
        let members = match endpoint {
            Value::Null => Map::new(),
            Value::Object(members) => members,
            _ => return Err(Error::invalid("invalid JSON: an endpoint is not an object")),
        };
        let wanted: Wanted = typed(members)?;
        wanted.check()?;
        networks.insert(network, wanted);
    }
    Ok(networks)
}

fn check_restart_policy(host_config: &HostConfig) -> Result<()> {
    if Policy::parse(&host_config.restart_policy)? != Policy::No && host_config.auto_remove {
        return Err(Error::invalid("can't create 'AutoRemove' container with restart policy"));
    }
    Ok(())
}

/// What `--security-opt` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SecurityOptions {
    pub(crate) no_new_privileges: bool,
    pub(crate) writable_cgroups: bool,
    /// `None` if nothing was said.
    pub(crate) seccomp: Option<Seccomp>,
}

/// Reads `--security-opt`, with Docker's rules and words. There is neither AppArmor nor SELinux in the guest, which is to say
/// what Docker says on a host without them.
pub(crate) fn security(options: &[String]) -> Result<SecurityOptions> {
    let mut read = SecurityOptions::default();
    for option in options {
        let shown = || option.chars().take(80).collect::<String>();
        match option.as_str() {
            "no-new-privileges" => read.no_new_privileges = true,
            // Of labels.
            "disable" => {}
            _ => {
                let separator = if option.contains('=') { '=' } else { ':' };
                let Some((name, value)) = option.split_once(separator) else {
                    return Err(Error::invalid(format!("invalid --security-opt 1: {:?}", shown())));
                };
                match (name, value) {
                    ("label", _) => {}
                    ("apparmor", "" | "unconfined" | "docker-default") => {}
                    ("apparmor", _) => {
                        return Err(Error::invalid(
                            "AppArmor is not supported in Coracle's VM: the profile cannot be applied",
                        ));
                    }
                    ("seccomp", value) => read.seccomp = Some(seccomp::parse(value)?),
                    ("no-new-privileges", "true" | "1" | "t" | "T" | "TRUE" | "True") => {
                        read.no_new_privileges = true;
                    }
                    ("no-new-privileges", "false" | "0" | "f" | "F" | "FALSE" | "False") => {
                        read.no_new_privileges = false;
                    }
                    ("writable-cgroups", "true" | "1" | "t" | "T" | "TRUE" | "True") => {
                        read.writable_cgroups = true;
                    }
                    ("writable-cgroups", "false" | "0" | "f" | "F" | "FALSE" | "False") => {
                        read.writable_cgroups = false;
                    }
                    _ => return Err(Error::invalid(format!("invalid --security-opt 2: {:?}", shown()))),
                }
            }
        }
    }
    Ok(read)
}

/// Converts `--ulimit`.
pub(crate) fn rlimits(ulimits: &[Ulimit]) -> Result<Vec<Rlimit>> {
    const NAMES: &[&str] = &[
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ];
    let limit = |value: i64| u64::try_from(value).unwrap_or(u64::MAX);
    let convert = |ulimit: &Ulimit| {
        let Ulimit { name, soft, hard } = ulimit;
        if !NAMES.contains(&name.as_str()) {
            return Err(Error::invalid(format!(
                "invalid ulimit type: {}",
                name.chars().take(40).collect::<String>()
            )));
        }
        if limit(*soft) > limit(*hard) {
            return Err(Error::invalid(format!(
                "ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
            )));
        }
        Ok(Rlimit { name: name.clone(), soft: limit(*soft), hard: limit(*hard) })
    };
    ulimits.iter().map(convert).collect()
}

/// Converts `--tmpfs`.
pub(crate) fn tmpfs(host: &HostConfig) -> Result<Vec<TmpfsMount>> {
    let convert = |(path, options): (&String, &String)| {
        if !path.starts_with('/') || path == "/" || path.contains('\0') {
            let shown: String = path.chars().take(80).collect();
            return Err(Error::invalid(format!(
                "invalid mount path: '{shown}' mount path must be absolute, and not `/`"
            )));
        }
        Ok(TmpfsMount { path: path.clone(), options: options.clone() })
    };
    let mut tmpfs: Vec<TmpfsMount> = host.tmpfs.iter().map(convert).collect::<Result<_>>()?;
    tmpfs.extend(mounts::tmpfs(host)?);
    Ok(tmpfs)
}

/// Converts `--add-host NAME:ADDRESS` to lines of /etc/hosts.
pub(crate) fn hosts_line(text: &str, host_gateway: &[IpAddr]) -> Result<String> {
    let (name, address) = split_host(text)?;
    let addresses = match &address {
        Some(address) => std::slice::from_ref(address),
        None => host_gateway,
    };
    Ok(addresses.iter().map(|address| format!("{address}\t{name}\n")).collect())
}

/// A name and an address; none is the host's.
fn split_host(text: &str) -> Result<(&str, Option<IpAddr>)> {
    let bad = |why: &str| {
        Error::invalid(format!(
            "bad format for add-host: {:?}: {why}",
            text.chars().take(80).collect::<String>()
        ))
    };
    let (name, address) = text.split_once([':', '=']).ok_or_else(|| bad("expected NAME:ADDRESS"))?;
    let legal = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    if address == "host-gateway" {
        return if legal { Ok((name, None)) } else { Err(bad("invalid name")) };
    }
    let bare = address.trim_start_matches('[').trim_end_matches(']');
    let address: IpAddr = bare.parse().map_err(|_| bad("invalid IP address"))?;
    if legal { Ok((name, Some(address))) } else { Err(bad("invalid name")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<CreateRequest> {
        CreateRequest::parse(json.as_bytes())
    }

    fn host(json: &str) -> Result<CreateRequest> {
        parse(&format!(r#"{{"Image":"x","HostConfig":{json}}}"#))
    }

    #[test]
    fn wrong_types_and_values_are_refused_with_a_sentence() {
        for bad in [
            "",
            "[]",
            "{",
            r#"{"Image":7}"#,
            r#"{"Image":"x","Env":"A=1"}"#,
            r#"{"Image":"x","Env":["=1"]}"#,
            r#"{"Image":"x","Tty":"yes"}"#,
            r#"{"Image":"x","WorkingDir":"rel"}"#,
            r#"{"Image":"x","StopSignal":"NOPE"}"#,
            r#"{"Image":"x","HostConfig":[]}"#,
            r#"{"Image":"x","Hostname":"a/b"}"#,
            r#"{}"#,
        ] {
            assert_eq!(parse(bad).unwrap_err().status(), 400, "{bad}");
        }
        for bad in [
            r#"{"Memory":1}"#,
            r#"{"Memory":-5}"#,
            r#"{"Memory":9223372036854775808}"#,
            r#"{"MemorySwap":8000000}"#,
            r#"{"NanoCpus":-1}"#,
            r#"{"NanoCpus":1000000000,"CpuQuota":5000}"#,
            r#"{"CpusetCpus":"../x"}"#,
            r#"{"OomScoreAdj":1001}"#,
            r#"{"ShmSize":-1}"#,
            r#"{"Ulimits":[{"Name":"x","Soft":1,"Hard":1}]}"#,
            r#"{"Tmpfs":{"rel":""}}"#,
            r#"{"CapAdd":["FLY"]}"#,
            r#"{"LogConfig":{"Type":"json-file","Config":{"max-size":"big"}}}"#,
            r#"{"ExtraHosts":["a:b"]}"#,
            r#"{"RestartPolicy":{"Name":"sometimes"}}"#,
            r#"{"RestartPolicy":{"Name":"always"},"AutoRemove":true}"#,
            r#"{"SecurityOpt":["seccomp=/a/file.json"]}"#,
            r#"{"SecurityOpt":["nonsense"]}"#,
            r#"{"SecurityOpt":["apparmor=mine"]}"#,
            r#"{"SecurityOpt":["no-new-privileges=maybe"]}"#,
        ] {
            assert_eq!(host(bad).unwrap_err().status(), 400, "{bad}");
        }
        for missing in [r#"{"StorageOpt":{"size":"1g"}}"#, r#"{"LogConfig":{"Type":"syslog"}}"#] {
            assert_eq!(host(missing).unwrap_err().status(), 501, "{missing}");
        }
    }

    #[test]
    fn nulls_and_unknown_members_are_as_if_not_there() {
        let request = parse(
            r#"{"Image":"x","Env":null,"Cmd":null,"Frobnicate":1,"HostConfig":{"CapAdd":null,"PidsLimit":null}}"#,
        );
        assert!(request.unwrap().config.env.is_empty());
    }
}
