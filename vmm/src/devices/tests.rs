//! Every device against a guest that writes garbage: whatever stands in its rings and buffers, the device's thread lives
//! on, tells the guest that it is broken or ignores it, and works again after a reset.

pub(crate) mod ring;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::balloon::Balloon;
use super::block::{Block, DataDisk, LayersDisk, Segments};
use super::rng::Rng;
use super::vsock::{Vsock, VsockHandle};
use super::*;
use crate::memory::{self, Memory};
use crate::sys::borrow_event;

const SIZE: u16 = 16;
const MEMORY: usize = 0x10000;

/// Where each queue's rings are.
fn rings(index: usize) -> [u64; 3] {
    let base = 0x1000 * (1 + index as u64);
    [base, base + 0x400, base + 0x800]
}

fn queue(index: usize) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    let [table, available, used] = rings(index).map(|address| Some(address as u32));
    queue.set_desc_table_address(table, Some(0));
    queue.set_avail_ring_address(available, Some(0));
    queue.set_used_ring_address(used, Some(0));
    queue.set_ready(true);
    queue
}

/// A descriptor, mostly within memory and mostly short.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![8 => 0x8000u64..0xf000, 1 => any::<u64>()];
    let len = prop_oneof![2 => Just(44u32), 2 => Just(16u32), 4 => 0u32..0x1000, 1 => any::<u32>()];
    (address, len, 0u16..8, 0u16..SIZE + 2)
}

#[derive(Debug, Clone)]
struct Garbage {
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    index: u16,
    content: Vec<u8>,
    event_index: bool,
}

fn garbage() -> impl Strategy<Value = Garbage> {
    let content = prop_oneof![prop::collection::vec(0u8..8, 64), prop::collection::vec(any::<u8>(), 64)];
    (
        prop::collection::vec(descriptor(), SIZE as usize),
        prop::collection::vec(0..SIZE + 1, SIZE as usize),
        prop_oneof![8 => 0..=SIZE, 1 => any::<u16>()],
        content,
        any::<bool>(),
    )
        .prop_map(|(descriptors, heads, index, content, event_index)| Garbage {
            descriptors,
            heads,
            index,
            content,
            event_index,
        })
}

fn fill(memory: &Memory, queues: usize, garbage: &Garbage) {
    for at in (0x8000..0xf000).step_by(garbage.content.len()) {
        memory.write_slice(&garbage.content, GuestAddress(at)).unwrap();
    }
    for index in 0..queues {
        let [table, available, used] = rings(index);
        for (number, (address, len, flags, next)) in (0u64..).zip(&garbage.descriptors) {
            let at = table + 16 * number;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(*len, GuestAddress(at + 8)).unwrap();
            memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(*next, GuestAddress(at + 14)).unwrap();
        }
        for (number, head) in (0u64..).zip(&garbage.heads) {
            memory.write_obj(*head, GuestAddress(available + 4 + 2 * number)).unwrap();
        }
        memory.write_obj(garbage.index, GuestAddress(available + 2)).unwrap();
        memory.write_obj(0u32, GuestAddress(used)).unwrap();
    }
}

/// One life of a device: activation, a kick for every queue, reset.
fn live(device: &mut dyn VirtioDevice, garbage: &Garbage) {
    let memory = memory::allocate_shared(&[(GuestAddress(0), MEMORY)]).unwrap();
    let count = device.queue_sizes().len();
    fill(&memory, count, garbage);
    let queues: Vec<_> = (0..count)
        .map(|index| {
            let mut queue = queue(index);
            queue.set_event_idx(garbage.event_index);
            ActiveQueue { queue, kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()) }
        })
        .collect();
    let kicks: Vec<_> = queues.iter().map(|queue| Arc::clone(&queue.kick)).collect();
    let signals = Arc::new(Signals::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    device.activate(Activation { memory, queues, features: COMMON_FEATURES, signals });
    kicks.iter().for_each(|kick| kick.write(1).unwrap());
    device.reset();
}

fn vsock() -> (Vsock, VsockHandle, JoinHandle<()>) {
    let (device, handle, thread) = Vsock::new(drop).unwrap();
    for port in 0..8 {
        handle.listen(port);
    }
    (device, handle, thread)
}

