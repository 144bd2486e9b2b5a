//! From a container's record to what the agent is told to start.

use coracle_agent_api::{
    BindMount, ContainerSpec, InjectedFile, IpcMode, Layer, Network, PidMode, ProcessSpec, Seccomp,
    TerminalSize, VolumeMount,
};

use super::{
    capability,
    config::{Config, env_name},
    isolation, options,
    record::Record,
    resources,
};
use crate::{
    error::Result,
    networks::{self, links::Link},
    ports::wanted::Protocol,
};

/// Docker's search path for programs.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READONLY_PATHS: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What a container has of others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Donors {
    pub(crate) ipc: IpcMode,
    pub(crate) pid: PidMode,
    pub(crate) network: Network,
    /// Whom it knows by `--link`.
    pub(crate) links: Vec<Link>,
    /// The domains in which the host looks names up.
    pub(crate) search: Vec<String>,
}

/// What is mounted in a container, as its sandbox knows it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mounts {
    pub(crate) volumes: Vec<VolumeMount>,
    pub(crate) binds: Vec<BindMount>,
}

/// Builds the specification.
pub(crate) fn build(
    record: &Record,
    layers: Vec<Layer>,
    donors: Donors,
    Mounts { volumes, binds }: Mounts,
) -> Result<ContainerSpec> {
    let host = &record.host_config;
    let security = options::security(&host.security_opt)?;
    let hidden = |given: Option<&Vec<String>>, defaults: &[&str]| match host.privileged {
        true => Vec::new(),
        false => paths(given, defaults),
    };
    let mut files = files(record, &donors.links, &donors.search)?;
    // Whoever mounts such a file wants that one.
    files.retain(|file| !binds.iter().any(|bind| bind.path == file.path));
    Ok(ContainerSpec {
        layers,
        hostname: record.config.hostname.clone(),
        domainname: record.config.domainname.clone(),
        process: process(record, &donors.links)?,
        readonly_rootfs: host.readonly_rootfs,
        init: host.init.unwrap_or(false),
        shm_size: u64::try_from(host.shm_size)
            .ok()
            .filter(|size| *size > 0)
            .unwrap_or(options::DEFAULT_SHM.unsigned_abs()),
        tmpfs: options::tmpfs(host)?,
        volumes,
        binds,
        files,
        masked_paths: hidden(host.masked_paths.as_ref(), MASKED_PATHS),
        readonly_paths: hidden(host.readonly_paths.as_ref(), READONLY_PATHS),
        resources: resources::convert(host),
        seccomp: security.seccomp.unwrap_or(if host.privileged {
            Seccomp::Unconfined
        } else {
            Seccomp::Default
        }),
        privileged: host.privileged,
        writable_cgroups: security.writable_cgroups,
        devices: isolation::devices(host)?,
        device_rules: isolation::device_rules(host)?,
        sysctls: host.sysctls.clone(),
        ipc: donors.ipc,
        pid: donors.pid,
        network: donors.network,
        published_ports: published_ports(record),
        name_servers: networks::files::name_servers(host)?,
        host_uts: host.uts_mode == "host",
        host_cgroups: host.cgroupns_mode == "host",
        cgroup_parent: host.cgroup_parent.clone(),
    })
}

fn process(record: &Record, links: &[Link]) -> Result<ProcessSpec> {
    let (config, host) = (&record.config, &record.host_config);
    let [rows, cols] = host.console_size.map(|size| u16::try_from(size).unwrap_or(u16::MAX));
    Ok(ProcessSpec {
        args: config.command(),
        env: environment(config, &links.iter().flat_map(|link| link.env.clone()).collect::<Vec<_>>()),
        cwd: working_dir(config),
        user: config.user.clone(),
        additional_groups: host.group_add.clone(),
        tty: config.tty,
        terminal_size: (config.tty && rows > 0 && cols > 0).then_some(TerminalSize { rows, cols }),
        stdin: config.open_stdin,
        capabilities: match host.privileged {
            true => capability::all(),
            false => capability::resolve(&host.cap_add, &host.cap_drop)?,
        },
        no_new_privileges: options::security(&host.security_opt)?.no_new_privileges,
        rlimits: options::rlimits(&host.ulimits)?,
        oom_score_adj: i16::try_from(host.oom_score_adj).ok().filter(|value| *value != 0),
    })
}

