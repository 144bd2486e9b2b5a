//! Entry points for fuzzers: every parser of bytes that a guest, a client or a file chooses, driven by bytes alone and without
//! threads. They panic where something must not be. The unit tests run them for a moment, `vmm/fuzz` for as long as one likes.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::boot;
use crate::control::{FileRegion, FromClient, FromVmm};
use crate::devices::transport::Transport;
use crate::devices::{Activation, ActiveQueue, COMMON_FEATURES, Signals, VirtioDevice};
use crate::devices::{balloon, block, fs, rng, vsock};
use crate::memory::{self, Memory};

const MEMORY: usize = 0x1_0000;
const QUEUE_SIZE: u16 = 16;

/// A device whose queues can be filled with anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The vsock device with a host that listens on a few ports.
    Vsock,
    /// The random number device.
    Rng,
    /// The writable disk.
    DataDisk,
    /// The read-only disk with one segment.
    LayersDisk,
    /// The balloon.
    Balloon,
}

/// Lets a device serve rings and buffers that consist of these bytes; whether it called the driver broken.
pub fn device(which: Device, bytes: &[u8]) -> bool {
    let Some((flags, image)) = bytes.split_first() else { return false };
    let memory = guest_memory();
    let image = &image[..image.len().min(MEMORY)];
    memory.write_slice(image, GuestAddress(0)).expect("the image fits");
    let queues = |count: usize| {
        (0..count)
            .map(|index| {
                let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an event"));
                ActiveQueue { queue: queue(index as u32, flags & 1 != 0), kick }
            })
            .collect()
    };
    let activation = |count: usize| {
        let line = EventFd::new(EFD_NONBLOCK).expect("an event");
        let signals = Arc::new(Signals::new(line));
        Activation { memory: memory.clone(), queues: queues(count), features: COMMON_FEATURES, signals }
    };
    match which {
        Device::Vsock => vsock::serve_once(activation(3)),
        Device::Rng => rng::serve_once(activation(1)),
        Device::DataDisk => block::serve_data_once(activation(1), scratch_file(1 << 20), 1 << 20),
        Device::LayersDisk => block::serve_layers_once(activation(1), scratch_file(1 << 16), 1 << 16),
        Device::Balloon => balloon::serve_once(activation(3)),
    }
}

/// The rings of all queues lie close together at the beginning, so that short inputs reach all of them.
fn queue(index: u32, event_index: bool) -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).expect("a power of two");
    let base = 0x200 * index;
    queue.set_desc_table_address(Some(base), Some(0));
    queue.set_avail_ring_address(Some(base + 0x100), Some(0));
    queue.set_used_ring_address(Some(base + 0x140), Some(0));
    queue.set_ready(true);
    queue.set_event_idx(event_index);
    queue
}

fn guest_memory() -> Memory {
    thread_local! {
        // Memory is never unmapped: one is used again and again.
        static MEMORY_OF_THREAD: Memory =
            memory::allocate(&[(GuestAddress(0), MEMORY)]).expect("64 KiB of memory");
    }
    let memory = MEMORY_OF_THREAD.with(Memory::clone);
    memory.write_slice(&[0; MEMORY], GuestAddress(0)).expect("all of it");
    memory
}

