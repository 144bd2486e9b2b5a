//! Bodies of requests and answers.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{Device, DeviceRule, DiffId, IpcMode, Network, PidMode, ProcessId, Seccomp, TreeName, VolumeId};

/// What the agent says first, on its own connection to the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// The agent's [`crate::API_VERSION`]; the daemon gives up on another than its own.
    pub api_version: u32,
    /// The agent's package version.
    pub agent_version: String,
    /// Release of the guest's kernel, as `uname -r` says it.
    pub kernel_release: String,
    /// What happened when on the way to being ready.
    pub phases: Vec<Phase>,
}

/// A moment of the boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// For example `agent-started`, `mounted`, `ready`.
    pub name: String,
    /// Microseconds since the guest kernel's start (its CLOCK_BOOTTIME).
    pub guest_micros: u64,
}

/// Where the agent finds a layer's EROFS image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum LayerSource {
    /// A range of the layers disk, which the agent makes a partition with the BLKPG ioctl.
    Partition {
        /// Number of the partition, 1 to 255.
        number: u8,
        /// First byte on the disk; a multiple of 4096.
        start: u64,
        /// Length in bytes; a multiple of 4096.
        len: u64,
    },
    /// A file in the agent's own file system (where the agent runs without a VM).
    File {
        /// Its absolute path.
        path: String,
    },
}

/// Where a tree of the host, a directory or a single file, is in the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum TreeSource {
    /// An entry in the root of the file system that the host exports with the tag [`crate::HOST_TAG`].
    Shared {
        /// The entry.
        name: TreeName,
    },
    /// No tree, but the socket of the daemon's API: what connects to it is asked for by [`crate::egress::Request::Engine`].
    Engine,
    /// In the agent's own file system (where the agent runs without a VM).
    Path {
        /// Its absolute path.
        path: String,
    },
}

/// A layer of a container's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// What the layer is called; one mount serves all containers that use it.
    pub diff_id: DiffId,
    /// Where its image is.
    pub source: LayerSource,
}

/// Everything needed to start a container. The daemon owns the facts and sends them whole with each start; the agent keeps
/// only the writable layer from one start to the next.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSpec {
    /// Lowest first, as in the image's `rootfs.diff_ids`. Empty layers are legal; no layer at all is not.
    pub layers: Vec<Layer>,
    /// Host name inside (UTS namespace).
    pub hostname: String,
    /// NIS domain name inside; empty means the kernel's default.
    #[serde(default)]
    pub domainname: String,
    /// The first process.
    pub process: ProcessSpec,
    /// Mount the root file system read-only.
    #[serde(default)]
    pub readonly_rootfs: bool,
    /// Run a small init as PID 1 that forwards signals and reaps.
    #[serde(default)]
    pub init: bool,
    /// Size of /dev/shm in bytes.
    pub shm_size: u64,
    /// Further tmpfs mounts.
    #[serde(default)]
    pub tmpfs: Vec<TmpfsMount>,
    /// Volumes to mount; together with `tmpfs`, what lies deeper is mounted later.
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// Trees of the host to mount, in order of depth with `tmpfs` and `volumes`.
    #[serde(default)]
    pub binds: Vec<BindMount>,
    /// Files that the daemon writes for the container (`/etc/hosts` and the like): bind mounts from the agent's own copy.
    #[serde(default)]
    pub files: Vec<InjectedFile>,
    /// Paths that are hidden from the container.
    #[serde(default)]
    pub masked_paths: Vec<String>,
    /// Paths that the container can only read.
    #[serde(default)]
    pub readonly_paths: Vec<String>,
    /// Limits; none set means none.
    #[serde(default)]
    pub resources: Resources,
    /// Which system calls its processes may make, those that join it included.
    #[serde(default)]
    pub seccomp: Seccomp,
    /// All capabilities and devices, and a writable /sys. What is hidden or read-only in /proc is said apart.
    #[serde(default)]
    pub privileged: bool,
    /// Its part of /sys/fs/cgroup is writable.
    #[serde(default)]
    pub writable_cgroups: bool,
    /// Devices besides those that every container has.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// Further devices that it may use.
    #[serde(default)]
    pub device_rules: Vec<DeviceRule>,
    /// Parameters of its own namespaces, by their names with dots.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
    /// With whom it shares memory.
    #[serde(default)]
    pub ipc: IpcMode,
    /// Whose processes it sees.
    #[serde(default)]
    pub pid: PidMode,
    /// Its interfaces.
    #[serde(default)]
    pub network: Network,
    /// TCP ports that are published; see [`crate::ports`].
    #[serde(default)]
    pub published_ports: Vec<u16>,
    /// Name servers that are asked, from its own network, instead of the host's.
    #[serde(default)]
    pub name_servers: Vec<IpAddr>,
    /// It has the guest's host name.
    #[serde(default)]
    pub host_uts: bool,
    /// It sees the guest's cgroups.
    #[serde(default)]
    pub host_cgroups: bool,
    /// Path of the group that its own is made in, below that of all containers; empty is that one itself.
    #[serde(default)]
    pub cgroup_parent: String,
}

