//! virtio-balloon (virtio 1.2, section 5.5): memory that the guest does not use goes back to the host. The guest reports
//! what is free of its own accord (free page reporting), and touches it again whenever it likes; the balloon itself stays
//! empty, since nothing here takes memory away from a guest that uses it.

use std::thread::JoinHandle;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemory};

use super::worker::{self, Command, Commands, RequestHandler, SpawnError};
use super::{Activation, Broken, VirtioDevice, buffers};
use crate::jail::Role;
use crate::limit::warn_limited;
use crate::memory::{self, Memory, PAGE};

const DEVICE_TYPE: u32 = 5;
const NAME: &str = "balloon";
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;
/// The queues: without the features between them, reporting is the third.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
/// `struct virtio_balloon_config`: a wanted size of zero pages, and what the driver would tell of itself.
const CONFIG: [u8; 16] = [0; 16];
/// More page numbers than a page holds are not sent at once.
const MAX_NUMBERS: usize = 4096;

/// The device as its transport sees it.
pub(crate) struct Balloon {
    commands: Commands<()>,
}

impl Balloon {
    pub(crate) fn new() -> Result<(Self, Commands<()>, JoinHandle<()>), SpawnError> {
        let (commands, thread) =
            worker::spawn(NAME, Role::Simple, |inbox| worker::serve_queues(NAME, &inbox, Returns))?;
        Ok((Self { commands: commands.clone() }, commands, thread))
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn features(&self) -> u64 {
        FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 128]
    }

    fn config(&self) -> &[u8] {
        &CONFIG
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
pub(crate) fn serve_once(mut activation: Activation) -> bool {
    worker::drain(&mut activation, &mut Returns).is_err()
}

/// Returns memory to the host.
struct Returns;

impl RequestHandler for Returns {
    fn handle(
        &mut self,
        queue: usize,
        memory: &Memory,
        chain: DescriptorChain<&Memory>,
    ) -> Result<u32, Broken> {
        match queue {
            // The ranges are the chain's buffers themselves.
            REPORTING => {
                let (_, free) = buffers::collect(memory, chain)?;
                free.parts().iter().for_each(|part| release(memory, part));
            }
            INFLATE | DEFLATE => {
                let (numbers, _) = buffers::collect(memory, chain)?;
                if numbers.len() > MAX_NUMBERS || !numbers.len().is_multiple_of(4) {
                    return Err(Broken::Chain);
                }
                let mut bytes = vec![0; numbers.len()];
                numbers.copy_to(&mut bytes).ok_or(Broken::Chain)?;
                // Pages that leave the balloon come back when they are touched.
                if queue == INFLATE {
                    inflate(memory, &bytes)?;
                }
            }
            _ => return Err(Broken::Ring),
        }
        Ok(0)
    }
}

fn inflate(memory: &Memory, numbers: &[u8]) -> Result<(), Broken> {
    for number in numbers.chunks_exact(4) {
        let number = u32::from_le_bytes([number[0], number[1], number[2], number[3]]);
        let page = memory
            .get_slice(GuestAddress(u64::from(number) * PAGE), PAGE as usize)
            .map_err(|_| Broken::Address)?;
        release(memory, &page);
    }
    Ok(())
}

fn release(memory: &Memory, part: &vm_memory::VolatileSlice<'_>) {
    if let Err(error) = memory::release(memory, part) {
        warn_limited!(%error, "memory that the guest does not use cannot be returned");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::tests::ring::{Layout, Ring, WRITABLE};
    use virtio_queue::QueueOwnedT;
    use vm_memory::Bytes;

    const AT: u64 = 4 << 20;

    fn memory() -> Memory {
        filled(memory::allocate(&[(GuestAddress(0), 16 << 20)]).unwrap())
    }

    fn filled(memory: Memory) -> Memory {
        memory.write_slice(&vec![7; 4 << 20], GuestAddress(AT)).unwrap();
        memory
    }

    /// Hands one chain to the handler as if it came from a queue.
    fn handle(queue: usize, memory: &Memory, (at, len, flags): (u64, u32, u16)) -> Result<u32, Broken> {
        let mut ring = Ring::new(0);
        ring.offer(memory, 0, at, len, Layout::Whole, flags);
        let mut queue_of_device = ring.device_side(false);
        let chain = queue_of_device.iter(memory).unwrap().next().unwrap();
        Returns.handle(queue, memory, chain)
    }

    fn bytes(memory: &Memory, at: u64) -> [u8; 2] {
        [memory.read_obj(GuestAddress(at)).unwrap(), memory.read_obj(GuestAddress(at + PAGE - 1)).unwrap()]
    }

    #[rstest::rstest]
    fn what_the_guest_reports_goes_back_and_what_lies_around_it_stays(#[values(false, true)] shared: bool) {
        let ranges = [(GuestAddress(0), 16 << 20)];
        let memory = if shared { memory::allocate_shared(&ranges) } else { memory::allocate(&ranges) };
        let memory = filled(memory.unwrap());
        assert_eq!(handle(REPORTING, &memory, (AT + PAGE, 2 << 20, WRITABLE)), Ok(0));
        assert_eq!(bytes(&memory, AT), [7, 7]);
        assert_eq!(bytes(&memory, AT + PAGE), [0, 0]);
        assert_eq!(bytes(&memory, AT + (2 << 20)), [0, 0]);
        assert_eq!(bytes(&memory, AT + (2 << 20) + PAGE), [7, 7]);
    }

    #[test]
    fn of_a_range_with_ragged_edges_only_whole_pages_go() {
        let memory = memory();
        handle(REPORTING, &memory, (AT + 1, 2 * PAGE as u32, WRITABLE)).unwrap();
        assert_eq!(bytes(&memory, AT), [7, 7]);
        assert_eq!(bytes(&memory, AT + PAGE), [0, 0]);
        assert_eq!(bytes(&memory, AT + 2 * PAGE), [7, 7]);
    }

    #[test]
    fn pages_that_are_put_into_the_balloon_go_back() {
        let memory = memory();
        let number = (AT / PAGE) as u32 + 3;
        memory.write_obj(number, GuestAddress(0x10_0000)).unwrap();
        handle(INFLATE, &memory, (0x10_0000, 4, 0)).unwrap();
        assert_eq!(bytes(&memory, AT + 3 * PAGE), [0, 0]);
        assert_eq!(bytes(&memory, AT + 2 * PAGE), [7, 7]);
        handle(DEFLATE, &memory, (0x10_0000, 4, 0)).unwrap();
    }

    #[test]
    fn what_is_outside_of_memory_or_no_list_of_pages_breaks_the_device() {
        let memory = memory();
        memory.write_obj(u32::MAX, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(handle(INFLATE, &memory, (0x10_0000, 4, 0)), Err(Broken::Address));
        assert_eq!(handle(INFLATE, &memory, (0x10_0000, 3, 0)), Err(Broken::Chain));
        assert_eq!(handle(INFLATE, &memory, (0x10_0000, 8192, 0)), Err(Broken::Chain));
        assert_eq!(handle(REPORTING, &memory, (16 << 20, 4096, WRITABLE)), Err(Broken::Address));
    }
}
