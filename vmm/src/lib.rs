//! The virtual machine monitor: a machine with virtio devices, controlled over one socket, with every resource handed
//! in as a descriptor. It knows nothing of containers. Nothing outside `hypervisor/kvm` and `arch` knows KVM.
//!
//! The process is started with a listening control socket (see [`control`]) and opens one path, `/dev/kvm`. Its main
//! thread serves the socket; each processor, the vsock device and each disk have a thread of their own.

pub mod control;
pub mod jail;
pub mod probe;

mod arch;
mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod hypervisor;
mod machine;
mod memory;
mod server;
mod sys;

use std::os::fd::OwnedFd;

use coracle_worker::{clock, limit};

use control::ExitReason;
use hypervisor::kvm::KvmHypervisor;

/// Why the VMM could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The descriptor is not what it should be.
    #[error("the VMM needs a listening SOCK_SEQPACKET unix socket; it is started by the daemon, not by hand")]
    NoControlSocket(#[source] std::io::Error),
    /// The process could not be confined.
    #[error("the VMM cannot give up its privileges")]
    Jail(#[source] std::io::Error),
    /// The control socket failed.
    #[error("the control socket failed")]
    Serve(#[source] std::io::Error),
}

/// Runs the VMM on the control socket that the process inherited as descriptor 3. Call it first thing in the process.
pub fn run_inherited() -> Result<ExitReason, RunError> {
    run(jail::inherited_control().map_err(RunError::NoControlSocket)?)
}

/// Runs the VMM on a listening control socket until its machine has ended. Call it first thing in the process: it closes
/// all descriptors but the standard ones and this socket.
pub fn run(control: OwnedFd) -> Result<ExitReason, RunError> {
    use std::os::fd::AsFd;
    let started = clock::now();
    if !jail::is_control_socket(control.as_fd()) {
        return Err(RunError::NoControlSocket(std::io::ErrorKind::InvalidInput.into()));
    }
    let kvm = KvmHypervisor::open();
    let mut keep = vec![jail::number(&control)];
    keep.extend(kvm.as_ref().map(KvmHypervisor::raw_fd));
    jail::enter(&keep).map_err(RunError::Jail)?;
    rustix::io::ioctl_fionbio(&control, true).map_err(|errno| RunError::Serve(errno.into()))?;
    server::serve(kvm.map(|kvm| Box::new(kvm) as Box<_>), control, started).map_err(RunError::Serve)
}
