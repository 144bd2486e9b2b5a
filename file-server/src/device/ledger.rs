//! What of a ring this process has in hand, kept in memory of the front end's ("inflight I/O tracking", QEMU, docs/interop/vhost-user.rst): when
//! the process is gone, the front end knows which of the guest's requests nobody will answer any more.

use std::fs::File;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Error, Result};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::{MAX_QUEUE_SIZE, MAX_QUEUES};

/// `struct QueueRegionSplit`: features, version, number of entries, last batch, used index, in bytes from its beginning; the entries follow.
const ENTRIES_NUMBER: u64 = 10;
const LAST_BATCH: u64 = 12;
const USED_INDEX: u64 = 14;
const REGION_HEADER: u64 = 16;
/// `struct DescStateSplit`: in hand or not, next of its batch, and when it was taken.
const NEXT: u64 = 6;
const COUNTER: u64 = 8;
const ENTRY: u64 = 16;

/// What of one ring is in hand.
#[derive(Debug)]
pub(super) struct Ledger {
    memory: GuestMemoryMmap,
    at: u64,
    entries: u16,
    counter: u64,
}

impl Ledger {
    /// The ledgers of as many rings as the front end has memory for.
    pub(super) fn open(request: &VhostUserInflight, file: File) -> Result<Vec<Self>> {
        let (rings, entries) = (request.num_queues, request.queue_size);
        let region = REGION_HEADER + ENTRY * u64::from(entries);
        let fits = u64::from(rings) <= MAX_QUEUES
            && entries <= MAX_QUEUE_SIZE
            && request.mmap_size >= region * u64::from(rings)
            && request.mmap_size <= 1 << 20;
        if !fits {
            return Err(Error::InvalidParam);
        }
        let place = Some(FileOffset::new(file, request.mmap_offset));
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), request.mmap_size as usize, place)])
                .map_err(|error| Error::ReqHandlerError(std::io::Error::other(error)))?;
        let ledger =
            |ring| Self { memory: memory.clone(), at: region * u64::from(ring), entries, counter: 0 };
        let ledgers: Vec<_> = (0..rings).map(ledger).collect();
        for ledger in &ledgers {
            ledger.put(ENTRIES_NUMBER, entries);
        }
        Ok(ledgers)
    }

    /// A request was taken from the ring.
    pub(super) fn taken(&mut self, head: u16) {
        let Some(entry) = self.entry(head) else { return };
        self.counter += 1;
        self.put(entry + COUNTER, self.counter);
        self.put(entry, 1u8);
    }

    /// Its answer is about to be given.
    pub(super) fn giving_back(&self, head: u16) {
        let Some(entry) = self.entry(head) else { return };
        let last: u16 = self.memory.load(GuestAddress(self.at + LAST_BATCH), Ordering::Relaxed).unwrap_or(0);
        self.put(entry + NEXT, last);
        self.put(LAST_BATCH, head);
    }

    /// It was given, and the ring's used index is this.
    pub(super) fn given_back(&self, head: u16, used: u16) {
        let Some(entry) = self.entry(head) else { return };
        self.put(entry, 0u8);
        self.put(USED_INDEX, used);
    }

    fn entry(&self, head: u16) -> Option<u64> {
        (head < self.entries).then(|| REGION_HEADER + ENTRY * u64::from(head))
    }

    fn put<T: vm_memory::AtomicAccess>(&self, offset: u64, value: T) {
        // All of it lies within what was mapped.
        let _ = self.memory.store(value, GuestAddress(self.at + offset), Ordering::Release);
    }
}