/// A tmpfs in a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TmpfsMount {
    /// Absolute path in the container.
    pub path: String,
    /// Mount options as in `docker run --tmpfs PATH:OPTIONS`; empty means Docker's defaults (`noexec,nosuid,nodev`).
    #[serde(default)]
    pub options: String,
}

/// A volume in a container. The volume is made, empty, if the guest does not have it yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeMount {
    /// Which one.
    pub volume: VolumeId,
    /// Absolute path in the container.
    pub path: String,
    /// The directory in the volume that is mounted, relative to its root, where it must exist; empty means the whole volume.
    #[serde(default)]
    pub subpath: String,
    /// The container can only read it.
    #[serde(default)]
    pub readonly: bool,
    /// If the volume is empty, fill it first with what the image has at `path`, whose owner and mode it takes over too.
    #[serde(default)]
    pub copy_up: bool,
}

/// A tree of the host in a container: a directory, or a single file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindMount {
    /// Where the tree is in the sandbox.
    pub source: TreeSource,
    /// Absolute path in the container.
    pub path: String,
    /// The container can only read it.
    #[serde(default)]
    pub readonly: bool,
}

/// A volume and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeUsage {
    /// Which one.
    pub volume: VolumeId,
    /// Bytes that its files take on the data disk.
    pub bytes: u64,
}

/// A file given by the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InjectedFile {
    /// Absolute path in the container.
    pub path: String,
    /// What it holds.
    pub contents: String,
}

/// Limits of a container's cgroup.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// `memory.max` in bytes. Here and below, `u64::MAX` is no limit.
    pub memory: Option<u64>,
    /// `memory.swap.max` in bytes (of swap alone).
    pub memory_swap: Option<u64>,
    /// `memory.low` in bytes.
    pub memory_reservation: Option<u64>,
    /// `cpu.max`: microseconds of CPU time in each period.
    pub cpu_quota: Option<u64>,
    /// `cpu.max`: the period in microseconds, 1,000 to 1,000,000.
    pub cpu_period: Option<u64>,
    /// Docker's CPU shares, 2 to 262144; the agent converts them to `cpu.weight`.
    pub cpu_shares: Option<u64>,
    /// `cpuset.cpus`, in the kernel's list format.
    pub cpuset_cpus: Option<String>,
    /// `cpuset.mems`, in the kernel's list format.
    pub cpuset_mems: Option<String>,
    /// `pids.max`.
    pub pids: Option<u64>,
    /// Docker's weight of block I/O, 10 to 1000.
    pub io_weight: Option<u16>,
    /// The same for single devices.
    pub io_device_weights: Vec<IoDeviceWeight>,
    /// `io.max`.
    pub io_limits: Vec<IoLimit>,
}

/// A weight for a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoDeviceWeight {
    /// The device's node in the guest.
    pub path: String,
    /// Docker's weight, 10 to 1000.
    pub weight: u16,
}

