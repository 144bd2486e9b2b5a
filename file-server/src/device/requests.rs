//! FUSE requests: from a chain of descriptors to the file system and back.

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, ByteValued, Bytes, GuestMemoryLoadGuard, GuestMemoryMmap};

use super::ring::Shared;
use crate::fs::Exported;

/// Guest memory as it is now.
pub(super) type Guard = GuestMemoryLoadGuard<GuestMemoryMmap>;
/// A request.
pub(super) type Chain = DescriptorChain<Guard>;

/// Threads for requests that may wait for a disk.
const WAITERS: usize = 4;

pub(super) struct Waiting {
    pub(super) ring: Arc<Shared>,
    pub(super) chain: Chain,
}

pub(crate) struct Requests {
    server: Server<Arc<Exported>>,
    /// To the waiters. Each ring bounds what it hands over.
    queue: Sender<Waiting>,
}

impl Requests {
    pub(super) fn start(server: Server<Arc<Exported>>) -> io::Result<Self> {
        let (sender, receiver) = channel::<Waiting>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..WAITERS {
            let receiver = Arc::clone(&receiver);
            std::thread::Builder::new().name("waiter".into()).spawn(move || wait_for_requests(&receiver))?;
        }
        Ok(Self { server, queue: sender })
    }

    /// Without threads: what is handed over stays where it is.
    #[cfg(test)]
    pub(super) fn unattended(server: Server<Arc<Exported>>) -> (Self, Receiver<Waiting>) {
        let (queue, receiver) = channel();
        (Self { server, queue }, receiver)
    }

    /// Whether the request is one that a disk may keep waiting.
    pub(super) fn may_wait(chain: &Chain) -> bool {
        let Some(first) = chain.clone().readable().next() else { return false };
        // The operation's number is the second of the header's fields.
        let Some(address) = first.addr().checked_add(4).filter(|_| first.len() >= 8) else { return false };
        let Ok(operation) = chain.memory().read_obj::<u32>(address) else { return false };
        [Opcode::Fsync, Opcode::Fsyncdir, Opcode::Fallocate].iter().any(|slow| *slow as u32 == operation)
    }

    /// Lets another thread finish a request.
    pub(super) fn hand_over(&self, ring: Arc<Shared>, chain: Chain) {
        // Without threads, this one does it.
        if let Err(SendError(waiting)) = self.queue.send(Waiting { ring, chain }) {
            waiting.ring.finish_handed_over(waiting.chain);
        }
    }

    /// Answers a request; how many bytes were written.
    pub(super) fn answer(&self, memory: &Guard, chain: Chain) -> u32 {
        let answered = catch_unwind(AssertUnwindSafe(|| self.try_answer(memory, chain.clone())));
        let written = match answered {
            Ok(Some(written)) => written,
            // A request that cannot be read, or has no room for its answer, is answered as far as possible: nobody shall hang.
            Ok(None) => answer_error(memory, chain).unwrap_or(0),
            // Fuzzers are to see it.
            #[cfg(any(test, feature = "fuzzing"))]
            Err(panic) => std::panic::resume_unwind(panic),
            #[cfg(not(any(test, feature = "fuzzing")))]
            Err(_) => {
                coracle_worker::limit::warn_limited!("a request made the file server panic");
                answer_error(memory, chain).unwrap_or(0)
            }
        };
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    fn try_answer(&self, memory: &Guard, chain: Chain) -> Option<usize> {
        let reader = Reader::from_descriptor_chain(&**memory, chain.clone()).ok()?;
        let writer = VirtioFsWriter::new(&**memory, chain).ok()?;
        self.server.handle_message(reader, writer.into(), None, None).ok()
    }
}

fn wait_for_requests(receiver: &Mutex<Receiver<Waiting>>) {
    loop {
        let received = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Waiting { ring, chain }) = received else { return };
        ring.finish_handed_over(chain);
    }
}

/// Says that the request failed.
fn answer_error(memory: &Guard, chain: Chain) -> Option<usize> {
    let header: InHeader = Reader::from_descriptor_chain(&**memory, chain.clone()).ok()?.read_obj().ok()?;
    let answer = OutHeader { len: size_of::<OutHeader>() as u32, error: -libc::EIO, unique: header.unique };
    let mut writer = VirtioFsWriter::new(&**memory, chain).ok()?;
    writer.write_all(answer.as_slice()).ok()?;
    Some(size_of::<OutHeader>())
}
