//! One ring and its thread. The thread waits for kicks and serves what is in the ring; requests that may wait for a disk are handed to
//! other threads, so that look-ups do not queue up behind an `fsync`. A ring never has more of them in hand than it has descriptors: a guest that
//! asks for more, which an honest one cannot, is not served until some are finished.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use coracle_worker::limit::warn_limited;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::vhost_user::{Error, Result};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::ledger::Ledger;
use super::requests::{Chain, Requests};
use super::{MAX_QUEUE_SIZE, Memory};

/// What a ring's thread, and those that finish requests for it, share with the front end.
pub(super) struct Shared {
    memory: Memory,
    state: Mutex<State>,
    /// Nothing is in the hands of other threads.
    idle: Condvar,
    enabled: AtomicBool,
    requests: Arc<Requests>,
}

struct State {
    queue: Queue,
    call: Option<OwnedFd>,
    /// Tells the front end that the ring is broken.
    complaints: Option<OwnedFd>,
    /// What is in hand, if the front end wants to know.
    ledger: Option<Ledger>,
    /// A ring that makes no sense is left alone until it is set up again.
    broken: bool,
    /// How many requests other threads have in hand.
    handed_over: usize,
    /// That is as many as may be: who finishes one wakes the ring's thread.
    stalled: bool,
    /// The ring's thread is to end.
    stopping: bool,
    /// Wakes the ring's thread.
    wake: Option<Arc<OwnedFd>>,
}

impl State {
    fn new() -> Self {
        Self {
            queue: new_queue(),
            call: None,
            complaints: None,
            ledger: None,
            broken: false,
            handed_over: 0,
            stalled: false,
            stopping: false,
            wake: None,
        }
    }

    fn wake(&self) {
        if let Some(wake) = &self.wake {
            // An event takes a number, or is full, and the thread wakes.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }

    /// Leaves the ring alone from now on.
    fn give_up(&mut self) {
        warn_limited!("a ring is broken: it is left alone until it is set up again");
        self.broken = true;
        if let Some(complaints) = &self.complaints {
            // As above.
            let _ = rustix::io::write(complaints, &1u64.to_ne_bytes());
        }
    }
}

struct Thread {
    handle: JoinHandle<()>,
    kick: Arc<OwnedFd>,
}

pub(crate) struct Ring {
    shared: Arc<Shared>,
    thread: Option<Thread>,
}

fn new_queue() -> Queue {
    // The size is a power of two, which is all that is asked of it.
    Queue::new(MAX_QUEUE_SIZE).unwrap_or_default()
}

impl Ring {
    pub(crate) fn new(memory: Memory, requests: Arc<Requests>) -> Self {
        let (state, idle) = (Mutex::new(State::new()), Condvar::new());
        let enabled = AtomicBool::new(false);
        Self { shared: Arc::new(Shared { memory, state, idle, enabled, requests }), thread: None }
    }

    /// Changes the queue.
    pub(crate) fn configure<T>(&mut self, change: impl FnOnce(&mut Queue) -> T) -> T {
        let mut state = self.shared.lock();
        state.broken = false;
        change(&mut state.queue)
    }

    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.shared.lock().call = call;
    }

    pub(super) fn set_complaints(&mut self, complaints: Option<OwnedFd>) {
        self.shared.lock().complaints = complaints;
    }

    pub(super) fn set_ledger(&mut self, ledger: Option<Ledger>) {
        self.shared.lock().ledger = ledger;
    }

    /// Serves the ring upon kicks.
    pub(super) fn start(&mut self, kick: OwnedFd) -> io::Result<()> {
        self.stop_thread();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let kick = Arc::new(kick);
        let (shared, kicked, woken) = (Arc::clone(&self.shared), Arc::clone(&kick), Arc::clone(&wake));
        let mut state = self.shared.lock();
        let handle =
            std::thread::Builder::new().name("ring".into()).spawn(move || shared.run(&kicked, &woken))?;
        state.queue.set_ready(true);
        (state.stopping, state.stalled, state.wake) = (false, false, Some(wake));
        drop(state);
        self.thread = Some(Thread { handle, kick });
        Ok(())
    }

    pub(super) fn enable(&mut self, enable: bool) -> Result<()> {
        self.shared.enabled.store(enable, Ordering::Release);
        // What was put into the ring before is served now.
        if let Some(thread) = self.thread.as_ref().filter(|_| enable) {
            rustix::io::write(&thread.kick, &1u64.to_ne_bytes())
                .map_err(|errno| Error::ReqHandlerError(errno.into()))?;
        }
        Ok(())
    }

    /// Serves what is in the ring in this thread, and waits for what others have in hand.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn serve_now(&mut self) {
        loop {
            self.shared.serve();
            let mut state = self.shared.wait_idle();
            if !std::mem::take(&mut state.stalled) {
                return;
            }
        }
    }

