//! virtio over MMIO, version 2 (virtio 1.2, section 4.2). The registers are a state machine that the guest drives: what comes
//! out of order is ignored, what is wrong makes the device need a reset.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    Activation, ActiveQueue, COMMON_FEATURES, FEATURE_EVENT_IDX, FEATURE_VERSION_1, Signals, VirtioDevice,
};
use crate::limit::warn_limited;
use crate::memory::Memory;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4c43_5243;
/// Offset of the register that doorbells are connected to.
pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
const CONFIG_SPACE: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// Why a transport could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make an event for a device")]
pub(crate) struct EventError(#[source] std::io::Error);

/// One device's registers.
pub(crate) struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    signals: Arc<Signals>,
    queues: Vec<Queue>,
    kicks: Vec<Arc<EventFd>>,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    active: bool,
}

impl Transport {
    /// `line` raises the device's interrupt line.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        line: EventFd,
    ) -> Result<Self, EventError> {
        let sizes = device.queue_sizes();
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new).map_err(EventError))
            .collect::<Result<_, _>>()?;
        // The sizes are constants of the devices, and powers of two.
        let queues = sizes.iter().filter_map(|size| Queue::new(*size).ok()).collect();
        Ok(Self {
            device,
            memory,
            signals: Arc::new(Signals::new(line)),
            queues,
            kicks,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            active: false,
        })
    }

    /// The events that doorbells are connected to, one per queue.
    pub(crate) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// A read of a register; `offset` is within the device's window.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_SPACE {
            let config = self.device.config();
            let begin = usize::try_from(offset - CONFIG_SPACE).unwrap_or(usize::MAX);
            for (byte, value) in data.iter_mut().zip(config.iter().skip(begin)) {
                *byte = *value;
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.device_type(),
            0x0c => VENDOR,
            0x10 => {
                let features = COMMON_FEATURES | self.device.features();
                half(features, self.device_features_select)
            }
            0x34 => self.selected().map_or(0, |queue| u32::from(queue.max_size())),
            0x44 => self.selected().map_or(0, |queue| u32::from(queue.ready())),
            0x60 => self.signals.pending(),
            0x70 => self.status(),
            // No shared memory: a length of all ones.
            0xb0 | 0xb4 => u32::MAX,
            _ => 0,
        }
    }

    /// A write of a register.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        // The configuration spaces of all devices here are read-only.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => self.write_features(value),
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            QUEUE_NOTIFY => self.notify(value),
            0x64 => self.signals.acknowledge(value),
            0x70 => self.write_status(value),
            0x38 | 0x44 | 0x80..=0xa4 => self.write_queue(offset, value),
            _ => {}
        }
    }

    fn status(&self) -> u32 {
        self.signals.status.load(Ordering::SeqCst)
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn write_features(&mut self, value: u32) {
        if self.status() & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        if self.status() & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            return;
        }
        let Some(queue) =
            usize::try_from(self.queue_select).ok().and_then(|index| self.queues.get_mut(index))
        else {
            return;
        };
        match offset {
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// A notification that no doorbell caught.
    fn notify(&self, value: u32) {
        let kick = usize::try_from(value).ok().and_then(|index| self.kicks.get(index));
        if let Some(kick) = kick {
            // Fails only when 2^64 kicks are pending.
            let _ = kick.write(1);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let status = self.status();
        // Bits are only ever added; NEEDS_RESET is the device's own.
        let added = value & !status & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED);
        let mut accepted = added & (ACKNOWLEDGE | DRIVER | FAILED);
        if added & FEATURES_OK != 0 && self.features_are_acceptable() {
            accepted |= FEATURES_OK;
        }
        let ready = DRIVER | FEATURES_OK;
        if added & DRIVER_OK != 0 && (status | accepted) & (ready | FAILED | NEEDS_RESET) == ready {
            accepted |= DRIVER_OK;
        }
        self.signals.status.fetch_or(accepted, Ordering::SeqCst);
        if accepted & DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn features_are_acceptable(&self) -> bool {
        let offered = COMMON_FEATURES | self.device.features();
        self.driver_features & !offered == 0 && self.driver_features & FEATURE_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let device = self.device.name();
        if !self.queues.iter().all(|queue| queue.is_valid(&self.memory)) {
            warn_limited!(device, "the guest set a device up with an invalid queue");
            self.signals.broken();
            return;
        }
        tracing::debug!(device, features = self.driver_features, "the guest took a device into service");
        let event_index = self.driver_features & FEATURE_EVENT_IDX != 0;
        let queues = self.queues.iter().zip(&self.kicks).map(|(queue, kick)| {
            let state = queue.state();
            // A state that was just taken from a valid queue makes a valid queue.
            let mut queue = Queue::try_from(state).ok()?;
            queue.set_event_idx(event_index);
            Some(ActiveQueue { queue, kick: Arc::clone(kick) })
        });
        let Some(queues) = queues.collect() else { return self.signals.broken() };
        self.active = true;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: self.driver_features,
            signals: Arc::clone(&self.signals),
        });
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.active) {
            self.device.reset();
        }
        for queue in &mut self.queues {
            queue.reset();
        }
        for kick in &self.kicks {
            // Nothing to take is fine: the descriptors do not block.
            let _ = kick.read();
        }
        self.driver_features = 0;
        (self.device_features_select, self.driver_features_select, self.queue_select) = (0, 0, 0);
        self.signals.reset();
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use vm_memory::GuestAddress;

    struct Probe {
        activations: Arc<AtomicU32>,
        resets: Arc<AtomicU32>,
    }

    impl VirtioDevice for Probe {
        fn device_type(&self) -> u32 {
            4
        }
        fn name(&self) -> &'static str {
            "probe"
        }
        fn features(&self) -> u64 {
            1 << 5
        }
        fn queue_sizes(&self) -> &'static [u16] {
            &[16, 16]
        }
        fn config(&self) -> &[u8] {
            &[1, 2, 3]
        }
        fn activate(&mut self, activation: Activation) {
            assert_eq!(activation.queues.len(), 2);
            self.activations.fetch_add(1, Ordering::SeqCst);
        }
        fn reset(&mut self) {
            self.resets.fetch_add(1, Ordering::SeqCst);
        }
    }

    struct Fixture {
        transport: Transport,
        activations: Arc<AtomicU32>,
        resets: Arc<AtomicU32>,
    }

    fn fixture() -> Fixture {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 0x10000)]).unwrap();
        let (activations, resets) = (Arc::default(), Arc::default());
        let device = Probe { activations: Arc::clone(&activations), resets: Arc::clone(&resets) };
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        Fixture { transport: Transport::new(Box::new(device), memory, line).unwrap(), activations, resets }
    }

    impl Fixture {
        fn write(&mut self, offset: u64, value: u32) {
            self.transport.write(offset, &value.to_le_bytes());
        }
        fn read(&self, offset: u64) -> u32 {
            let mut data = [0; 4];
            self.transport.read(offset, &mut data);
            u32::from_le_bytes(data)
        }
        fn set_up(&mut self, features: u64, desc: u32) {
            self.write(0x70, 1);
            self.write(0x70, 3);
            for half in 0..2 {
                self.write(0x24, half);
                self.write(0x20, (features >> (32 * half)) as u32);
            }
            self.write(0x70, 11);
            for queue in 0..2 {
                self.write(0x30, queue);
                self.write(0x38, 16);
                self.write(0x80, desc);
                self.write(0x90, 0x2000);
                self.write(0xa0, 0x3000);
                self.write(0x44, 1);
            }
            self.write(0x70, 15);
        }
    }

    #[test]
    fn a_well_behaved_driver_gets_an_active_device_and_can_reset_it() {
        let mut fixture = fixture();
        assert_eq!((fixture.read(0), fixture.read(4), fixture.read(8)), (MAGIC, 2, 4));
        for round in 1..3 {
            fixture.set_up(FEATURE_VERSION_1 | 1 << 5, 0x1000);
            assert_eq!(fixture.read(0x70), 15);
            assert_eq!(fixture.activations.load(Ordering::SeqCst), round);
            fixture.write(0x70, 0);
            assert_eq!((fixture.read(0x70), fixture.resets.load(Ordering::SeqCst)), (0, round));
        }
    }

    #[test]
    fn unknown_features_are_not_accepted() {
        for features in [FEATURE_VERSION_1 | 1 << 40, 1 << 5] {
            let mut fixture = fixture();
            fixture.set_up(features, 0x1000);
            assert_eq!(fixture.read(0x70) & (FEATURES_OK | DRIVER_OK), 0);
            assert_eq!(fixture.activations.load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn a_queue_outside_of_memory_makes_the_device_need_a_reset() {
        let mut fixture = fixture();
        fixture.set_up(FEATURE_VERSION_1, 0xffff_0000);
        assert_eq!(fixture.read(0x70) & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(fixture.activations.load(Ordering::SeqCst), 0);
        assert_eq!(fixture.read(0x60), 2);
    }

    #[test]
    fn the_configuration_space_ends_where_it_ends() {
        let fixture = fixture();
        let mut data = [9; 8];
        fixture.transport.read(0x101, &mut data);
        assert_eq!(data, [2, 3, 0, 0, 0, 0, 0, 0]);
    }

    proptest::proptest! {
        #[test]
        fn no_sequence_of_accesses_panics(accesses in proptest::collection::vec((0u64..0x200, proptest::num::u32::ANY, 0usize..9), 0..200)) {
            let mut fixture = fixture();
            for (offset, value, len) in accesses {
                let bytes = u64::from(value).to_le_bytes();
                fixture.transport.write(offset, &bytes[..len.min(8)]);
                fixture.transport.read(offset, &mut [0; 8][..len.min(8)]);
            }
        }
    }
}
