//! The file server: serves exactly the directories and files that the daemon granted to a virtual machine, over virtio-fs
//! (FUSE messages in a vhost-user device). It knows nothing of containers.
//!
//! The process is started with a listening control socket (see [`control`]). Its main thread serves the socket; another serves the VMM's
//! front end, each ring has a thread, and a few more wait for disks.

pub mod control;
pub mod device;
pub mod fs;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod jail;

mod server;

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;

use fs::{Exported, Proc};

/// Why the file server could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The descriptor is not what it should be.
    #[error(
        "the file server needs a listening SOCK_SEQPACKET unix socket; it is started by the daemon, not by hand"
    )]
    NoControlSocket,
    /// The process could not be confined.
    #[error("the file server cannot give up its privileges")]
    Jail(#[source] io::Error),
    /// The process does not know who it is.
    #[error("the file server cannot find out who it is")]
    Identity(#[source] io::Error),
    /// The control socket failed.
    #[error("the control socket failed")]
    Serve(#[source] io::Error),
}

/// Runs the file server on the control socket that the process inherited as descriptor 3. Call it first thing in the process.
///
/// # Errors
/// See [`RunError`].
pub fn run_inherited() -> Result<(), RunError> {
    run(coracle_worker::jail::inherited_control().map_err(|_| RunError::NoControlSocket)?)
}

/// Runs the file server on a listening control socket until its machine is over. Call it first thing in the process: it closes all
/// descriptors but the standard ones and this socket.
///
/// # Errors
/// See [`RunError`].
pub fn run(control: OwnedFd) -> Result<(), RunError> {
    run_beside(control, &[], |_| ())
}

/// The same with more descriptors to keep, and something else that serves the file system, too: tests mount it here.
#[doc(hidden)]
pub fn run_beside(
    control: OwnedFd,
    keep: &[RawFd],
    beside: impl FnOnce(Arc<Exported>),
) -> Result<(), RunError> {
    if !coracle_worker::jail::is_control_socket(control.as_fd()) {
        return Err(RunError::NoControlSocket);
    }
    let identity = fs::Identity::of_process().map_err(RunError::Identity)?;
    let mut keep = keep.to_vec();
    keep.push(coracle_worker::jail::number(&control));
    let jail = jail::enter(&keep).map_err(RunError::Jail)?;
    let files = Arc::new(Exported::new(Proc::WORKING_DIRECTORY, identity, jail.descriptors));
    beside(Arc::clone(&files));
    server::serve(&control, files, jail.namespaces).map_err(RunError::Serve)
}