    /// Serves nothing more. What others have in hand of this ring is finished first.
    pub(super) fn stop(&mut self) {
        self.stop_thread();
        let mut state = self.shared.wait_idle();
        state.queue.set_ready(false);
        (state.call, state.complaints, state.ledger) = (None, None, None);
    }

    pub(super) fn reset(&mut self) {
        self.stop();
        self.shared.enabled.store(false, Ordering::Release);
        let mut state = self.shared.lock();
        state.queue = new_queue();
        state.broken = false;
    }

    fn stop_thread(&mut self) {
        if let Some(thread) = self.thread.take() {
            {
                let mut state = self.shared.lock();
                state.stopping = true;
                state.wake();
            }
            let _ = thread.handle.join();
            self.shared.lock().wake = None;
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until other threads have nothing of this ring in hand.
    fn wait_idle(&self) -> MutexGuard<'_, State> {
        self.idle
            .wait_while(self.lock(), |state| state.handed_over > 0)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self: Arc<Self>, kick: &OwnedFd, wake: &OwnedFd) {
        loop {
            let mut polled =
                [PollFd::new(kick, PollFlags::IN), PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "cannot wait for a ring"),
            }
            let woken = !polled[1].revents().is_empty();
            if woken {
                // It does not block.
                let _ = rustix::io::read(wake, &mut [0; 8]);
                if self.lock().stopping {
                    return;
                }
            }
            if polled[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL | PollFlags::HUP) {
                return tracing::error!("a ring's event is broken");
            }
            let kicked = polled[0].revents().contains(PollFlags::IN);
            if kicked {
                // Only this thread reads the event, so that it does not block.
                let _ = rustix::io::read(kick, &mut [0; 8]);
            }
            if (kicked || woken) && self.enabled.load(Ordering::Acquire) {
                self.serve();
            }
        }
    }

    /// Serves what is in the ring.
    fn serve(self: &Arc<Self>) {
        while let Some(chain) = self.take() {
            if Requests::may_wait(&chain) {
                self.lock().handed_over += 1;
                self.requests.hand_over(Arc::clone(self), chain);
            } else {
                self.finish(chain);
            }
        }
    }

    /// The next request, or none; then the guest will kick.
    fn take(&self) -> Option<Chain> {
        let memory = self.memory.memory();
        let mut state = self.lock();
        if state.broken || state.stopping || !state.queue.ready() {
            return None;
        }
        if state.handed_over >= usize::from(state.queue.size()) {
            state.stalled = true;
            return None;
        }
        let taken = state.queue.pop_descriptor_chain(memory.clone());
        let taken = match taken {
            Some(chain) => Some(chain),
            None => {
                let more = match state.queue.enable_notification(&*memory) {
                    Ok(false) => return None,
                    Ok(true) => state.queue.pop_descriptor_chain(memory),
                    Err(_) => None,
                };
                // An index that says there is something where nothing can be taken.
                if more.is_none() {
                    state.give_up();
                }
                more
            }
        };
        if let (Some(chain), Some(ledger)) = (&taken, &mut state.ledger) {
            ledger.taken(chain.head_index());
        }
        taken
    }

    /// The same for a request that was handed over to this thread.
    pub(super) fn finish_handed_over(&self, chain: Chain) {
        self.finish(chain);
        let mut state = self.lock();
        state.handed_over -= 1;
        if std::mem::take(&mut state.stalled) {
            state.wake();
        }
        drop(state);
        self.idle.notify_all();
    }

