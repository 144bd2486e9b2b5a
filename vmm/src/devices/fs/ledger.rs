//! What of the guest's requests the server has in hand. The server writes it into memory that both have ("inflight I/O tracking",
//! QEMU, docs/interop/vhost-user.rst); it is read when the server is gone, to know whom nobody will answer any more. It is the server's
//! word, and bounded by what rings can hold.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::VhostUserInflight;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use super::QUEUE_SIZES;
use crate::devices::Broken;
use crate::memory::{self, Memory, MemoryError, PAGE};

/// Where the ledger is, in addresses like the guest's: beyond all that a guest can have.
const AT: u64 = 1 << 51;
/// Entries for each ring: as many as the largest has.
const ENTRIES: u16 = 512;
/// `struct QueueRegionSplit` and `struct DescStateSplit`, in bytes.
const LAST_BATCH: u64 = 12;
const USED_INDEX: u64 = 14;
const HEADER: u64 = 16;
const NEXT: u64 = 6;
const ENTRY: u64 = 16;
const REGION: u64 = HEADER + ENTRY * ENTRIES as u64;
/// Behind the regions of all rings is an available ring of our own.
const RING: u64 = AT + REGION * QUEUE_SIZES.len() as u64;
const LEN: u64 = (RING - AT + 4 + 2 * ENTRIES as u64).next_multiple_of(PAGE);

/// The ledger of all rings.
#[derive(Debug)]
pub(super) struct Ledger {
    memory: Memory,
    region: Arc<GuestRegionMmap>,
}

impl Ledger {
    pub(super) fn new() -> Result<Self, MemoryError> {
        let memory = memory::allocate_shared(&[(GuestAddress(AT), LEN as usize)])?;
        let region = memory.remove_region(GuestAddress(AT), LEN).map(|(_, region)| region);
        let region = region.map_err(|_| MemoryError::Outside { address: AT, len: LEN })?;
        Ok(Self { memory, region })
    }

    /// Nothing is in hand.
    pub(super) fn clear(&self) {
        // All of it is there.
        let _ = self.memory.write_slice(&[0; LEN as usize], GuestAddress(AT));
    }

    /// What the server is told of it.
    pub(super) fn describe(&self, rings: usize) -> Option<(VhostUserInflight, BorrowedFd<'_>)> {
        let place = self.region.file_offset()?;
        let request = VhostUserInflight::new(LEN, place.start(), u16::try_from(rings).ok()?, ENTRIES);
        Some((request, place.file().as_fd()))
    }

    /// Puts the device's side of a ring where the server has left it; gives guest memory with a queue of all that it had in hand.
    pub(super) fn recover(
        &self,
        memory: &Memory,
        index: usize,
        queue: &mut Queue,
    ) -> Result<(Memory, Queue), Broken> {
        let used = queue.used_idx(memory, Ordering::Acquire)?.0;
        let heads = self.in_hand(index, queue.size(), used).ok_or(Broken::Ring)?;
        let count = heads.len() as u16;
        queue.set_next_used(used);
        queue.set_next_avail(used.wrapping_add(count));
        let numbers: Vec<u8> = [0, count].into_iter().chain(heads).flat_map(u16::to_le_bytes).collect();
        self.memory.write_slice(&numbers, GuestAddress(RING)).map_err(|_| Broken::Ring)?;
        let memory = memory.insert_region(Arc::clone(&self.region)).map_err(|_| Broken::Address)?;
        let mut left = Queue::new(queue.max_size())?;
        left.set_size(queue.size());
        left.try_set_desc_table_address(GuestAddress(queue.desc_table()))?;
        left.try_set_avail_ring_address(GuestAddress(RING))?;
        left.set_ready(true);
        Ok((memory, left))
    }

    fn in_hand(&self, index: usize, size: u16, used: u16) -> Option<Vec<u16>> {
        let at = AT + REGION * index as u64;
        let number = |offset: u64| self.memory.load::<u16>(GuestAddress(at + offset), Ordering::Acquire).ok();
        let entry = |head: u16| HEADER + ENTRY * u64::from(head);
        let size = size.min(ENTRIES);
        // What it was giving back when it ended counts as given back, if the driver sees it.
        let (mut last, mut batch) = (number(LAST_BATCH)?, used.wrapping_sub(number(USED_INDEX)?));
        let mut given = Vec::new();
        while batch > 0 && last < size && given.len() < usize::from(size) {
            given.push(last);
            last = number(entry(last) + NEXT)?;
            batch -= 1;
        }
        let taken = |head: &u16| {
            let flag = self.memory.load::<u8>(GuestAddress(at + entry(*head)), Ordering::Acquire);
            flag.is_ok_and(|flag| flag != 0)
        };
        Some((0..size).filter(taken).filter(|head| !given.contains(head)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(ledger: &Ledger, ring: u64, head: u64) {
        ledger.memory.write_obj(1u8, GuestAddress(AT + REGION * ring + HEADER + ENTRY * head)).unwrap();
    }

    #[test]
    fn what_was_being_given_back_counts_by_what_the_driver_sees() {
        let ledger = Ledger::new().unwrap();
        for head in [3, 7, 200] {
            take(&ledger, 1, head);
        }
        let header = AT + REGION;
        ledger.memory.write_obj(7u16, GuestAddress(header + LAST_BATCH)).unwrap();
        ledger.memory.write_obj(41u16, GuestAddress(header + USED_INDEX)).unwrap();
        assert_eq!(ledger.in_hand(1, 256, 41).unwrap(), [3, 7, 200]);
        assert_eq!(ledger.in_hand(1, 256, 42).unwrap(), [3, 200]);
        // Of a ring that is smaller than the ledger has entries, and of another.
        assert_eq!(ledger.in_hand(1, 128, 41).unwrap(), [3, 7]);
        assert!(ledger.in_hand(0, 256, 41).unwrap().is_empty());
        ledger.clear();
        assert!(ledger.in_hand(1, 256, 0).unwrap().is_empty());
    }
}