/// A limit for a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoLimit {
    /// The device's node in the guest.
    pub path: String,
    /// What is limited.
    pub what: IoLimitKind,
    /// Bytes or operations in a second.
    pub rate: u64,
}

/// What a limit of a block device is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoLimitKind {
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WriteBytes,
    /// Reads.
    ReadOperations,
    /// Writes.
    WriteOperations,
}

/// What a container has used, as its cgroup says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    /// When these were read, in nanoseconds since 1970.
    pub unix_nanos: u64,
    /// Processors of the guest.
    pub online_cpus: u32,
    /// Time of all processors of the guest, idle or not.
    pub system_cpu_nanos: u64,
    /// `cpu.stat`.
    pub cpu: BTreeMap<String, u64>,
    /// Memory; none where the guest does not count it.
    pub memory: Option<MemoryStats>,
    /// `pids.current`.
    pub pids: u64,
    /// `pids.max`, if there is one.
    pub pids_limit: Option<u64>,
    /// `io.stat`.
    pub io: Vec<IoStats>,
}

/// Memory that a container uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryStats {
    /// `memory.current`.
    pub usage: u64,
    /// `memory.max`, or what the guest has.
    pub limit: u64,
    /// `memory.stat`.
    pub stat: BTreeMap<String, u64>,
}

/// I/O of a container with one block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoStats {
    /// Of the device.
    pub major: u32,
    /// Of the device.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// A process of a container, as /proc tells of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessInfo {
    /// Process id in the guest's root pid namespace.
    pub pid: u32,
    /// Of its parent.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// Number of its terminal; 0 if it has none.
    pub terminal: u32,
    /// The group in the foreground of its terminal.
    pub terminal_group: i32,
    /// Real user and group, effective user and group.
    pub ids: [u32; 4],
    /// `R`, `S`, …
    pub state: String,
    /// The program's name, at most 15 bytes.
    pub name: String,
    /// The command with its arguments; empty for a zombie.
    pub arguments: Vec<String>,
    /// Threads.
    pub threads: u32,
    /// Priority.
    pub priority: i64,
    /// Niceness.
    pub nice: i64,
    /// When it was started, nanoseconds since 1970.
    pub started_unix_nanos: u64,
    /// Time on processors, in user and kernel mode.
    pub cpu_micros: u64,
    /// Address space in bytes.
    pub virtual_bytes: u64,
    /// Memory in bytes.
    pub resident_bytes: u64,
    /// Of it, locked.
    pub locked_bytes: u64,
    /// The processor it ran on last.
    pub processor: u32,
}

/// Answer of `GET /v1/containers/{id}/processes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processes {
    /// All memory of the guest in bytes.
    pub memory_bytes: u64,
    /// By process id.
    pub processes: Vec<ProcessInfo>,
}

/// A process to start.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessSpec {
    /// The command and its arguments; the command is looked up in the environment's PATH inside the container.
    pub args: Vec<String>,
    /// `NAME=value`. HOME is added from the user's passwd entry if it is missing.
    pub env: Vec<String>,
    /// Working directory inside; made if it does not exist (the container's first process only).
    pub cwd: String,
    /// As in `docker run --user`: empty, `name`, `uid`, each with an optional `:group` or `:gid`, looked up inside.
    #[serde(default)]
    pub user: String,
    /// Further groups, names or numbers, looked up inside.
    #[serde(default)]
    pub additional_groups: Vec<String>,
    /// Give it a terminal.
    #[serde(default)]
    pub tty: bool,
    /// The terminal's first size.
    #[serde(default)]
    pub terminal_size: Option<TerminalSize>,
    /// Keep its standard input open for the daemon; otherwise it is /dev/null.
    #[serde(default)]
    pub stdin: bool,
    /// Capabilities of the bounding and permitted sets, `CAP_…`; a user other than root has them in the bounding set only.
    pub capabilities: Vec<String>,
    /// Set no_new_privs.
    #[serde(default)]
    pub no_new_privileges: bool,
    /// Resource limits.
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    /// `oom_score_adj`, -1000 to 1000.
    #[serde(default)]
    pub oom_score_adj: Option<i16>,
}

