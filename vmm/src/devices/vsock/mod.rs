//! virtio-vsock (virtio 1.2, section 5.10): streams between the guest and descriptors of the host. `core` is the protocol,
//! without I/O; `worker` is the thread that moves bytes straight between descriptors and guest memory; `streams` are the
//! host's ends.

mod core;
mod packet;
mod streams;
mod worker;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::worker::{Command, Commands, SpawnError};
use super::{Activation, VirtioDevice};
use crate::control::VsockCounts;
use crate::jail::Role;

pub(crate) use self::core::FIRST_EPHEMERAL;

const DEVICE_TYPE: u32 = 19;
const NAME: &str = "vsock";
/// The guest's context id; the host's is 2.
pub(crate) const GUEST_CID: u64 = 3;

/// A connection that the guest made.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) port: u32,
    pub(crate) guest_port: u32,
    pub(crate) stream: OwnedFd,
}

/// What the vsock thread is told besides what every device's is.
#[derive(Debug)]
pub(crate) enum VsockCommand {
    Connect {
        port: u32,
        /// The host's port, if the guest is to see a certain one.
        from: Option<u32>,
        stream: OwnedFd,
    },
    /// Answers when a connection will be accepted.
    Listen { port: u32, done: SyncSender<()> },
}

/// What the thread shows of itself.
#[derive(Debug, Default)]
struct Shown {
    counts: Mutex<VsockCounts>,
    /// Monotonic nanoseconds of the first activation; 0 before it.
    activated: AtomicU64,
    /// How often the thread had something to do.
    rounds: AtomicU64,
}

/// The device as its transport sees it.
pub(crate) struct Vsock {
    commands: Commands<VsockCommand>,
    config: [u8; 8],
}

/// The device as the control socket sees it.
#[derive(Debug, Clone)]
pub(crate) struct VsockHandle {
    commands: Commands<VsockCommand>,
    shown: Arc<Shown>,
}

impl Vsock {
    /// `on_accept` is called on the device's thread; it must not block.
    pub(crate) fn new(
        on_accept: impl FnMut(Accepted) + Send + 'static,
    ) -> Result<(Self, VsockHandle, JoinHandle<()>), SpawnError> {
        let shown = Arc::new(Shown::default());
        let for_thread = Arc::clone(&shown);
        let (commands, thread) = super::worker::spawn(NAME, Role::Streams, move |inbox| {
            worker::run(&inbox, on_accept, &for_thread)
        })?;
        let device = Self { commands: commands.clone(), config: GUEST_CID.to_le_bytes() };
        Ok((device, VsockHandle { commands, shown }, thread))
    }
}

impl VsockHandle {
    /// Connects a stream to a port of the guest; it is closed if the guest refuses.
    pub(crate) fn connect(&self, port: u32, from: Option<u32>, stream: OwnedFd) {
        self.commands.send(Command::Other(VsockCommand::Connect { port, from, stream }));
    }

    /// Accepts the guest's connections to a port of the host, from when this returns on.
    pub(crate) fn listen(&self, port: u32) {
        let (done, listening) = sync_channel(1);
        self.commands.send(Command::Other(VsockCommand::Listen { port, done }));
        // An error means that the thread has ended; then nothing is accepted any more.
        let _ = listening.recv();
    }

    pub(crate) fn stop(&self) {
        self.commands.send(Command::Stop);
    }

    pub(crate) fn counts(&self) -> VsockCounts {
        *self.shown.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the guest's driver first took the device into service.
    pub(crate) fn activated(&self) -> Option<u64> {
        Some(self.shown.activated.load(Ordering::Relaxed)).filter(|time| *time != 0)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn features(&self) -> u64 {
        0
    }

    /// To the guest, from the guest, events.
    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 16]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) {
        self.commands.send(Command::Activate(activation));
    }

    fn reset(&mut self) {
        self.commands.reset();
    }
}

/// Serves what is in the rings, without a thread; true if that broke the device.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn serve_once(activation: Activation) -> bool {
    worker::serve_once(activation)
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use core::story::fuzz as fuzz_core;

#[cfg(test)]
mod tests;
