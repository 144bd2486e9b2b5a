//! The options of `run`, `create` and `exec`, and the request that they make.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::{
    SessionArgs,
    isolation::{Isolation, IsolationOptions, security_option},
    mount::{Mount, mount, volume},
    network::{HostNetwork, NetworkOptions},
    size,
};

#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "coracle run [OPTIONS] IMAGE [COMMAND] [ARG...]")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) create: CreateOptions,
    /// Leave it running and print its id
    #[arg(short, long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) session: SessionArgs,
    /// Say on standard error where the time went
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub(crate) timings: Option<TimingsFormat>,
}

/// When an image is pulled before a container is made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PullPolicy {
    Always,
    Missing,
    Never,
}

/// How timings are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TimingsFormat {
    Table,
    Json,
}

#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "coracle create [OPTIONS] IMAGE [COMMAND] [ARG...]")]
pub(crate) struct CreateOptions {
    /// Keep its standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Remove it when it has ended
    #[arg(long)]
    pub(crate) rm: bool,
    /// When to get the image from a registry
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = PullPolicy::Missing)]
    pub(crate) pull: PullPolicy,
    /// Its name
    #[arg(long)]
    name: Option<String>,
    /// Environment variables, NAME=VALUE; NAME alone takes the value from here
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Files of environment variables
    #[arg(long, value_name = "FILE")]
    env_file: Vec<String>,
    /// Working directory inside
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// User name or id, with an optional :GROUP
    #[arg(short, long)]
    user: Option<String>,
    /// Further groups
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    /// The command instead of the image's entry point
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Host name inside
    #[arg(short = 'h', long)]
    hostname: Option<String>,
    /// NIS domain name inside
    #[arg(long)]
    domainname: Option<String>,
    /// Labels, KEY=VALUE
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Run an init that forwards signals and reaps processes
    #[arg(long)]
    init: bool,
    /// Most memory, for example 512m
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Memory and swap together; -1 is unlimited swap
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory_swap: Option<String>,
    /// Memory that is kept for it under pressure
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory_reservation: Option<u64>,
    /// Most processors, for example 1.5
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<f64>,
    /// Weight among containers that want the processors
    #[arg(short, long, value_name = "SHARES")]
    cpu_shares: Option<u32>,
    /// The processors that it may use, for example 0-2,4
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Most processes
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Make its root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Mount a volume, or a directory or a file of the host: NAME:PATH or ./HERE:PATH, with :ro to read only
    #[arg(short, long, value_name = "[NAME:]PATH[:OPTIONS]")]
    volume: Vec<String>,
    /// Mount a volume, something of the host, or a tmpfs: type=volume|bind|tmpfs,src=SOURCE,dst=PATH
    #[arg(long, value_name = "FIELDS")]
    mount: Vec<String>,
    /// Mount the volumes of another container
    #[arg(long, value_name = "CONTAINER[:ro]")]
    volumes_from: Vec<String>,
    /// Mount a tmpfs
    #[arg(long, value_name = "PATH[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// Size of /dev/shm
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shm_size: Option<u64>,
    /// Resource limits
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    ulimit: Vec<String>,
    /// Give it capabilities
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Take capabilities from it
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// Security options, for example no-new-privileges
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    #[command(flatten)]
    network: NetworkOptions,
    /// The signal that stops it
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// Seconds that it has to stop
    #[arg(long, value_name = "SECONDS")]
    stop_timeout: Option<i64>,
    #[command(flatten)]
    isolation: IsolationOptions,
    /// Print help
    #[arg(long, action = clap::ArgAction::HelpLong)]
    help: Option<bool>,
    /// The image, then the command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE")]
    pub(crate) image_and_command: Vec<String>,
}

