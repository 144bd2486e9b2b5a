//! The thread that has the conversation with the file server: it is introduced to it when the machine is built, gives it the rings
//! when the driver is ready, and takes them away when the driver resets the device. In between it waits for one of the two to end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use coracle_worker::chain;
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

use super::hang_up;
use super::link::{Link, LinkError};
use crate::devices::Activation;
use crate::devices::worker::{Command, Inbox};
use crate::limit::warn_limited;
use crate::sys::borrow_event;

/// Runs until it is stopped. `complaints` is signalled by the server when the driver broke a ring.
pub(super) fn run(
    inbox: &Inbox<()>,
    socket: Arc<OwnedFd>,
    queues: usize,
    complaints: EventFd,
) -> io::Result<()> {
    let mut worker = Worker { link: None, socket, active: None, complaints };
    match Link::introduce(Arc::clone(&worker.socket), queues) {
        Ok(link) => worker.link = Some(link),
        Err(error) => worker.lose(&error),
    }
    loop {
        while let Some(command) = inbox.next() {
            match command {
                Command::Activate(activation) => worker.activate(activation),
                Command::Reset(done) => {
                    worker.reset();
                    // The transport waits, unless its thread has ended.
                    let _ = done.send(());
                }
                Command::Stop => return Ok(()),
                Command::Other(()) => {}
            }
        }
        worker.wait(inbox.wake());
    }
}

struct Worker {
    /// Nothing once the server is lost: it does not come back.
    link: Option<Link>,
    socket: Arc<OwnedFd>,
    active: Option<Activation>,
    complaints: EventFd,
}

impl Worker {
    fn activate(&mut self, activation: Activation) {
        // From an earlier life of the device.
        let _ = self.complaints.read();
        let started = self.link.as_ref().map(|link| link.start(&activation, &self.complaints));
        let activation = self.active.insert(activation);
        match started {
            Some(Ok(())) => tracing::debug!("the file server has the rings"),
            Some(Err(error)) => self.lose(&error),
            None => activation.signals.broken(),
        }
    }

    /// The server has the rings no longer when this returns. One that does not say so is lost; it was told by the end of the conversation.
    fn reset(&mut self) {
        let Some(activation) = self.active.take() else { return };
        let stopped = self.link.as_ref().map(|link| link.stop(activation.queues.len()));
        if let Some(Err(error)) = stopped {
            self.lose(&error);
        }
    }

    /// Gives the server up. The driver hears of it by NEEDS_RESET, and by nothing being answered any more.
    fn lose(&mut self, error: &LinkError) {
        tracing::error!(error = chain(error), "the file server is lost: the guest has no files of the host");
        self.link = None;
        hang_up(&self.socket);
        if let Some(activation) = &self.active {
            activation.signals.broken();
        }
    }

    /// Waits for a command, a complaint, or the server's end.
    fn wait(&mut self, wake: &EventFd) {
        let mut polled = vec![
            PollFd::from_borrowed_fd(borrow_event(wake), PollFlags::IN),
            PollFd::from_borrowed_fd(borrow_event(&self.complaints), PollFlags::IN),
        ];
        polled.extend(self.link.as_ref().map(|link| PollFd::from_borrowed_fd(link.socket(), PollFlags::IN)));
        // Fails only by a signal; the caller then looks at everything and waits again.
        let _ = poll(&mut polled, None);
        let found: Vec<_> = polled.iter().map(PollFd::revents).collect();
        // Nothing to take is fine: the descriptors do not block.
        let _ = wake.read();
        if self.complaints.read().is_ok()
            && let Some(activation) = &self.active
        {
            warn_limited!(device = super::NAME, "the guest broke a device");
            activation.signals.broken();
        }
        match found.get(2) {
            Some(events) if events.intersects(PollFlags::HUP | PollFlags::ERR) => {
                self.lose(&LinkError::Closed)
            }
            // It says something that it was not asked.
            Some(events) if !events.is_empty() => self.lose(&LinkError::Nonsense),
            _ => {}
        }
    }
}
