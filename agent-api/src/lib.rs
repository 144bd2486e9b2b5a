//! The API between host and guest: types, versions, stream framing.
//!
//! The agent (PID 1 of the guest) serves HTTP/1.1 with JSON bodies; the daemon is its only client. Both ends are built
//! from this crate and from nothing else that they share. Neither trusts the other's bytes: the agent refuses unknown
//! fields and illegal values, and the daemon treats whatever a guest sends as hostile.
//!
//! | method and path | body → answer | what it does |
//! |---|---|---|
//! | `GET /v1/state` | → [`AgentState`] | every process that the agent still knows, and what it mounted |
//! | `POST /v1/containers/{id}/start` | [`ContainerSpec`] → [`Started`] | mounts the layers that are missing, starts the container's first process; the process has the container's id |
//! | `POST /v1/containers/{id}/pause` | → 204 | freezes every process of a running container; the answer comes when all of them stand still |
//! | `POST /v1/containers/{id}/unpause` | → 204 | lets them run on |
//! | `POST /v1/containers/{id}/resources` | [`Resources`] → 204 | changes those limits of a running container that are set |
//! | `GET /v1/containers/{id}/stats` | → [`Stats`] | what a running container has used so far |
//! | `GET /v1/containers/{id}/processes` | → [`Processes`] | the processes of a running container |
//! | `DELETE /v1/containers/{id}` | → 204 | removes a stopped container's writable layer |
//! | `POST /v1/containers/{id}/files` | [`files::FilesRequest`], upgrade to [`files::FILES_PROTOCOL`] | reads, writes, compares the files of a container, whether or not it runs; see [`files`] |
//! | `POST /v1/containers/retain` | [`Retain`] → 204 | removes the writable layer of every container, and every volume, that is not named |
//! | `GET /v1/volumes` | → [`VolumeUsage`] list | the volumes that there are, with the space that each takes |
//! | `DELETE /v1/volumes/{id}` | → 204 | removes a volume and what it holds |
//! | `POST /v1/containers/{id}/endpoints` | [`Endpoint`] → 204 | connects a running container to a further network |
//! | `POST /v1/containers/{id}/endpoints/{network}/names` | list of names → 204 | changes what a running container is called on a network |
//! | `DELETE /v1/containers/{id}/endpoints/{network}` | → 204 | takes a running container off a network; one that it is not on is none of its business |
//! | `POST /v1/containers/{id}/ways-out` | list of [`WayOut`] → 204 | changes which of its networks lead out of a running container |
//! | `DELETE /v1/networks/{id}` | → 204 | removes the bridge of a network that no container is on |
//! | `DELETE /v1/layers/{diff_id}` | → 204 | unmounts a layer that no running container uses and gives its partition back |
//! | `POST /v1/execs/{id}` | [`ExecSpec`] → [`Started`] | starts a further process in a running container |
//! | `GET /v1/processes/{id}/output?after=N` | upgrade to [`OUTPUT_PROTOCOL`] | [`frame`]s of the process with a sequence number above N; the client sends [`frame::Ack`]s |
//! | `GET /v1/processes/{id}/stdin` | upgrade to [`STDIN_PROTOCOL`] | raw bytes for the process's standard input; when the client half-closes and the bytes were taken, the agent closes its half too. The input itself stays open: a daemon that is killed is not its end |
//! | `DELETE /v1/processes/{id}/stdin` | → 204 | closes the process's standard input; a terminal's stays open |
//! | `POST /v1/processes/{id}/signal` | [`Signal`] → 204 | sends a signal |
//! | `POST /v1/processes/{id}/resize` | [`TerminalSize`] → 204 | sets the size of the process's terminal |
//! | `DELETE /v1/processes/{id}` | → 204 | forgets an ended process: its exit status and unread output |
//! | `GET /v1/egress` | upgrade to [`egress::EGRESS_PROTOCOL`] | what containers ask of the world outside; see [`egress`] |
//! | `GET /v1/ports` | upgrade to [`ports::PORTS_PROTOCOL`] | which published ports are listened on, and connections to them; see [`ports`] |
//! | `GET /v1/datagrams` | upgrade to [`datagrams::DATAGRAMS_PROTOCOL`] | datagrams to published ports; see [`datagrams`] |
//! | `GET /v1/kmsg` | → text, endless | the guest kernel's log, from its beginning, then as it grows; with `?follow=0` only what is there |
//! | `POST /v1/shutdown` | → 204 | kills what runs, writes everything to disk, powers the guest off |
//!
//! A call that fails answers a 4xx or 5xx status with an [`ApiError`].
//!
//! When the agent is ready it dials the host (vsock CID 2, port [`READY_PORT`]) and writes one line of JSON, a
//! [`Hello`]. The connection stays open for as long as the agent lives.

mod confinement;
pub mod datagrams;
pub mod egress;
pub mod files;
pub mod frame;
mod id;
mod network;
pub mod ports;
mod seccomp;
mod types;

pub use confinement::*;
pub use id::{DiffId, IdError, NetworkId, ProcessId, TreeName, TreeNameError, VolumeId};
pub use network::*;
pub use seccomp::*;
pub use types::*;

/// Version of this API; both ends must have the same.
pub const API_VERSION: u32 = 7;
/// Where the guest has its data disk.
pub const DATA_DISK: &str = "/data";
/// Tag of the virtio-fs file system with the trees of the host that containers may use.
pub const HOST_TAG: &str = "coracle";
/// Port on the host (vsock CID 2) that the agent dials when it is ready.
pub const READY_PORT: u32 = 1024;
/// Port in the guest on which the agent serves this API.
pub const AGENT_PORT: u32 = 1024;
/// `Upgrade:` token of a process's output stream.
pub const OUTPUT_PROTOCOL: &str = "coracle-output";
/// `Upgrade:` token of a process's input stream.
pub const STDIN_PROTOCOL: &str = "coracle-stdin";