/// The body of `POST /containers/create`, as far as these options reach.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct CreateBody {
    image: String,
    cmd: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    env: Vec<String>,
    working_dir: String,
    user: String,
    hostname: String,
    domainname: String,
    labels: BTreeMap<String, String>,
    tty: bool,
    open_stdin: bool,
    stdin_once: bool,
    attach_stdin: bool,
    attach_stdout: bool,
    attach_stderr: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_signal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_timeout: Option<i64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    exposed_ports: BTreeMap<String, Value>,
    host_config: HostConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    networking_config: Option<Value>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfig {
    auto_remove: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    init: bool,
    readonly_rootfs: bool,
    #[serde(skip_serializing_if = "is_zero")]
    memory: u64,
    #[serde(skip_serializing_if = "is_zero")]
    memory_swap: i64,
    #[serde(skip_serializing_if = "is_zero")]
    memory_reservation: u64,
    #[serde(skip_serializing_if = "is_zero", rename = "NanoCpus")]
    nano_cpus: i64,
    #[serde(skip_serializing_if = "is_zero")]
    cpu_shares: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    cpuset_cpus: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pids_limit: Option<i64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tmpfs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    binds: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<Mount>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    volumes_from: Vec<String>,
    #[serde(skip_serializing_if = "is_zero")]
    shm_size: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ulimits: Vec<Ulimit>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cap_add: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cap_drop: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    group_add: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    security_opt: Vec<String>,
    #[serde(flatten)]
    network: HostNetwork,
    #[serde(flatten)]
    isolation: Isolation,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Ulimit {
    name: String,
    soft: i64,
    hard: i64,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl CreateOptions {
    /// The container's name, if one was given.
    pub(crate) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The image's name.
    pub(crate) fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// The request; `attached` says whether somebody will see its output.
    pub(crate) fn body(&self, attached: bool) -> Result<CreateBody> {
        let command = self.image_and_command.get(1..).unwrap_or_default();
        Ok(CreateBody {
            image: self.image().to_owned(),
            cmd: (!command.is_empty()).then(|| command.to_vec()),
            entrypoint: self.entrypoint.as_ref().map(|entry| vec![entry.clone()]),
            env: environment(&self.env_file, &self.env)?,
            working_dir: self.workdir.clone().unwrap_or_default(),
            user: self.user.clone().unwrap_or_default(),
            hostname: self.hostname.clone().unwrap_or_default(),
            domainname: self.domainname.clone().unwrap_or_default(),
            labels: self.label.iter().map(|label| key_and_value(label, '=')).collect(),
            tty: self.tty,
            open_stdin: self.interactive,
            stdin_once: self.interactive && attached,
            attach_stdin: self.interactive && attached,
            attach_stdout: attached,
            attach_stderr: attached,
            stop_signal: self.stop_signal.clone(),
            stop_timeout: self.stop_timeout,
            exposed_ports: self.network.exposed()?,
            host_config: self.host_config()?,
            networking_config: self.network.endpoints(),
        })
    }

    fn host_config(&self) -> Result<HostConfig> {
        Ok(HostConfig {
            auto_remove: self.rm,
            init: self.init,
            readonly_rootfs: self.read_only,
            memory: self.memory.unwrap_or(0),
            memory_swap: self.memory_swap.as_deref().map(memory_swap).transpose()?.unwrap_or(0),
            memory_reservation: self.memory_reservation.unwrap_or(0),
            nano_cpus: self.cpus.map(nano_cpus).transpose()?.unwrap_or(0),
            cpu_shares: self.cpu_shares.unwrap_or(0),
            cpuset_cpus: self.cpuset_cpus.clone().unwrap_or_default(),
            pids_limit: self.pids_limit,
            tmpfs: self.tmpfs.iter().map(|mount| key_and_value(mount, ':')).collect(),
            binds: self.volume.iter().map(|text| volume(text)).collect::<Result<_>>()?,
            mounts: self.mount.iter().map(|text| mount(text)).collect::<Result<_>>()?,
            volumes_from: self.volumes_from.clone(),
            shm_size: self.shm_size.unwrap_or(0),
            ulimits: self.ulimit.iter().map(|limit| ulimit(limit)).collect::<Result<_>>()?,
            cap_add: self.cap_add.clone(),
            cap_drop: self.cap_drop.clone(),
            group_add: self.group_add.clone(),
            security_opt: self
                .security_opt
                .iter()
                .map(|text| security_option(text))
                .collect::<Result<_>>()?,
            network: self.network.host()?,
            isolation: self.isolation.body()?,
        })
    }
}

#[derive(Debug, Args)]
#[command(override_usage = "coracle exec [OPTIONS] CONTAINER COMMAND [ARG...]")]
pub(crate) struct ExecArgs {
    /// Pass on standard input
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Leave it running
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Environment variables, NAME=VALUE; NAME alone takes the value from here
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Files of environment variables
    #[arg(long, value_name = "FILE")]
    env_file: Vec<String>,
    /// Working directory inside
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// User name or id, with an optional :GROUP
    #[arg(short, long)]
    user: Option<String>,
    /// Give it all capabilities
    #[arg(long)]
    privileged: bool,
    /// The keys that leave the command running
    #[arg(long, value_name = "KEYS", default_value = crate::terminal::DetachKeys::DEFAULT)]
    pub(crate) detach_keys: String,
    /// The container, then the command and its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, value_name = "CONTAINER")]
    container_and_command: Vec<String>,
}

/// The body of `POST /containers/{id}/exec`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct ExecBody {
    cmd: Vec<String>,
    env: Vec<String>,
    working_dir: String,
    user: String,
    privileged: bool,
    tty: bool,
    attach_stdin: bool,
    attach_stdout: bool,
    attach_stderr: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    console_size: Option<[u16; 2]>,
}

impl ExecArgs {
    /// The container.
    pub(crate) fn container(&self) -> &str {
        self.container_and_command.first().map_or("", String::as_str)
    }

    /// The request.
    pub(crate) fn body(&self) -> Result<ExecBody> {
        Ok(ExecBody {
            cmd: self.container_and_command.get(1..).unwrap_or_default().to_vec(),
            env: environment(&self.env_file, &self.env)?,
            working_dir: self.workdir.clone().unwrap_or_default(),
            user: self.user.clone().unwrap_or_default(),
            privileged: self.privileged,
            tty: self.tty,
            attach_stdin: self.interactive && !self.detach,
            attach_stdout: !self.detach,
            attach_stderr: !self.detach,
            console_size: self
                .tty
                .then(crate::terminal::size)
                .flatten()
                .map(|size| [size.rows, size.columns]),
        })
    }
}

/// Variables from files, then from options; a name without a value takes it from coracle's own environment, or goes.
fn environment(files: &[String], options: &[String]) -> Result<Vec<String>> {
    let mut variables = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the environment file {file}"))?;
        let lines =
            text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
        for line in lines {
            variables.extend(variable(line)?);
        }
    }
    for option in options {
        variables.extend(variable(option)?);
    }
    Ok(variables)
}