fn published_ports(record: &Record) -> Vec<u16> {
    let tcp = record.ports.iter().filter(|published| published.protocol == Protocol::Tcp);
    let mut ports: Vec<u16> = tcp.map(|published| published.port).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// The working directory of a container's processes.
pub(crate) fn working_dir(config: &Config) -> String {
    if config.working_dir.is_empty() { "/".to_owned() } else { config.working_dir.clone() }
}

/// The environment: Docker's own variables, then the container's, then further ones; the last of a name wins, and one without
/// `=` takes the name away.
pub(crate) fn environment(config: &Config, further: &[String]) -> Vec<String> {
    let mut env = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={}", config.hostname)];
    if config.tty {
        env.push("TERM=xterm".to_owned());
    }
    for variable in config.env.iter().chain(further) {
        set(&mut env, variable);
    }
    env
}

/// Sets a variable, or takes it away if there is no `=`.
fn set(env: &mut Vec<String>, variable: &str) {
    let known = env.iter().position(|other| env_name(other) == env_name(variable));
    match (known, variable.contains('=')) {
        (Some(at), true) => variable.clone_into(&mut env[at]),
        (Some(at), false) => drop(env.remove(at)),
        (None, true) => env.push(variable.to_owned()),
        (None, false) => {}
    }
}

/// The files that are mounted in a container.
pub(super) fn files(record: &Record, links: &[Link], search: &[String]) -> Result<Vec<InjectedFile>> {
    let hostname = &record.config.hostname;
    let hosts = networks::files::hosts(record, links)?;
    let file = |path: &str, contents: String| InjectedFile { path: path.to_owned(), contents };
    Ok(vec![
        file("/etc/hostname", format!("{hostname}\n")),
        file("/etc/hosts", hosts),
        file("/etc/resolv.conf", networks::files::resolv_conf(record, search)),
    ])
}

fn paths(given: Option<&Vec<String>>, defaults: &[&str]) -> Vec<String> {
    given.cloned().unwrap_or_else(|| defaults.iter().map(|path| (*path).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{container::options::CreateRequest, sandbox::SandboxId};

    fn spec(json: &str) -> ContainerSpec {
        let CreateRequest { config, host_config, .. } = CreateRequest::parse(json.as_bytes()).unwrap();
        let image = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let id = "a".repeat(64).parse().unwrap();
        let name = "web".to_owned();
        let record =
            Record::new(id, name, SandboxId::shared(), &image, "linux/amd64".to_owned(), config, host_config);
        build(&record, Vec::new(), Donors::default(), Mounts::default()).unwrap()
    }

    #[test]
    fn a_plain_container_gets_dockers_defaults() {
        let spec = spec(r#"{"Image":"x","Cmd":["a","b"],"Hostname":"h"}"#);
        assert_eq!(spec.process.args, ["a", "b"]);
        assert_eq!(spec.process.cwd, "/");
        assert_eq!(spec.process.env, [DEFAULT_PATH, "HOSTNAME=h"]);
        assert_eq!(spec.process.capabilities.len(), 14);
        assert_eq!(spec.shm_size, 64 << 20);
        assert!(spec.masked_paths.contains(&"/proc/kcore".to_owned()));
        assert!(!spec.process.stdin && !spec.process.tty && !spec.init);
    }

    #[test]
    fn the_environment_is_overridden_and_taken_away() {
        let spec = spec(r#"{"Image":"x","Cmd":["a"],"Tty":true,"Env":["PATH=/x","HOSTNAME","A=1"]}"#);
        assert_eq!(spec.process.env, ["PATH=/x", "TERM=xterm", "A=1"]);
    }

    #[test]
    fn options_reach_the_agent() {
        let spec = spec(
            r#"{"Image":"x","Cmd":["a"],"Tty":true,"OpenStdin":true,"HostConfig":{"ConsoleSize":[40,120],"Init":true,
                "ReadonlyRootfs":true,"Tmpfs":{"/tmp":"size=1m"},"MaskedPaths":[],"CapDrop":["ALL"],"GroupAdd":["7"],
                "SecurityOpt":["no-new-privileges"],"Ulimits":[{"Name":"nofile","Soft":10,"Hard":-1}],"OomScoreAdj":-5,
                "ExtraHosts":["db:10.0.0.1"]}}"#,
        );
        assert_eq!(spec.process.terminal_size, Some(TerminalSize { rows: 40, cols: 120 }));
        assert!(spec.init && spec.readonly_rootfs && spec.process.no_new_privileges && spec.process.stdin);
        assert_eq!(spec.tmpfs[0].options, "size=1m");
        assert!(spec.masked_paths.is_empty() && spec.process.capabilities.is_empty());
        assert_eq!((spec.process.rlimits[0].soft, spec.process.rlimits[0].hard), (10, u64::MAX));
        assert_eq!(spec.process.oom_score_adj, Some(-5));
        assert!(spec.files[1].contents.contains("10.0.0.1\tdb\n"));
    }
}
