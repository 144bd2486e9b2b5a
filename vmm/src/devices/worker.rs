//! The one way to start a device's thread, and the loop of devices that answer every request at once. A thread
//! that fails or panics turns its device into one that needs a reset; the machine goes on.

use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Broken, Signals};
use crate::jail::{Role, narrow};
use crate::limit::warn_limited;
use crate::memory::Memory;
use crate::sys::STACK;

/// Why a device could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread of the {device} device")]
pub(crate) struct SpawnError {
    device: &'static str,
    #[source]
    source: io::Error,
}

/// What a device's thread is told.
#[derive(Debug)]
pub(crate) enum Command<T> {
    Activate(Activation),
    /// Let go of guest memory, then answer.
    Reset(SyncSender<()>),
    /// End the thread.
    Stop,
    /// Something of the device's own.
    Other(T),
}

/// The other end of a device thread's commands.
#[derive(Debug)]
pub(crate) struct Commands<T> {
    sender: Sender<Command<T>>,
    wake: Arc<EventFd>,
}

impl<T> Clone for Commands<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<T> Commands<T> {
    /// Sends a command. A thread that has ended ignores it.
    pub(crate) fn send(&self, command: Command<T>) {
        let _ = self.sender.send(command);
        // Fails only when 2^64 wake-ups are pending.
        let _ = self.wake.write(1);
    }

    /// Resets the device and waits until guest memory is no longer touched.
    pub(crate) fn reset(&self) {
        // An error means that the thread has ended, which is as good.
        let _ = self.start_reset().recv();
    }

    /// Resets the device; something comes, or the channel closes, when guest memory is no longer touched.
    pub(crate) fn start_reset(&self) -> Receiver<()> {
        let (sender, receiver) = sync_channel(1);
        self.send(Command::Reset(sender));
        receiver
    }
}

/// What a device's thread reads commands from.
#[derive(Debug)]
pub(crate) struct Inbox<T> {
    receiver: Receiver<Command<T>>,
    wake: Arc<EventFd>,
    /// The signals of the last activation, for the case that the thread fails.
    signals: Arc<Mutex<Option<Arc<Signals>>>>,
}

impl<T> Inbox<T> {
    /// Readable when there are commands.
    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The next command, if there is one. `Stop` when nobody can send any more.
    pub(crate) fn next(&self) -> Option<Command<T>> {
        use std::sync::mpsc::TryRecvError;
        match self.receiver.try_recv() {
            Ok(command) => {
                if let Command::Activate(activation) = &command {
                    let mut signals = self.signals.lock().unwrap_or_else(PoisonError::into_inner);
                    *signals = Some(Arc::clone(&activation.signals));
                }
                Some(command)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Command::Stop),
        }
    }
}

/// Both ends of a thread's commands.
pub(crate) fn commands<T>() -> io::Result<(Commands<T>, Inbox<T>)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, receiver) = channel();
    let inbox = Inbox { receiver, wake: Arc::clone(&wake), signals: Arc::default() };
    Ok((Commands { sender, wake }, inbox))
}

/// Starts a device's thread, which may make the system calls of its role only.
pub(crate) fn spawn<T: Send + 'static>(
    device: &'static str,
    role: Role,
    run: impl FnOnce(Inbox<T>) -> io::Result<()> + Send + 'static,
) -> Result<(Commands<T>, JoinHandle<()>), SpawnError> {
    let failed = |source| SpawnError { device, source };
    let (commands, inbox) = commands().map_err(failed)?;
    let signals = Arc::clone(&inbox.signals);
    let thread = std::thread::Builder::new()
        .name(device.into())
        .stack_size(STACK)
        .spawn(move || {
            match catch_unwind(AssertUnwindSafe(|| narrow(role).and_then(|()| run(inbox)))) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => tracing::error!(device, %error, "a device's thread failed"),
                Err(_) => tracing::error!(device, "a device's thread panicked"),
            }
            if let Some(signals) = signals.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                signals.broken();
            }
        })
        .map_err(failed)?;
    Ok((commands, thread))
}

