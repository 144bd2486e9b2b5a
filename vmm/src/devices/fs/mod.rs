//! virtio-fs (virtio 1.3, section 5.11): the guest's view of a file server, which is another process and serves the rings in guest
//! memory by itself (vhost-user). Here is what the driver sees of it, `link` is the conversation with the server, and `worker` the thread that
//! has it: kicks go from the hypervisor straight to the server, and its interrupts straight back.
//!
//! The server is trusted with the guest's memory and with nothing else: what it says is checked, and it may hang or die at any time. A
//! processor waits for it at most [`RESET_LIMIT`], when the driver resets the device. When it is gone, the thread answers in its place that
//! nothing is there any more, also what it had in hand (`ledger`): a driver of virtio-fs has no other way to end a request.

mod ledger;
mod link;
#[cfg(test)]
pub(crate) mod tests;
mod worker;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, Shutdown, SocketType};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::worker::{Command, Commands, SpawnError, spawn};
use super::{Activation, VirtioDevice};
use crate::control::FILE_SYSTEM_TAG;
use crate::jail::Role;
use crate::memory::MemoryError;
use ledger::Ledger;

const DEVICE_TYPE: u32 = 26;
const NAME: &str = "files";
/// Bytes of the tag in the configuration space.
const TAG_LEN: usize = 36;
/// The first queue is for what must not wait behind other requests; there is one for each processor, up to eight. Each entry holds a request of
/// any size, of which the driver makes the largest no larger than the queue.
const QUEUE_SIZES: [u16; 9] = [128, 512, 512, 512, 512, 512, 512, 512, 512];
/// How long a driver that resets the device waits for the server to let go of the rings. One that takes longer is given up for good.
const RESET_LIMIT: Duration = Duration::from_secs(5);

/// Why there can be no file system.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FsError {
    #[error("the file server's descriptor is not a stream socket")]
    NotAStream,
    #[error("cannot make an event for the file system's device")]
    Event(#[source] std::io::Error),
    #[error("cannot keep a ledger with the file server")]
    Ledger(#[source] MemoryError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// The device as its transport sees it.
pub(crate) struct Fs {
    config: [u8; TAG_LEN + 4],
    queues: usize,
    commands: Commands<()>,
    socket: Arc<OwnedFd>,
    reset_limit: Duration,
}

impl Fs {
    /// A device for the server at the other end of `socket`, which need not listen yet; and how to stop its thread.
    pub(crate) fn new(
        socket: OwnedFd,
        vcpus: u32,
    ) -> Result<(Self, impl Fn() + Send + 'static, JoinHandle<()>), FsError> {
        let is_stream = matches!(socket_domain(&socket), Ok(AddressFamily::UNIX))
            && matches!(socket_type(&socket), Ok(SocketType::STREAM));
        if !is_stream {
            return Err(FsError::NotAStream);
        }
        let socket = Arc::new(socket);
        let queues = 1 + usize::try_from(vcpus).unwrap_or(1).clamp(1, QUEUE_SIZES.len() - 1);
        let complaints = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(FsError::Event)?;
        let ledger = Ledger::new().map_err(FsError::Ledger)?;
        let mut worker = worker::Worker::new(Arc::clone(&socket), complaints, ledger);
        let (commands, thread) = spawn(NAME, Role::Files, move |inbox| worker.run(&inbox, queues))?;
        let (to_stop, to_end) = (commands.clone(), Arc::clone(&socket));
        let stop = move || {
            to_stop.send(Command::Stop);
            hang_up(&to_end);
        };
        let config = config_space(queues - 1);
        Ok((Self { config, queues, commands, socket, reset_limit: RESET_LIMIT }, stop, thread))
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES[..self.queues]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        self.commands.send(Command::Activate(activation));
    }

    fn reset(&mut self) {
        let done = self.commands.start_reset();
        if done.recv_timeout(self.reset_limit) == Err(RecvTimeoutError::Timeout) {
            tracing::error!("the file server does not let go of the guest's memory: it is given up");
            // The thread waits for this socket only, and so no longer.
            hang_up(&self.socket);
            // An error means that the thread has ended, which is as good.
            let _ = done.recv();
        }
    }
}

/// Ends the conversation for both sides, whoever waits in it.
fn hang_up(socket: &OwnedFd) {
    // It fails where the other side has hung up already.
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}

/// `struct virtio_fs_config`.
fn config_space(request_queues: usize) -> [u8; TAG_LEN + 4] {
    let mut config = [0; TAG_LEN + 4];
    config[..FILE_SYSTEM_TAG.len()].copy_from_slice(FILE_SYSTEM_TAG.as_bytes());
    // At most eight.
    config[TAG_LEN..].copy_from_slice(&(request_queues as u32).to_le_bytes());
    config
}

/// The whole conversation with a server that answers with these bytes, whatever they are.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_link(activation: &Activation, answers: &[u8]) {
    link::fuzz(activation, answers);
}
