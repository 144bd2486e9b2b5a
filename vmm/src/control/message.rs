//! The messages of the control protocol. They are plain serde types that refuse unknown fields, so that a
//! misspelt option is an error and not a silent default.

use coracle_worker::control;
use serde::{Deserialize, Serialize};

/// What a client sends.
pub type FromClient = control::FromClient<Request>;
/// The reply to it.
pub type Reply = control::Reply<Answer>;
/// How a request went.
pub type Outcome = control::Outcome<Answer>;

/// What the guest mounts to have the file server's file system.
pub const FILE_SYSTEM_TAG: &str = "coracle";

/// A request. The descriptors that belong to it travel with the same message, in the order given here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Build the machine and start it. Descriptors: kernel, initramfs, data disk, the serial log if `serial`, and the file server's
    /// socket if `file_server`.
    Boot(Boot),
    /// Add a read-only segment to the layers disk. Descriptor: the segment's file.
    AttachSegment(AttachSegment),
    /// Remove the segment that starts at an offset.
    DetachSegment(DetachSegment),
    /// Connect to a port in the guest. Descriptor: the host's end of the stream.
    VsockConnect(VsockConnect),
    /// Accept the guest's connections to a port of the host.
    VsockListen(VsockListen),
    /// Report what the machine is doing.
    Status,
    /// Stop the processors until `resume`.
    Pause,
    /// Let the processors run again.
    Resume,
    /// End the machine at once.
    Stop,
}

impl Request {
    /// How many descriptors must come with this request.
    pub fn expected_fds(&self) -> usize {
        match self {
            Self::Boot(boot) => 3 + usize::from(boot.serial) + usize::from(boot.file_server),
            Self::AttachSegment(_) | Self::VsockConnect(_) => 1,
            _ => 0,
        }
    }
}

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRegion {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// The writable disk, `/dev/vda` in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataDisk {
    /// Capacity in bytes, a multiple of 4096; the file must be at least as long.
    pub len: u64,
}

/// How to build the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Number of processors, 1 to 64.
    pub vcpus: u32,
    /// Guest memory in MiB, at least 64 and even.
    pub memory_mib: u64,
    /// Where the uncompressed `vmlinux` stands in its file.
    pub kernel: FileRegion,
    /// Where the initramfs stands in its file.
    pub initramfs: FileRegion,
    /// The data disk, `/dev/vda`.
    pub data_disk: DataDisk,
    /// Capacity in bytes of the layers disk, `/dev/vdb`; a multiple of 4096.
    pub layers_capacity: u64,
    /// Words added to the end of the kernel command line.
    #[serde(default)]
    pub cmdline_extra: String,
    /// Give the guest a serial port whose output goes to a descriptor.
    #[serde(default)]
    pub serial: bool,
    /// Give the guest the file system of a file server (virtio-fs with the tag [`FILE_SYSTEM_TAG`]). The descriptor is a connected
    /// `SOCK_STREAM` unix socket whose other end is the server's: a vhost-user back end, which gets the guest's memory. It need not listen
    /// yet. When it is gone, the file system is; the machine goes on.
    #[serde(default)]
    pub file_server: bool,
}

/// A new segment of the layers disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachSegment {
    /// Where it begins on the disk, in bytes; a multiple of 4096.
    pub offset: u64,
    /// Its length in bytes. What the file has less than this reads as zeroes only up to the next 4096 boundary.
    pub len: u64,
}

/// The segment to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetachSegment {
    /// Where it begins on the disk, in bytes.
    pub offset: u64,
}

/// A connection from the host to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConnect {
    /// The guest's port. The reply means that the request is queued; a refusal closes the descriptor.
    pub port: u32,
    /// The host's port that the guest sees, below 2^30 and not one that is listened on: whoever accepts the connection
    /// there knows by it which one it is. A port that has a connection to the same port of the guest already is refused.
    /// Without it, one that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u32>,
}

/// A port of the host that the guest may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockListen {
    /// The host's port.
    pub port: u32,
    /// Keep a second descriptor of the newest connection and announce it again to every new client. Such a connection
    /// ends when the guest ends it (or the VMM does), not when a client drops its descriptor.
    #[serde(default)]
    pub keep: bool,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromVmm {
    /// The answer to a request.
    Reply(Reply),
    /// Something happened.
    Event(Event),
}

/// What a successful request gives back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// Nothing but success.
    Done,
    /// The machine's state.
    Status(Box<Status>),
}

