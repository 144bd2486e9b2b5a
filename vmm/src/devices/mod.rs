//! The virtual devices, one folder each: `mod` (what the guest's driver sees), `request` or `core` (what it understands),
//! and where there is one, its backend. A device never trusts what it reads from guest memory: a driver that breaks the
//! rules is told so by NEEDS_RESET, and nothing else in the machine notices.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod buffers;
pub(crate) mod fs;
pub(crate) mod nowait;
pub(crate) mod rng;
pub(crate) mod serial;
pub(crate) mod transport;
pub(crate) mod vsock;
pub(crate) mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;

/// `VIRTIO_F_VERSION_1`, `VIRTIO_F_RING_INDIRECT_DESC` and `VIRTIO_F_RING_EVENT_IDX`, which every device offers.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;
pub(crate) const FEATURE_INDIRECT: u64 = 1 << 28;
pub(crate) const FEATURE_EVENT_IDX: u64 = 1 << 29;
pub(crate) const COMMON_FEATURES: u64 = FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX;

const STATUS_NEEDS_RESET: u32 = 64;
const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// The guest's driver broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    #[error("a virtqueue's ring is invalid")]
    Ring,
    #[error("a descriptor points outside of the guest's memory")]
    Address,
    #[error("a descriptor chain is malformed")]
    Chain,
}

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Self {
        Self::Ring
    }
}

/// What a device tells the guest from its own thread: interrupts, and that it was broken.
#[derive(Debug)]
pub(crate) struct Signals {
    /// The device status register, written by the transport.
    pub(crate) status: AtomicU32,
    interrupts: AtomicU32,
    /// What is always pending.
    standing: AtomicU32,
    line: EventFd,
}

impl Signals {
    pub(crate) fn new(line: EventFd) -> Self {
        let [status, interrupts, standing] = [0; 3].map(AtomicU32::new);
        Self { status, interrupts, standing, line }
    }

    /// The event of the interrupt line, for another process that has the used rings in hand. It raises the line without a word, so that
    /// the driver is told to look at the rings whenever it asks why.
    pub(crate) fn lend_line(&self) -> &EventFd {
        self.standing.store(INTERRUPT_QUEUE, Ordering::SeqCst);
        &self.line
    }

    /// Tells the driver to look at its used rings.
    pub(crate) fn queue(&self) {
        self.raise(INTERRUPT_QUEUE);
    }

    /// Tells the driver that the device does nothing more until it is reset.
    pub(crate) fn broken(&self) {
        self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.interrupts.fetch_or(bit, Ordering::SeqCst);
        // Fails only when 2^64 interrupts are pending.
        let _ = self.line.write(1);
    }

    fn pending(&self) -> u32 {
        self.interrupts.load(Ordering::SeqCst) | self.standing.load(Ordering::SeqCst)
    }

    fn acknowledge(&self, bits: u32) {
        self.interrupts.fetch_and(!bits, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.interrupts.store(0, Ordering::SeqCst);
        self.standing.store(0, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }
}

/// A queue in service, and the event that the guest rings for it.
#[derive(Debug)]
pub(crate) struct ActiveQueue {
    pub(crate) queue: Queue,
    pub(crate) kick: Arc<EventFd>,
}

/// What a device gets when the driver takes it into service.
#[derive(Debug)]
pub(crate) struct Activation {
    pub(crate) memory: Memory,
    pub(crate) queues: Vec<ActiveQueue>,
    pub(crate) features: u64,
    pub(crate) signals: Arc<Signals>,
}

/// A device as its transport sees it. All calls come from a processor's thread, one at a time.
pub(crate) trait VirtioDevice: Send {
    /// The device type of the virtio specification, section 5.
    fn device_type(&self) -> u32;
    /// For logs.
    fn name(&self) -> &'static str;
    /// What is offered beyond [`COMMON_FEATURES`].
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];
    /// The device's configuration space.
    fn config(&self) -> &[u8];
    /// The driver is ready. Must not block.
    fn activate(&mut self, activation: Activation);
    /// The driver resets the device. When this returns, guest memory is no longer touched.
    fn reset(&mut self);
}

#[cfg(test)]
mod tests;