    /// Answers a request and gives its buffers back.
    fn finish(&self, chain: Chain) {
        let memory = self.memory.memory();
        let head = chain.head_index();
        let written = self.requests.answer(&memory, chain);
        let mut state = self.lock();
        let State { queue, call, ledger, .. } = &mut *state;
        if let Some(ledger) = ledger {
            ledger.giving_back(head);
        }
        let given = queue.add_used(&*memory, head, written);
        if let Some(ledger) = ledger {
            ledger.given_back(head, queue.next_used());
        }
        let notify = given.and_then(|()| queue.needs_notification(&*memory));
        match notify {
            Ok(true) => {
                if let Some(call) = call {
                    // It can only fail by being full, and then the guest is told already.
                    let _ = rustix::io::write(call, &1u64.to_ne_bytes());
                }
            }
            Ok(false) => {}
            Err(_) => state.give_up(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use fuse_backend_rs::abi::fuse_abi::Opcode;
    use fuse_backend_rs::api::server::Server;
    use vhost::vhost_user::message::VhostUserInflight;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::fs::{Exported, Identity, Proc};

    const SIZE: u16 = 16;
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const REQUEST: u64 = 0x3000;

    /// Offers requests that may wait until the ring has had so many in all.
    fn offer(memory: &Memory, all: u16) {
        memory.memory().write_obj(all, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    fn ring(memory: &Memory, requests: &Arc<Requests>) -> Ring {
        let mut ring = Ring::new(memory.clone(), Arc::clone(requests));
        ring.configure(|queue| {
            queue.set_size(SIZE);
            queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
            queue.set_ready(true);
        });
        ring.enable(true).unwrap();
        ring
    }

    #[test]
    fn a_ring_has_no_more_in_hand_than_it_has_descriptors_and_others_do_not_wait_for_it() {
        let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        for head in 0..u64::from(SIZE) {
            let descriptor = [REQUEST.to_le_bytes(), 40u64.to_le_bytes()].concat();
            memory.memory().write_slice(&descriptor, GuestAddress(16 * head)).unwrap();
            memory.memory().write_obj(head as u16, GuestAddress(AVAILABLE + 4 + 2 * head)).unwrap();
        }
        memory.memory().write_obj(Opcode::Fsync as u32, GuestAddress(REQUEST + 4)).unwrap();
        let files = Exported::new(Proc::ABSOLUTE, Identity::of_process().unwrap(), 64);
        let (requests, waiting) = Requests::unattended(Server::new(Arc::new(files)));
        let requests = Arc::new(requests);
        let (mut ring, mut other) = (ring(&memory, &requests), ring(&memory, &requests));
        let region = 16 + 16 * u64::from(SIZE);
        let file = tempfile::tempfile().unwrap();
        file.set_len(region).unwrap();
        let request = VhostUserInflight::new(region, 0, 1, SIZE);
        ring.set_ledger(Ledger::open(&request, file.try_clone().unwrap()).unwrap().pop());
        // So many are in hand, and the used index is this.
        let ledger = || {
            let mut bytes = vec![0; region as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            let taken = bytes[16..].chunks(16).filter(|entry| entry[0] != 0).count();
            (taken, u16::from_ne_bytes([bytes[14], bytes[15]]))
        };
        // A guest that offers its descriptors again before it has them back.
        for all in [SIZE, 2 * SIZE] {
            offer(&memory, all);
            ring.shared.serve();
        }
        let mut in_hand: VecDeque<_> = waiting.try_iter().collect();
        assert_eq!(in_hand.len(), usize::from(SIZE));
        assert_eq!(ledger(), (usize::from(SIZE), 0));
        other.stop();
        // Whenever one is finished, another one is taken.
        let kick = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        ring.start(kick).unwrap();
        for _ in 0..SIZE {
            let finished = in_hand.pop_front().unwrap();
            finished.ring.finish_handed_over(finished.chain);
            in_hand.push_back(waiting.recv_timeout(Duration::from_secs(10)).unwrap());
        }
        assert_eq!(ledger(), (usize::from(SIZE), SIZE));
        for finished in in_hand {
            finished.ring.finish_handed_over(finished.chain);
        }
        assert_eq!(ledger(), (0, 2 * SIZE));
        ring.stop();
        assert_eq!(memory.memory().read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 2 * SIZE);
    }
}
