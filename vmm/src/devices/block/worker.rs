//! A disk's thread: takes requests from the queue, keeps several of them under way where the host has io_uring, and answers them
//! in the order in which they are done. Guest memory is let go of only when nothing is under way any more.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::super::worker::{Command, Inbox, wait};
use super::super::{Activation, ActiveQueue, Broken};
use super::job::Job;
use super::request::{Backend, Request, Requests};
use super::ring::{DEPTH, Ring};
use crate::limit::warn_limited;
use crate::memory::Memory;

/// How requests are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Several at a time if the host has io_uring.
    SideBySide,
    /// One after the other.
    #[cfg(test)]
    OneByOne,
}

/// Why the disk is out of service.
enum Ended {
    Stop,
    Reset(SyncSender<()>),
    Broken,
}

/// Runs the device until it is stopped.
pub(super) fn run<B: Backend>(inbox: &Inbox<()>, mut requests: Requests<B>, way: Way) -> io::Result<()> {
    let disk = requests.name();
    let mut ring = if way == Way::SideBySide { open_ring(disk) } else { None };
    loop {
        match inbox.next() {
            Some(Command::Activate(activation)) => {
                requests.activated(activation.features);
                let signals = Arc::clone(&activation.signals);
                match serve(inbox, activation, &requests, ring.as_mut())? {
                    Ended::Stop => return Ok(()),
                    // The transport waits, unless its thread has ended.
                    Ended::Reset(done) => drop(done.send(())),
                    Ended::Broken => signals.broken(),
                }
            }
            Some(Command::Reset(done)) => drop(done.send(())),
            Some(Command::Stop) => return Ok(()),
            Some(Command::Other(())) => {}
            None => wait(&[inbox.wake()], None),
        }
    }
}

fn open_ring(disk: &'static str) -> Option<Ring> {
    match Ring::new() {
        Ok(ring) => Some(ring),
        Err(error) => {
            tracing::info!(disk, %error, "no io_uring here: the disk does one request at a time");
            None
        }
    }
}

/// Serves the driver until it resets the device or breaks it.
fn serve<B: Backend>(
    inbox: &Inbox<()>,
    activation: Activation,
    requests: &Requests<B>,
    ring: Option<&mut Ring>,
) -> io::Result<Ended> {
    let Activation { memory, mut queues, signals, .. } = activation;
    let Some(ActiveQueue { queue, kick }) = queues.pop() else { return Ok(Ended::Broken) };
    let mut disk = Disk { memory: &memory, queue, requests, ring, flights: Flights::new() };
    let ended = loop {
        match inbox.next() {
            Some(Command::Stop) => break Ended::Stop,
            Some(Command::Reset(done)) => break Ended::Reset(done),
            Some(Command::Activate(_) | Command::Other(())) => {}
            None => {
                match disk.work() {
                    Ok(true) => signals.queue(),
                    Ok(false) => {}
                    Err(Failure::Guest(error)) => {
                        warn_limited!(device = requests.name(), %error, "the guest broke a device");
                        break Ended::Broken;
                    }
                    Err(Failure::Host(error)) => return Err(error),
                }
                let ring = disk.ring.as_ref().map(|ring| ring.completions());
                wait(&[inbox.wake(), &kick], ring);
            }
        }
    };
    disk.settle()?;
    Ok(ended)
}

/// Serves what is in the queue, one request after the other and without a thread; true if that broke the device.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn serve_once<B: Backend>(activation: Activation, requests: &Requests<B>) -> bool {
    let Activation { memory, mut queues, .. } = activation;
    queues.pop().is_none_or(|ActiveQueue { queue, .. }| {
        let mut disk = Disk { memory: &memory, queue, requests, ring: None, flights: Flights::new() };
        disk.work().is_err()
    })
}

#[derive(Debug)]
enum Failure {
    Guest(Broken),
    Host(io::Error),
}

impl<E: Into<Broken>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Guest(error.into())
    }
}

