//! The driver's side of a virtqueue, as tests need it: buffers laid out in every way that virtio allows.

use std::sync::atomic::Ordering::SeqCst;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;

const QUEUE_SIZE: u16 = 256;
/// Each buffer has this many descriptors to itself.
const PARTS: u16 = 4;
/// So many buffers fit into a queue.
pub(crate) const BUFFERS: u16 = QUEUE_SIZE / PARTS;
const INDIRECT_AT: u64 = 0x80_0000;
const NEXT: u16 = 1;
pub(crate) const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

/// How a buffer is cut into descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Whole,
    HeaderApart,
    HeaderCut,
    Crumbs,
    Indirect,
}

impl Layout {
    /// Where a buffer that begins with a vsock header is cut.
    fn cuts(self, len: u32) -> Vec<u32> {
        let header = 44;
        let cuts = match self {
            Self::Whole => vec![],
            Self::HeaderApart => vec![header],
            Self::HeaderCut => vec![10],
            Self::Crumbs | Self::Indirect => vec![1, header + 1, header + 3],
        };
        cuts.into_iter().filter(|cut| *cut < len).collect()
    }
}

/// The driver's side of a queue.
#[derive(Default)]
pub(crate) struct Ring {
    base: u64,
    available: u16,
    used: u16,
}

impl Ring {
    /// The rings of the queue with this number stand at a place of its own below 1 MiB.
    pub(crate) fn new(index: u64) -> Self {
        Self { base: 0x1000 + 0x4000 * index, ..Self::default() }
    }

    pub(crate) fn device_side(&self, event_index: bool) -> Queue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.base as u32 + 0x1000), Some(0));
        queue.set_used_ring_address(Some(self.base as u32 + 0x2000), Some(0));
        queue.set_ready(true);
        queue.set_event_idx(event_index);
        queue
    }

    /// As after a reset.
    pub(crate) fn clear(&mut self, memory: &Memory) {
        memory.write_slice(&[0; 0x4000], GuestAddress(self.base)).unwrap();
        (self.available, self.used) = (0, 0);
    }

    /// Makes a buffer of one direction available.
    pub(crate) fn offer(
        &mut self,
        memory: &Memory,
        buffer: u16,
        at: u64,
        len: u32,
        layout: Layout,
        flags: u16,
    ) {
        let (mut begin, mut parts) = (0, Vec::new());
        for end in layout.cuts(len).into_iter().chain([len]) {
            parts.push((at + u64::from(begin), end - begin, flags));
            begin = end;
        }
        self.offer_chain(memory, buffer, &parts, layout == Layout::Indirect);
    }

    /// Makes a chain of address, length and direction available.
    pub(crate) fn offer_chain(
        &mut self,
        memory: &Memory,
        buffer: u16,
        parts: &[(u64, u32, u16)],
        indirect: bool,
    ) {
        let (mut table, mut first) = (self.base, buffer * PARTS);
        if indirect {
            let inner = INDIRECT_AT + self.base + u64::from(buffer) * 64;
            let head = (inner, parts.len() as u32 * 16, INDIRECT, 0);
            write_descriptor(memory, table + 16 * u64::from(first), head);
            (table, first) = (inner, 0);
        }
        for (index, (at, len, flags)) in parts.iter().enumerate() {
            let more = if index + 1 < parts.len() { NEXT } else { 0 };
            let place = first + index as u16;
            write_descriptor(memory, table + 16 * u64::from(place), (*at, *len, flags | more, place + 1));
        }
        let slot = self.base + 0x1000 + 4 + 2 * u64::from(self.available % QUEUE_SIZE);
        memory.write_obj(buffer * PARTS, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        let index = GuestAddress(self.base + 0x1002);
        memory.store(self.available, index, SeqCst).unwrap();
    }

    /// A buffer that the device has used, and how much it wrote.
    pub(crate) fn take_used(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        let index = GuestAddress(self.base + 0x2002);
        // Asks for an interrupt at the next one before it looks whether that is there already.
        let event = GuestAddress(self.base + 0x1004 + 2 * u64::from(QUEUE_SIZE));
        memory.store(self.used, event, SeqCst).unwrap();
        std::sync::atomic::fence(SeqCst);
        let used: u16 = memory.load(index, SeqCst).unwrap();
        if used == self.used {
            return None;
        }
        let at = self.base + 0x2004 + 8 * u64::from(self.used % QUEUE_SIZE);
        self.used = self.used.wrapping_add(1);
        let id: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        Some((id as u16 / PARTS, memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }
}

fn write_descriptor(memory: &Memory, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}