fn scratch_file(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create(c"disk", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
    let file = File::from(fd);
    file.set_len(len).expect("its length");
    file.into()
}

/// What happens to the vsock core, told by bytes: packets of a guest and news of the host's streams, in any order. It must never
/// have more under way than the guest said it can hold, and all must be over after a reset.
pub fn vsock_core(bytes: &[u8]) {
    vsock::fuzz_core(bytes);
}

/// Bytes as a control message of either side. What can be read can be written and read again.
pub fn control_message(bytes: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<FromClient>(bytes) {
        let again = serde_json::to_vec(&message).expect("it was read");
        assert_eq!(serde_json::from_slice::<FromClient>(&again).expect("it was written"), message);
        let _ = message.request.expected_fds();
    }
    if let Ok(message) = serde_json::from_slice::<FromVmm>(bytes) {
        let again = serde_json::to_vec(&message).expect("it was read");
        assert_eq!(serde_json::from_slice::<FromVmm>(&again).expect("it was written"), message);
    }
}

/// Bytes as what a file server answers to everything that it is asked.
pub fn file_server(bytes: &[u8]) {
    thread_local! {
        static MEMORY_OF_THREAD: Memory =
            memory::allocate_shared(&[(GuestAddress(0), MEMORY)]).expect("64 KiB of memory");
    }
    let memory = MEMORY_OF_THREAD.with(Memory::clone);
    let kick = || Arc::new(EventFd::new(EFD_NONBLOCK).expect("an event"));
    let queues = (0..2).map(|index| ActiveQueue { queue: queue(index, true), kick: kick() }).collect();
    let signals = Arc::new(Signals::new(EventFd::new(EFD_NONBLOCK).expect("an event")));
    fs::fuzz_link(&Activation { memory, queues, features: COMMON_FEATURES, signals }, bytes);
}

/// Accesses to a device's registers, told by bytes.
pub fn registers(bytes: &[u8]) {
    struct Quiet;
    impl VirtioDevice for Quiet {
        fn device_type(&self) -> u32 {
            4
        }
        fn name(&self) -> &'static str {
            "quiet"
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &'static [u16] {
            &[16, 16]
        }
        fn config(&self) -> &[u8] {
            &[1, 2, 3]
        }
        fn activate(&mut self, activation: Activation) {
            assert!(activation.queues.iter().all(|active| active.queue.is_valid(&activation.memory)));
        }
        fn reset(&mut self) {}
    }
    let line = EventFd::new(EFD_NONBLOCK).expect("an event");
    let mut transport = Transport::new(Box::new(Quiet), guest_memory(), line).expect("a transport");
    for access in bytes.chunks_exact(6) {
        let offset = u64::from(access[0]) << 2 | u64::from(access[1] & 3);
        let value = &access[2..2 + usize::from(access[1] >> 2 & 3) + 1];
        if access[1] & 0x80 == 0 {
            transport.write(offset, value);
        } else {
            transport.read(offset, &mut [0; 8][..value.len()]);
        }
    }
}

/// Bytes as a kernel file.
pub fn kernel(bytes: &[u8]) {
    let mut file = File::from(scratch_file(0));
    file.write_all(bytes).expect("a file in memory takes it");
    let region = FileRegion { offset: 0, len: bytes.len() as u64 };
    let image = boot::BootImage {
        kernel: (&file, region),
        initramfs: (&file, FileRegion { offset: 0, len: 0 }),
        command_line: "",
        vcpus: 1,
    };
    thread_local! {
        static MEMORY_OF_THREAD: Memory =
            memory::allocate(&[(GuestAddress(0), 4 << 20)]).expect("4 MiB of memory");
    }
    let _ = MEMORY_OF_THREAD.with(|memory| boot::prepare(memory, &image));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that are often small numbers, as in real rings and packets.
    fn image() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![6 => Just(0u8), 4 => 0u8..20, 1 => any::<u8>()];
        prop::collection::vec(byte, 0..2000)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() })]

        #[test]
        fn no_image_of_the_rings_harms_a_device(image in image()) {
            for which in
                [Device::Vsock, Device::Rng, Device::DataDisk, Device::LayersDisk, Device::Balloon]
            {
                device(which, &image);
            }
        }

        #[test]
        fn no_story_breaks_the_vsock_core(story in prop::collection::vec(any::<u8>(), 0..600)) {
            vsock_core(&story);
        }

        #[test]
        fn no_bytes_are_a_dangerous_message_register_access_or_kernel(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            control_message(&bytes);
            file_server(&bytes);
            registers(&bytes);
            kernel(&[&b"\x7fELF\x02\x01"[..], &bytes].concat());
        }
    }

    #[test]
    fn an_image_with_a_request_is_served() {
        // One descriptor of 16 bytes that the device may write to, available.
        let mut image = vec![0u8; 0x400];
        image[1..9].copy_from_slice(&0x300u64.to_le_bytes());
        image[9..13].copy_from_slice(&16u32.to_le_bytes());
        image[13..15].copy_from_slice(&2u16.to_le_bytes());
        image[1 + 0x102] = 1;
        assert!(!device(Device::Rng, &image));
        image[1 + 0x102] = 200;
        assert!(device(Device::Rng, &image));
    }
}
