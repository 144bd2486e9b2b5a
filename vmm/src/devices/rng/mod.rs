//! virtio-rng (virtio 1.2, section 5.4): fills the driver's buffers from the host's `getrandom`.

use std::thread::JoinHandle;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::DescriptorChain;

use super::worker::{self, Command, Commands, RequestHandler, SpawnError};
use super::{Activation, Broken, VirtioDevice, buffers};
use crate::jail::Role;
use crate::memory::Memory;

const DEVICE_TYPE: u32 = 4;
const NAME: &str = "rng";
/// A driver that asks for more gets this much at once.
const MAX_REQUEST: usize = 4096;

/// The device as its transport sees it.
pub(crate) struct Rng {
    commands: Commands<()>,
}

impl Rng {
    pub(crate) fn new() -> Result<(Self, Commands<()>, JoinHandle<()>), SpawnError> {
        let (commands, thread) =
            worker::spawn(NAME, Role::Simple, |inbox| worker::serve_queues(NAME, &inbox, Entropy))?;
        Ok((Self { commands: commands.clone() }, commands, thread))
    }
}

impl VirtioDevice for Rng {
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
        &[16]
    }

    fn config(&self) -> &[u8] {
        &[]
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
    worker::drain(&mut activation, &mut Entropy).is_err()
}

struct Entropy;

impl RequestHandler for Entropy {
    fn handle(
        &mut self,
        _queue: usize,
        memory: &Memory,
        chain: DescriptorChain<&Memory>,
    ) -> Result<u32, Broken> {
        let (_, writable) = buffers::collect(memory, chain)?;
        let mut bytes = [0; MAX_REQUEST];
        let wanted = writable.len().min(MAX_REQUEST);
        let count = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
        writable.copy_from(&bytes[..count]).ok_or(Broken::Chain)?;
        Ok(count as u32)
    }
}