fn variable(text: &str) -> Result<Option<String>> {
    if text.is_empty() || text.starts_with('=') {
        bail!("`{text}` is no environment variable: it has no name");
    }
    if text.contains('=') {
        return Ok(Some(text.to_owned()));
    }
    Ok(std::env::var(text).ok().map(|value| format!("{text}={value}")))
}

fn key_and_value(text: &str, separator: char) -> (String, String) {
    let (key, value) = text.split_once(separator).unwrap_or((text, ""));
    (key.to_owned(), value.to_owned())
}

fn nano_cpus(cpus: f64) -> Result<i64> {
    if !(0.01..=4096.0).contains(&cpus) {
        bail!("cannot limit a container to {cpus} processors: expected 0.01 or more");
    }
    Ok((cpus * 1e9).round() as i64)
}

fn memory_swap(text: &str) -> Result<i64> {
    if text == "-1" {
        return Ok(-1);
    }
    Ok(i64::try_from(crate::units::parse_size(text)?)?)
}

fn ulimit(text: &str) -> Result<Ulimit> {
    let parse = || {
        let (name, limits) = text.split_once('=')?;
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        Some(Ulimit { name: name.to_owned(), soft: soft.parse().ok()?, hard: hard.parse().ok()? })
    };
    parse().with_context(|| format!("`{text}` is no resource limit: expected NAME=SOFT[:HARD]"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Create {
        #[command(flatten)]
        options: CreateOptions,
    }

    fn body(arguments: &str) -> CreateBody {
        let words = std::iter::once("create").chain(arguments.split_whitespace());
        Create::try_parse_from(words).unwrap().options.body(true).unwrap()
    }

    #[test]
    fn options_become_dockers_fields() {
        let made = body(
            "-i --rm -e A=1 -w /w -u 1:2 --entrypoint sh -h box -l k=v -l bare --init -m 512m --cpus 1.5 --read-only \
             --tmpfs /run:size=1m --ulimit nofile=10:20 --pids-limit 7 busybox -c true",
        );
        let json = serde_json::to_value(&made).unwrap();
        assert_eq!(json["Image"], "busybox");
        assert_eq!(json["Cmd"], serde_json::json!(["-c", "true"]));
        assert_eq!(json["Entrypoint"], serde_json::json!(["sh"]));
        assert_eq!(json["Env"], serde_json::json!(["A=1"]));
        assert_eq!(json["Labels"], serde_json::json!({"k": "v", "bare": ""}));
        assert_eq!((json["WorkingDir"].as_str(), json["User"].as_str()), (Some("/w"), Some("1:2")));
        assert_eq!((json["OpenStdin"].as_bool(), json["StdinOnce"].as_bool()), (Some(true), Some(true)));
        let host = &json["HostConfig"];
        assert_eq!(host["AutoRemove"], true);
        assert_eq!(host["Memory"], 512 << 20);
        assert_eq!(host["NanoCpus"], 1_500_000_000i64);
        assert_eq!(host["ReadonlyRootfs"], true);
        assert_eq!(host["Tmpfs"], serde_json::json!({"/run": "size=1m"}));
        assert_eq!(host["Ulimits"], serde_json::json!([{"Name": "nofile", "Soft": 10, "Hard": 20}]));
        assert_eq!(host["PidsLimit"], 7);
    }

    #[test]
    fn what_was_not_said_is_left_to_the_image() {
        let json = serde_json::to_value(body("busybox")).unwrap();
        assert!(json["Cmd"].is_null() && json["Entrypoint"].is_null());
        assert!(json["HostConfig"].get("PidsLimit").is_none() && json.get("StopSignal").is_none());
    }

    #[test]
    fn a_variable_without_a_value_comes_from_here_or_goes() {
        assert_eq!(variable("A=").unwrap().as_deref(), Some("A="));
        assert_eq!(variable("CORACLE_SURELY_UNSET").unwrap(), None);
        assert!(variable("PATH").unwrap().unwrap().starts_with("PATH="));
        assert!(variable("=x").is_err());
    }

    #[test]
    fn limits_out_of_range_are_refused() {
        assert!(nano_cpus(0.0).is_err() && nano_cpus(f64::NAN).is_err() && nano_cpus(-1.0).is_err());
        assert!(ulimit("nofile").is_err() && ulimit("nofile=a:b").is_err());
    }
}
