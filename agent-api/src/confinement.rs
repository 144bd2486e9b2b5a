//! What a container shares with others or with the guest, and which devices it may use.

use serde::{Deserialize, Serialize};

use crate::ProcessId;

/// Where a container's System V and POSIX message queues, semaphores and shared memory are, /dev/shm among them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IpcMode {
    /// Its own.
    #[default]
    Private,
    /// Its own, which others may join.
    Shareable,
    /// Its own, without /dev/shm.
    None,
    /// The guest's.
    Host,
    /// That of another container, which runs and is shareable.
    Container(ProcessId),
}

/// Which processes a container sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PidMode {
    /// Its own.
    #[default]
    Private,
    /// All of the guest.
    Host,
    /// Those of another container, which runs, too.
    Container(ProcessId),
}

/// A device of the guest that a container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its node in the guest, in /dev; a directory stands for all devices in it.
    pub source: String,
    /// Its node in the container.
    pub path: String,
    /// What the container may do with it.
    pub access: DeviceAccess,
}

/// Devices that a container may use, wherever their nodes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRule {
    /// Which kind.
    pub kind: DeviceKind,
    /// Major number; none is any.
    pub major: Option<u32>,
    /// Minor number; none is any.
    pub minor: Option<u32>,
    /// What it may do with them.
    pub access: DeviceAccess,
}

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// Both.
    Any,
    /// Character devices.
    Char,
    /// Block devices.
    Block,
}

/// What can be done with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceAccess {
    /// Open it for reading.
    pub read: bool,
    /// Open it for writing.
    pub write: bool,
    /// Make a node.
    pub mknod: bool,
}