/// Something that happened without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The machine has ended; the VMM ends after this.
    Exited {
        /// Why.
        reason: ExitReason,
    },
    /// The guest connected to a listening port. Descriptor: the host's end of the stream.
    VsockAccepted {
        /// The host's port.
        port: u32,
        /// The guest's port.
        guest_port: u32,
    },
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitReason {
    /// A client asked for it.
    Stopped,
    /// The guest reset itself, which is its way of powering off.
    GuestReset,
    /// The guest's kernel panicked.
    GuestPanic {
        /// What it said of the cause, as far as it can be printed. The guest chooses the words.
        message: String,
    },
    /// The guest ran into a triple fault or shut its processor down.
    TripleFault,
    /// A processor could not go on.
    Failed {
        /// What the hypervisor said.
        message: String,
    },
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stopped => write!(f, "stopped by request"),
            Self::GuestReset => write!(f, "the guest powered off or reset itself"),
            Self::GuestPanic { message } => write!(f, "the guest's kernel panicked: {message}"),
            Self::TripleFault => write!(f, "the guest crashed with a triple fault"),
            Self::Failed { message } => write!(f, "a virtual processor failed: {message}"),
        }
    }
}

/// What a machine is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MachineState {
    /// Waiting for `boot`.
    Created,
    /// The processors run.
    Running,
    /// The processors stand still.
    Paused,
    /// It is over.
    Exited {
        /// Why.
        reason: ExitReason,
    },
}

/// The answer to `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// What the machine is doing.
    pub state: MachineState,
    /// Number of processors; 0 before boot.
    pub vcpus: u32,
    /// Guest memory in MiB; 0 before boot.
    pub memory_mib: u64,
    /// How often the hypervisor returned to the VMM, by cause.
    pub exits: ExitCounts,
    /// The vsock device's connections.
    pub vsock: VsockCounts,
    /// When the steps of the boot were reached.
    pub times: BootTimes,
}

/// Returns from the hypervisor to the VMM since boot, over all processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitCounts {
    /// Reads of device registers in memory.
    pub mmio_read: u64,
    /// Writes of device registers in memory.
    pub mmio_write: u64,
    /// Reads of I/O ports.
    pub pio_read: u64,
    /// Writes of I/O ports.
    pub pio_write: u64,
    /// Interrupted by a signal.
    pub interrupted: u64,
    /// Everything else.
    pub other: u64,
}

impl ExitCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        [self.mmio_read, self.mmio_write, self.pio_read, self.pio_write, self.interrupted, self.other]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// What the vsock device is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockCounts {
    /// Connections that exist now.
    pub open: u64,
    /// Connections made by the host since boot.
    pub connected: u64,
    /// Connections made by the guest since boot.
    pub accepted: u64,
    /// Connections that one side refused or reset.
    pub reset: u64,
    /// Bytes from host to guest.
    pub bytes_to_guest: u64,
    /// Bytes from guest to host.
    pub bytes_to_host: u64,
}

/// `CLOCK_MONOTONIC` in nanoseconds at the steps of the boot; `None` for what has not happened yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootTimes {
    /// The VMM began.
    pub process_start: Option<u64>,
    /// The boot request arrived.
    pub boot_request: Option<u64>,
    /// The kernel and initramfs are in guest memory.
    pub kernel_mapped: Option<u64>,
    /// The processors were started.
    pub vcpus_started: Option<u64>,
    /// The guest's driver took the vsock device into service.
    pub vsock_activated: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_field_is_refused() {
        let text = r#"{"id":1,"request":{"vsock_connect":{"port":5,"prot":6}}}"#;
        assert!(serde_json::from_str::<FromClient>(text).is_err());
    }

    #[test]
    fn a_request_without_arguments_is_a_word() {
        let message: FromClient = serde_json::from_str(r#"{"id":7,"request":"status"}"#).unwrap();
        assert_eq!(message, FromClient { id: 7, request: Request::Status });
    }

    #[test]
    fn events_survive_the_way_through_json() {
        for event in [
            Event::Exited { reason: ExitReason::Failed { message: "x".into() } },
            Event::VsockAccepted { port: 1024, guest_port: 9 },
        ] {
            let text = serde_json::to_string(&FromVmm::Event(event.clone())).unwrap();
            assert_eq!(serde_json::from_str::<FromVmm>(&text).unwrap(), FromVmm::Event(event));
        }
    }
}
