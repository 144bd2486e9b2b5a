//! The thread that has the conversation with the file server: it is introduced to it when the machine is built, gives it the rings
//! when the driver is ready, and takes them away when the driver resets the device. In between it waits for one of the two to end. Once
//! the server is gone, it serves the rings itself: every request has an error for an answer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use coracle_worker::chain;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::Shutdown;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::ledger::Ledger;
use super::link::{Link, LinkError};
use crate::devices::worker::{self, Command, Inbox, RequestHandler};
use crate::devices::{Activation, ActiveQueue, Broken, buffers};
use crate::limit::warn_limited;
use crate::memory::Memory;
use crate::sys::borrow_event;

/// The device's thread.
pub(super) struct Worker {
    server: Server,
    socket: Arc<OwnedFd>,
    active: Option<Activation>,
    /// The rings are this thread's to serve.
    ours: bool,
    complaints: EventFd,
    ledger: Ledger,
}

/// A server that is lost does not come back.
#[derive(Debug)]
enum Server {
    Serving(Link),
    /// It was told to end, and may still have the rings.
    Leaving,
    Gone,
}

impl Worker {
    /// `complaints` is signalled by the server when the driver broke a ring.
    pub(super) fn new(socket: Arc<OwnedFd>, complaints: EventFd, ledger: Ledger) -> Self {
        Self { server: Server::Leaving, socket, active: None, ours: false, complaints, ledger }
    }

    /// Runs until it is stopped.
    pub(super) fn run(&mut self, inbox: &Inbox<()>, queues: usize) -> io::Result<()> {
        match Link::introduce(Arc::clone(&self.socket), queues) {
            Ok(link) => self.server = Server::Serving(link),
            Err(error) => self.lose(&error),
        }
        loop {
            while let Some(command) = inbox.next() {
                match command {
                    Command::Activate(activation) => self.activate(activation),
                    Command::Reset(done) => {
                        self.reset();
                        // The transport waits, unless its thread has ended.
                        let _ = done.send(());
                    }
                    Command::Stop => return Ok(()),
                    Command::Other(()) => {}
                }
            }
            self.refuse();
            self.wait(inbox.wake());
        }
    }

    fn activate(&mut self, activation: Activation) {
        // From an earlier life of the device.
        let _ = self.complaints.read();
        let started = match &self.server {
            Server::Serving(link) => link.start(&activation, &self.complaints, &self.ledger),
            // No other has ever seen these rings.
            Server::Leaving | Server::Gone => {
                self.ours = true;
                Ok(())
            }
        };
        self.active = Some(activation);
        if let Err(error) = started {
            self.lose(&error);
        }
    }

    /// The server has the rings no longer when this returns. One that does not say so is lost; it was told by the end of the conversation.
    fn reset(&mut self) {
        self.ours = false;
        let Some(activation) = self.active.take() else { return };
        if let Server::Serving(link) = &self.server
            && let Err(error) = link.stop(activation.queues.len())
        {
            self.lose(&error);
        }
    }

    /// Gives the server up. It hears of that, and ends.
    fn lose(&mut self, error: &LinkError) {
        tracing::error!(error = chain(error), "the file server is lost: the guest has no files of the host");
        self.server = Server::Leaving;
        // It fails where the other side has hung up already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }

    /// Waits for a command, a complaint, the server's end, or for requests where they are ours to answer.
    fn wait(&mut self, wake: &EventFd) {
        let [one, other] = [wake, &self.complaints].map(borrow_event);
        let wanted = match self.server {
            Server::Serving(_) => PollFlags::IN,
            // Only that it hangs up.
            Server::Leaving | Server::Gone => PollFlags::empty(),
        };
        let mut polled = vec![
            PollFd::from_borrowed_fd(one, PollFlags::IN),
            PollFd::from_borrowed_fd(other, PollFlags::IN),
        ];
        if !matches!(self.server, Server::Gone) {
            polled.push(PollFd::from_borrowed_fd(self.socket.as_fd(), wanted));
        }
        let socket = polled.get(2).map(|_| 2);
        let ours = self.active.iter().filter(|_| self.ours).flat_map(|activation| &activation.queues);
        polled.extend(ours.map(|queue| PollFd::from_borrowed_fd(borrow_event(&queue.kick), PollFlags::IN)));
        // Fails only by a signal; the caller then looks at everything and waits again.
        let _ = poll(&mut polled, None);
        let said = socket.map_or(PollFlags::empty(), |index: usize| polled[index].revents());
        // Commands come first: a device that is stopped hangs up as well.
        if wake.read().is_ok() {
            return;
        }
        if self.complaints.read().is_ok()
            && let Some(activation) = &self.active
        {
            warn_limited!(device = super::NAME, "the guest broke a device");
            activation.signals.broken();
        }
        if said.intersects(PollFlags::HUP | PollFlags::ERR) {
            if matches!(self.server, Server::Serving(_)) {
                self.lose(&LinkError::Closed);
            }
            self.server = Server::Gone;
            self.take_over();
        } else if !said.is_empty() && matches!(self.server, Server::Serving(_)) {
            // It says something that it was not asked.
            self.lose(&LinkError::Nonsense);
        }
    }

    /// Takes the rings from a server that is gone, and answers what it had in hand.
    fn take_over(&mut self) {
        let Some(activation) = self.active.as_mut().filter(|_| !self.ours) else { return };
        let Activation { memory, queues, signals, .. } = activation;
        let answered = queues.iter_mut().enumerate().try_for_each(|(index, ActiveQueue { queue, .. })| {
            let (with_ledger, mut left) = self.ledger.recover(memory, index, queue)?;
            while let Some(chain) = left.iter(&with_ledger)?.next() {
                let head = chain.head_index();
                let written = Refusals.handle(index, &with_ledger, chain)?;
                queue.add_used(memory, head, written)?;
            }
            Ok::<_, Broken>(())
        });
        self.ours = true;
        match answered {
            Ok(()) => signals.queue(),
            Err(error) => self.fail(error),
        }
    }

    /// Answers what is in the rings, if they are ours.
    fn refuse(&mut self) {
        let Some(activation) = self.active.as_mut().filter(|_| self.ours) else { return };
        for queue in &activation.queues {
            // Nothing to take is fine: the descriptors do not block.
            let _ = queue.kick.read();
        }
        if let Err(error) = worker::drain(activation, &mut Refusals) {
            self.fail(error);
        }
    }

    fn fail(&mut self, error: Broken) {
        warn_limited!(device = super::NAME, %error, "the guest broke a device");
        self.ours = false;
        if let Some(activation) = self.active.take() {
            activation.signals.broken();
        }
    }
}

/// Answers every request with `ENOTCONN`, as the kernel does for a FUSE mount whose server has ended.
struct Refusals;

impl RequestHandler for Refusals {
    fn handle(
        &mut self,
        _queue: usize,
        memory: &Memory,
        chain: DescriptorChain<&Memory>,
    ) -> Result<u32, Broken> {
        let (asked, answer) = buffers::collect(memory, chain)?;
        // `struct fuse_in_header` begins with length, operation and number; `struct fuse_out_header` is length, error and number.
        let mut header = [0; 16];
        if asked.copy_to(&mut header).is_none() || answer.len() < header.len() {
            // It wants no answer.
            return Ok(0);
        }
        let error = [header.len() as i32, -libc::ENOTCONN].map(i32::to_le_bytes);
        let message = [error.as_flattened(), &header[8..]].concat();
        answer.copy_from(&message).ok_or(Broken::Chain)?;
        Ok(message.len() as u32)
    }
}