/// A resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// As in `docker run --ulimit`: `nofile`, `nproc`, …
    pub name: String,
    /// The soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// The hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

/// A further process in a running container.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// The container.
    pub container: ProcessId,
    /// What to run.
    pub process: ProcessSpec,
    /// All capabilities, no masking of devices (`docker exec --privileged`).
    #[serde(default)]
    pub privileged: bool,
}

/// Answer to a start.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Started {
    /// Process id in the guest's root pid namespace.
    pub pid: u32,
    /// When the program was executed, nanoseconds since 1970.
    pub started_unix_nanos: u64,
    /// What happened when on the way: microseconds spent since the request was read.
    #[serde(default)]
    pub phases: Vec<StartPhase>,
}

/// A part of the time that a start took.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartPhase {
    /// For example `layers`, `clone`, `exec`.
    pub name: String,
    /// Microseconds since the request was read.
    pub micros: u64,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitStatus {
    /// The program's own code, or 128 + the signal that ended it.
    pub code: u8,
    /// The kernel killed a process of the container for want of memory while this process ran.
    pub oom_killed: bool,
    /// When, in nanoseconds since 1970.
    pub finished_unix_nanos: u64,
}

/// A process that the agent knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessState {
    /// Its id.
    pub id: ProcessId,
    /// The container it is in; the same as `id` for a container's first process.
    pub container: ProcessId,
    /// Process id in the guest's root pid namespace.
    pub pid: u32,
    /// When its program was executed, nanoseconds since 1970.
    pub started_unix_nanos: u64,
    /// How it ended, if it has.
    pub exit: Option<ExitStatus>,
    /// Its container is paused; only a container's first process says so.
    #[serde(default)]
    pub paused: bool,
    /// Sequence number of the newest frame that was acknowledged.
    pub acknowledged: u64,
}

/// Answer of `GET /v1/state`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentState {
    /// Running and ended processes that were not forgotten yet.
    pub processes: Vec<ProcessState>,
    /// Mounted layers.
    pub layers: Vec<Layer>,
}

/// Body of `POST /v1/containers/retain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retain {
    /// Containers whose writable layers stay.
    pub containers: Vec<ProcessId>,
    /// Volumes that stay; all of them if it is not there.
    pub volumes: Option<Vec<VolumeId>>,
}

/// Body of `POST /v1/processes/{id}/signal`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signal {
    /// Linux's number, 1 to 64.
    pub signal: u8,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

/// What went wrong, as data: the daemon decides by `kind`, never by the text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[serde(deny_unknown_fields)]
pub struct ApiError {
    /// Which class of failure.
    pub kind: ErrorKind,
    /// One sentence for people; no trailing full stop.
    pub message: String,
    /// The kernel's error number, where one was the reason.
    #[serde(default)]
    pub errno: Option<i32>,
}

impl ApiError {
    /// An error without an error number.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), errno: None }
    }
}

/// Classes of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request is malformed or a value is out of range.
    Invalid,
    /// No such process, container, layer or route.
    NotFound,
    /// It exists already, is in use, or has ended.
    Conflict,
    /// The program does not exist (Docker's exit code 127).
    CommandNotFound,
    /// The program cannot be executed (Docker's exit code 126).
    CommandNotExecutable,
    /// The container could not be set up for another reason (Docker's exit code 128).
    StartFailed,
    /// This guest cannot do that (for example, a cgroup controller is missing).
    Unsupported,
    /// The data disk is full.
    NoSpace,
    /// A bug, or the guest is broken.
    Internal,
}

impl ErrorKind {
    /// The HTTP status that goes with it.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid | Self::CommandNotFound | Self::CommandNotExecutable | Self::StartFailed => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Unsupported => 501,
            Self::NoSpace => 507,
            Self::Internal => 500,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_refused() {
        assert!(serde_json::from_str::<Signal>(r#"{"signal":9,"force":true}"#).is_err());
        assert!(serde_json::from_str::<Signal>(r#"{"signal":900}"#).is_err());
    }
}