/// Requests under way, by the numbers that their calls have in the ring.
struct Flights<'m> {
    slots: Vec<Option<Request<'m>>>,
    free: Vec<usize>,
    under_way: usize,
}

impl<'m> Flights<'m> {
    fn new() -> Self {
        Self { slots: (0..DEPTH).map(|_| None).collect(), free: (0..DEPTH).rev().collect(), under_way: 0 }
    }

    fn insert(&mut self, index: usize, request: Request<'m>) {
        self.slots[index] = Some(request);
        self.under_way += 1;
    }

    fn remove(&mut self, number: u64) -> Option<(usize, Request<'m>)> {
        let index = usize::try_from(number).ok()?;
        let request = self.slots.get_mut(index)?.take()?;
        self.under_way -= 1;
        Some((index, request))
    }
}

/// A disk in service.
struct Disk<'m, 'r, B> {
    memory: &'m Memory,
    queue: Queue,
    requests: &'r Requests<B>,
    ring: Option<&'r mut Ring>,
    flights: Flights<'m>,
}

impl<'m, B: Backend> Disk<'m, '_, B> {
    /// Does everything that can be done without waiting. True if the driver wants to be told of what was answered.
    fn work(&mut self) -> Result<bool, Failure> {
        let before = self.queue.next_used();
        loop {
            self.queue.disable_notification(self.memory)?;
            self.take()?;
            if let Some(ring) = &mut self.ring {
                ring.submit().map_err(Failure::Host)?;
            }
            // What is in the page cache is done at once.
            if self.complete()? {
                continue;
            }
            // With all places taken, the next completion leads back here.
            if self.flights.free.is_empty() || !self.queue.enable_notification(self.memory)? {
                break;
            }
        }
        Ok(self.queue.next_used() != before && self.queue.needs_notification(self.memory)?)
    }

    /// Takes what the driver has made available.
    fn take(&mut self) -> Result<(), Failure> {
        while !self.flights.free.is_empty() {
            let Some(chain) = self.queue.iter(self.memory)?.next() else { break };
            let request = self.requests.begin(self.memory, chain)?;
            match self.flights.free.pop() {
                Some(index) => self.go_on(index, request)?,
                None => break,
            }
        }
        Ok(())
    }

    /// Takes the results that are there; false if there are none.
    fn complete(&mut self) -> Result<bool, Failure> {
        let mut any = false;
        while let Some((number, result)) = self.ring.as_mut().and_then(|ring| ring.next()) {
            any = true;
            let Some((index, mut request)) = self.flights.remove(number) else { continue };
            match request.jobs.front_mut().map(|job| job.advance(result)) {
                Some(Ok(true)) => drop(request.jobs.pop_front()),
                Some(Ok(false)) | None => {}
                Some(Err(error)) => request.fail(self.requests.name(), &error),
            }
            self.go_on(index, request)?;
        }
        Ok(any)
    }

    /// Starts the request's next job, or answers it when there is none.
    fn go_on(&mut self, index: usize, mut request: Request<'m>) -> Result<(), Failure> {
        while let Some(job) = request.jobs.front() {
            match &mut self.ring {
                _ if job.is_empty() => drop(request.jobs.pop_front()),
                Some(ring) => {
                    // SAFETY: the request is kept, and changed again only when its result was taken; `settle` takes all results
                    // before guest memory is let go of, and that is never unmapped.
                    unsafe { ring.push(job, index as u64) }.map_err(Failure::Host)?;
                    self.flights.insert(index, request);
                    return Ok(());
                }
                None => {
                    if let Some(Err(error)) = request.jobs.pop_front().map(Job::run) {
                        request.fail(self.requests.name(), &error);
                    }
                }
            }
        }
        self.flights.free.push(index);
        let (head, written) = request.finish()?;
        self.queue.add_used(self.memory, head, written)?;
        Ok(())
    }

    /// Waits until nothing is under way. The results do not matter any more.
    fn settle(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        while self.flights.under_way > 0 {
            ring.wait()?;
            while let Some((number, _)) = ring.next() {
                self.flights.remove(number);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