fn data_file() -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    file.into()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn garbage_in_the_rings_harms_no_device(lives in prop::collection::vec(garbage(), 1..8)) {
        let (mut vsock, handle, vsock_thread) = vsock();
        let (mut rng, _, rng_thread) = Rng::new().unwrap();
        let (mut balloon, _, balloon_thread) = Balloon::new().unwrap();
        let (mut data, _, data_thread) = Block::new(DataDisk::new(data_file(), 1 << 20).unwrap()).unwrap();
        let segments = Segments::new(1 << 20).unwrap();
        segments.attach(0, 1 << 16, data_file()).unwrap();
        let (mut layers, _, layers_thread) = Block::new(LayersDisk::new(segments)).unwrap();
        let (mut files, stop_files, files_thread) = fs::tests::with_real_server();
        for garbage in &lives {
            let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            handle.connect(5, None, ours.as_fd().try_clone_to_owned().unwrap());
            let devices: [&mut dyn VirtioDevice; 6] =
                [&mut vsock, &mut rng, &mut data, &mut layers, &mut balloon, &mut files];
            for device in devices {
                live(device, garbage);
            }
        }
        let threads = [vsock_thread, rng_thread, data_thread, layers_thread, balloon_thread, files_thread];
        for thread in &threads {
            prop_assert!(!thread.is_finished());
        }
        // With it ends its server.
        stop_files();
    }
}

/// Every device, by its name.
fn device(name: &str) -> Box<dyn VirtioDevice> {
    match name {
        "vsock" => Box::new(Vsock::new(drop).unwrap().0),
        "rng" => Box::new(Rng::new().unwrap().0),
        "data-disk" => Box::new(Block::new(DataDisk::new(data_file(), 1 << 20).unwrap()).unwrap().0),
        "layers-disk" => Box::new(Block::new(LayersDisk::new(Segments::new(1 << 20).unwrap())).unwrap().0),
        "balloon" => Box::new(Balloon::new().unwrap().0),
        other => panic!("there is no device {other}"),
    }
}

/// What a driver may do to the rings of its queues, all of them invalid.
#[derive(Debug, Clone, Copy)]
enum Fault {
    RunsAhead,
    HeadOutside,
    BufferOutside,
    Loop,
    IndirectInIndirect,
    Empty,
}

fn commit(fault: Fault, memory: &Memory, [table, available, _]: [u64; 3]) {
    let put = |at: u64, (address, len, flags, next): (u64, u32, u16, u16)| {
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    };
    let (mut index, mut head) = (1, 0);
    match fault {
        Fault::RunsAhead => index = SIZE + 1,
        Fault::HeadOutside => head = SIZE,
        Fault::BufferOutside => put(table, (u64::MAX - 10, 100, 2, 0)),
        Fault::Loop => {
            put(table, (0x8000, 16, 1, 1));
            put(table + 16, (0x8000, 16, 1, 0));
        }
        Fault::IndirectInIndirect => {
            put(table, (0x9000, 16, 4, 0));
            put(0x9000, (0x9000, 16, 4, 0));
        }
        // A chain of nothing at all.
        Fault::Empty => put(table, (0x9000, 0, 4, 0)),
    }
    memory.write_obj(head, GuestAddress(available + 4)).unwrap();
    memory.write_obj(index, GuestAddress(available + 2)).unwrap();
}

#[rstest::rstest]
fn a_driver_that_breaks_its_rings_must_reset_the_device_and_then_it_works(
    #[values("vsock", "rng", "data-disk", "layers-disk", "balloon")] name: &str,
    #[values(
        Fault::RunsAhead,
        Fault::HeadOutside,
        Fault::BufferOutside,
        Fault::Loop,
        Fault::IndirectInIndirect,
        Fault::Empty
    )]
    fault: Fault,
) {
    let mut device = device(name);
    // Of vsock's queues the second is the one that is read unasked.
    let broken = if name == "vsock" { 1 } else { 0 };
    for round in 0..2 {
        let memory = memory::allocate(&[(GuestAddress(0), MEMORY)]).unwrap();
        let queues: Vec<_> = (0..device.queue_sizes().len())
            .map(|index| ActiveQueue {
                queue: queue(index),
                kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            })
            .collect();
        let kick = Arc::clone(&queues[broken].kick);
        commit(fault, &memory, rings(broken));
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let signals = Arc::new(Signals::new(line.try_clone().unwrap()));
        let for_device = Arc::clone(&signals);
        device.activate(Activation { memory, queues, features: COMMON_FEATURES, signals: for_device });
        kick.write(1).unwrap();
        while signals.status.load(Ordering::SeqCst) & STATUS_NEEDS_RESET == 0 {
            let mut polled = [PollFd::from_borrowed_fd(borrow_event(&line), PollFlags::IN)];
            let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
            assert!(
                poll(&mut polled, Some(&patience)).unwrap() > 0,
                "round {round}: it does not say that it is broken"
            );
            let _ = line.read();
        }
        assert_ne!(signals.pending() & INTERRUPT_CONFIG, 0);
        device.reset();
    }
}