/// A device that answers requests at once.
pub(crate) trait RequestHandler: Send + 'static {
    /// Answers one request from a queue and returns how many bytes were written to its buffers.
    fn handle(
        &mut self,
        queue: usize,
        memory: &Memory,
        chain: DescriptorChain<&Memory>,
    ) -> Result<u32, Broken>;
}

/// Runs a device that answers requests at once until it is stopped.
pub(crate) fn serve_queues<H: RequestHandler>(
    device: &'static str,
    inbox: &Inbox<()>,
    mut handler: H,
) -> io::Result<()> {
    let mut active: Option<Activation> = None;
    loop {
        while let Some(command) = inbox.next() {
            match command {
                Command::Activate(activation) => active = Some(activation),
                Command::Reset(done) => {
                    active = None;
                    // The transport waits, unless its thread has ended.
                    let _ = done.send(());
                }
                Command::Stop => return Ok(()),
                Command::Other(()) => {}
            }
        }
        if let Some(activation) = &mut active
            && let Err(error) = drain(activation, &mut handler)
        {
            warn_limited!(device, %error, "the guest broke a device");
            activation.signals.broken();
            active = None;
        }
        let kicks = active.iter().flat_map(|activation| &activation.queues).map(|queue| &*queue.kick);
        let events: Vec<_> = std::iter::once(inbox.wake()).chain(kicks).collect();
        wait(&events, None);
    }
}

/// Answers everything that the driver has made available.
pub(crate) fn drain<H: RequestHandler>(activation: &mut Activation, handler: &mut H) -> Result<(), Broken> {
    let Activation { memory, queues, signals, .. } = activation;
    let mut interrupt = false;
    for (index, ActiveQueue { queue, .. }) in queues.iter_mut().enumerate() {
        let before = queue.next_used();
        loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.iter(&*memory)?.next() {
                let head = chain.head_index();
                let written = handler.handle(index, memory, chain)?;
                queue.add_used(memory, head, written)?;
            }
            if !queue.enable_notification(memory)? {
                break;
            }
        }
        interrupt |= queue.next_used() != before && queue.needs_notification(memory)?;
    }
    if interrupt {
        signals.queue();
    }
    Ok(())
}

/// Sleeps until one of the events is signalled, and takes its signal away, or `other` is readable.
pub(crate) fn wait(events: &[&EventFd], other: Option<BorrowedFd<'_>>) {
    let mut polled: Vec<_> = events
        .iter()
        .map(|event| PollFd::from_borrowed_fd(crate::sys::borrow_event(event), PollFlags::IN))
        .collect();
    polled.extend(other.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    // Fails only by a signal; the caller then looks at everything and waits again.
    let _ = poll(&mut polled, None);
    for (event, _) in events.iter().zip(&polled).filter(|(_, polled)| !polled.revents().is_empty()) {
        // Nothing to take is fine: the descriptors do not block.
        let _ = event.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use std::sync::atomic::Ordering;
    use vm_memory::GuestAddress;

    #[rstest::rstest]
    #[case::it_panics(true)]
    #[case::it_fails(false)]
    fn a_thread_that_fails_makes_its_device_need_a_reset(#[case] panics: bool) {
        let (commands, thread) = spawn::<()>("trial", Role::Simple, move |inbox| {
            while inbox.next().is_none() {
                std::thread::yield_now();
            }
            assert!(!panics, "on purpose");
            Err(io::ErrorKind::Other.into())
        })
        .unwrap();
        let signals = Arc::new(Signals::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let memory = memory::allocate(&[(GuestAddress(0), 0x1000)]).unwrap();
        let activation =
            Activation { memory, queues: Vec::new(), features: 0, signals: Arc::clone(&signals) };
        commands.send(Command::Activate(activation));
        thread.join().unwrap();
        assert_ne!(signals.status.load(Ordering::SeqCst), 0);
        commands.reset();
    }
}
