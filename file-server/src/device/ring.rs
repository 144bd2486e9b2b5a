//! One ring and its thread. The thread waits for kicks and serves what is in the ring; requests that may wait for a disk are handed to
//! other threads, so that look-ups do not queue up behind an `fsync`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::vhost_user::{Error, Result};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::requests::{Chain, Requests};
use super::{MAX_QUEUE_SIZE, Memory};

/// What a ring's thread, and those that finish requests for it, share with the front end.
pub(super) struct Shared {
    memory: Memory,
    state: Mutex<State>,
    enabled: AtomicBool,
    requests: Arc<Requests>,
}

struct State {
    queue: Queue,
    call: Option<OwnedFd>,
    /// A ring that makes no sense is left alone until it is set up again.
    broken: bool,
}

struct Thread {
    handle: JoinHandle<()>,
    stop: OwnedFd,
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
        let state = Mutex::new(State { queue: new_queue(), call: None, broken: false });
        Self {
            shared: Arc::new(Shared { memory, state, enabled: AtomicBool::new(false), requests }),
            thread: None,
        }
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

    /// Serves the ring upon kicks.
    pub(super) fn start(&mut self, kick: OwnedFd) -> io::Result<()> {
        self.stop_thread();
        self.shared.lock().queue.set_ready(true);
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let kick = Arc::new(kick);
        let (shared, kicked) = (Arc::clone(&self.shared), Arc::clone(&kick));
        let handle =
            std::thread::Builder::new().name("ring".into()).spawn(move || shared.run(&kicked, &stopped))?;
        self.thread = Some(Thread { handle, stop, kick });
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
        self.shared.serve();
        self.shared.requests.wait_idle();
    }

    /// Serves nothing more. Requests that others have in hand are finished first.
    pub(super) fn stop(&mut self) {
        self.stop_thread();
        self.shared.requests.wait_idle();
        let mut state = self.shared.lock();
        state.queue.set_ready(false);
        state.call = None;
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
            // An event takes a number, and the thread ends, whatever happens.
            let _ = rustix::io::write(&thread.stop, &1u64.to_ne_bytes());
            let _ = thread.handle.join();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    pub(super) fn requests(&self) -> &Requests {
        &self.requests
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self: Arc<Self>, kick: &OwnedFd, stop: &OwnedFd) {
        loop {
            let mut polled =
                [PollFd::new(kick, PollFlags::IN), PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "cannot wait for a ring"),
            }
            if !polled[1].revents().is_empty() {
                return;
            }
            if polled[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL | PollFlags::HUP) {
                return tracing::error!("a ring's event is broken");
            }
            if polled[0].revents().contains(PollFlags::IN) {
                // Only this thread reads the event, so that it does not block.
                let _ = rustix::io::read(kick, &mut [0; 8]);
                if self.enabled.load(Ordering::Acquire) {
                    self.serve();
                }
            }
        }
    }

    /// Serves what is in the ring.
    fn serve(self: &Arc<Self>) {
        while let Some(chain) = self.take() {
            if Requests::may_wait(&chain) {
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
        if state.broken || !state.queue.ready() {
            return None;
        }
        if let Some(chain) = state.queue.pop_descriptor_chain(memory.clone()) {
            return Some(chain);
        }
        let more = match state.queue.enable_notification(&*memory) {
            Ok(false) => return None,
            Ok(true) => state.queue.pop_descriptor_chain(memory),
            Err(_) => None,
        };
        // An index that says there is something where nothing can be taken.
        if more.is_none() {
            tracing::warn!("a ring is broken: it is left alone until it is set up again");
            state.broken = true;
        }
        more
    }

    /// Answers a request and gives its buffers back.
    pub(super) fn finish(&self, chain: Chain) {
        let memory = self.memory.memory();
        let head = chain.head_index();
        let written = self.requests.answer(&memory, chain);
        let mut state = self.lock();
        let State { queue, call, broken } = &mut *state;
        let notify =
            queue.add_used(&*memory, head, written).and_then(|()| queue.needs_notification(&*memory));
        match notify {
            Ok(true) => {
                if let Some(call) = call {
                    // It can only fail by being full, and then the guest is told already.
                    let _ = rustix::io::write(call, &1u64.to_ne_bytes());
                }
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "a ring is broken");
                *broken = true;
            }
        }
    }
}
