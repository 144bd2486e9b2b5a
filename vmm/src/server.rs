//! The main thread: serves the control socket, one client at a time, and passes on what the machine's threads report.
//! What happens while no client is there is kept for the next one.

mod outbox;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use coracle_worker::chain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::clock;
use crate::control::{
    Answer, Boot, BootTimes, Event, ExitReason, FromClient, FromVmm, MachineState, Outcome, Received, Reply,
    Request, SocketError, Status, VsockListen, accept, receive,
};
use crate::devices::vsock::{Accepted, FIRST_EPHEMERAL};
use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::jail::{Role, narrow};
use crate::machine::{Machine, Report, Reports};
use crate::sys::borrow_event;
use outbox::Outbox;

/// How long a client may take to read the last event.
const FAREWELL: Duration = Duration::from_secs(2);
/// The most connections of the guest that wait for a client.
const MAX_WAITING: usize = 256;

/// Serves `listener` until the machine is over. Without a hypervisor, `boot` says why there is none.
pub(crate) fn serve(
    hypervisor: Result<Box<dyn Hypervisor>, HypervisorError>,
    listener: OwnedFd,
    started: u64,
) -> io::Result<ExitReason> {
    let (sender, reports) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let mut server = Server {
        hypervisor,
        listener,
        client: None,
        reports: Reports { sender, wake },
        machine: None,
        ended: None,
        times: BootTimes { process_start: Some(started), ..BootTimes::default() },
        listening: HashMap::new(),
        kept: HashMap::new(),
        waiting: VecDeque::new(),
    };
    server.run(&reports)
}

struct Server {
    hypervisor: Result<Box<dyn Hypervisor>, HypervisorError>,
    listener: OwnedFd,
    client: Option<Outbox>,
    reports: Reports,
    machine: Option<Machine>,
    ended: Option<ExitReason>,
    times: BootTimes,
    /// Ports of the host, and whether their newest connection is kept.
    listening: HashMap<u32, bool>,
    kept: HashMap<u32, Accepted>,
    waiting: VecDeque<Accepted>,
}

impl Server {
    fn run(&mut self, reports: &Receiver<Report>) -> io::Result<ExitReason> {
        loop {
            self.wait(None)?;
            // Nothing to take is fine: the descriptor does not block.
            let _ = self.reports.wake.read();
            while let Ok(report) = reports.try_recv() {
                self.on_report(report);
            }
            self.take_new_client();
            self.serve_client();
            if let Some(reason) = self.ended.clone() {
                self.say_farewell(&reason)?;
                return Ok(reason);
            }
        }
    }

    /// Waits until something can be done.
    fn wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        let mut polled = vec![
            PollFd::from_borrowed_fd(borrow_event(&self.reports.wake), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
        ];
        if let Some(client) = &self.client {
            let mut flags = PollFlags::IN;
            if !client.is_empty() {
                flags |= PollFlags::OUT;
            }
            polled.push(PollFd::from_borrowed_fd(client.socket(), flags));
        }
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Accepted(accepted) => self.on_accepted(accepted),
            Report::Ended(reason) => {
                let reason = self.explain(reason);
                tracing::info!(%reason, "the machine has ended");
                self.end(reason);
            }
        }
    }

    /// A guest that died of a panic said so on its console.
    fn explain(&self, reason: ExitReason) -> ExitReason {
        let Some(tail) = self.machine.as_ref().map(Machine::tail) else { return reason };
        match (reason, tail.panic()) {
            (ExitReason::GuestReset | ExitReason::TripleFault, Some(message)) => {
                tracing::error!("the guest's kernel panicked; its last words:\n{}", tail.text().trim_end());
                ExitReason::GuestPanic { message }
            }
            (reason, _) => reason,
        }
    }

    fn end(&mut self, reason: ExitReason) {
        if let Some(machine) = self.machine.take() {
            machine.stop();
        }
        self.ended.get_or_insert(reason);
    }

    fn on_accepted(&mut self, accepted: Accepted) {
        let keep = self.listening.get(&accepted.port).copied().unwrap_or(false);
        if keep {
            let copy = accepted.stream.try_clone();
            if let Ok(stream) = copy {
                let kept = Accepted { stream, port: accepted.port, guest_port: accepted.guest_port };
                self.kept.insert(accepted.port, kept);
            }
        }
        if self.client.is_some() {
            self.announce(accepted);
        } else if !keep && self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(accepted);
        }
    }

    fn announce(&mut self, accepted: Accepted) {
        let event = Event::VsockAccepted { port: accepted.port, guest_port: accepted.guest_port };
        self.say(&FromVmm::Event(event), Some(accepted.stream));
    }

    fn say(&mut self, message: &FromVmm, fd: Option<OwnedFd>) {
        let Some(client) = &mut self.client else { return };
        if let Err(error) = client.push(message, fd) {
            tracing::warn!(%error, "the client is lost");
            self.client = None;
        }
    }

    fn take_new_client(&mut self) {
        loop {
            match accept(self.listener.as_fd()) {
                Ok(socket) => self.welcome(socket),
                Err(SocketError::WouldBlock) => return,
                Err(error) => return tracing::warn!(%error, "a client could not be accepted"),
            }
        }
    }

    fn welcome(&mut self, socket: OwnedFd) {
        self.client = Some(Outbox::new(socket));
        self.kept.retain(|_, accepted| is_connected(&accepted.stream));
        let mut again: Vec<_> = self
            .kept
            .values()
            .filter_map(|kept| {
                let stream = kept.stream.try_clone().ok()?;
                Some(Accepted { stream, port: kept.port, guest_port: kept.guest_port })
            })
            .collect();
        again.extend(self.waiting.drain(..));
        again.into_iter().for_each(|accepted| self.announce(accepted));
    }

    /// Reads what the client asks for and sends what waits for it.
    fn serve_client(&mut self) {
        while let Some(client) = &self.client {
            match receive(client.socket()) {
                Ok(Received::Message(bytes, fds)) => self.on_message(&bytes, fds),
                Ok(Received::Closed) => self.client = None,
                Err(SocketError::WouldBlock) => break,
                Err(error @ (SocketError::TooLong | SocketError::TooManyFds)) => {
                    self.reply(0, Err(error.to_string()));
                }
                Err(error) => {
                    tracing::warn!(%error, "the client is lost");
                    self.client = None;
                }
            }
        }
        if self.client.as_mut().is_some_and(|client| client.flush().is_err()) {
            self.client = None;
        }
    }

    fn on_message(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        match serde_json::from_slice::<FromClient>(bytes) {
            Ok(message) => {
                let outcome = self.perform(message.request, fds);
                self.reply(message.id, outcome);
            }
            Err(error) => self.reply(0, Err(format!("the request cannot be read: {error}"))),
        }
    }

    fn reply(&mut self, id: u64, outcome: Result<Answer, String>) {
        let outcome = match outcome {
            Ok(answer) => Outcome::Ok(answer),
            Err(message) => Outcome::Error(message),
        };
        self.say(&FromVmm::Reply(Reply { id, outcome }), None);
    }

    fn perform(&mut self, request: Request, mut fds: Vec<OwnedFd>) -> Result<Answer, String> {
        if fds.len() != request.expected_fds() {
            return Err(format!(
                "the request needs {} descriptors and came with {}",
                request.expected_fds(),
                fds.len()
            ));
        }
        match request {
            Request::Boot(boot) => self.boot(&boot, fds)?,
            Request::Status => return Ok(Answer::Status(Box::new(self.status()))),
            Request::Stop => self.end(ExitReason::Stopped),
            Request::VsockListen(listen) => self.listen(listen),
            Request::Pause => self.machine()?.pause(),
            Request::Resume => self.machine()?.resume(),
            Request::DetachSegment(segment) => {
                self.machine()?.segments.detach(segment.offset).map_err(|error| chain(&error))?;
            }
            Request::AttachSegment(segment) => {
                let file = fds.pop().ok_or("no descriptor")?;
                let segments = &self.machine()?.segments;
                segments.attach(segment.offset, segment.len, file).map_err(|error| chain(&error))?;
            }
            Request::VsockConnect(connect) => {
                let stream = fds.pop().ok_or("no descriptor")?;
                if let Some(from) = connect.from.filter(|from| *from >= FIRST_EPHEMERAL) {
                    return Err(format!("the host's port {from} is not below {FIRST_EPHEMERAL}"));
                }
                self.machine()?.vsock.connect(connect.port, connect.from, stream);
            }
        }
        Ok(Answer::Done)
    }

    fn machine(&self) -> Result<&Machine, String> {
        self.machine.as_ref().ok_or_else(|| "the machine has not been booted".to_owned())
    }

    fn boot(&mut self, boot: &Boot, fds: Vec<OwnedFd>) -> Result<(), String> {
        if self.machine.is_some() {
            return Err("the machine has been booted already".into());
        }
        self.times.boot_request = Some(clock::now());
        let hypervisor = self.hypervisor.as_deref().map_err(|error| chain(error))?;
        let machine = Machine::boot(hypervisor, boot, fds, &self.reports).map_err(|error| chain(&error))?;
        // Nothing will be built any more.
        if let Err(error) = narrow(Role::Server) {
            machine.stop();
            return Err(format!("the VMM cannot be confined: {error}"));
        }
        for port in self.listening.keys() {
            machine.vsock.listen(*port);
        }
        tracing::info!(vcpus = machine.vcpus, memory_mib = machine.memory_mib, "the machine runs");
        self.times.kernel_mapped = Some(machine.kernel_mapped);
        self.times.vcpus_started = Some(machine.vcpus_started);
        self.machine = Some(machine);
        Ok(())
    }

    fn listen(&mut self, VsockListen { port, keep }: VsockListen) {
        self.listening.insert(port, keep);
        if !keep {
            self.kept.remove(&port);
        }
        if let Some(machine) = &self.machine {
            machine.vsock.listen(port);
        }
    }

    fn status(&self) -> Status {
        let state = match (&self.ended, &self.machine) {
            (Some(reason), _) => MachineState::Exited { reason: reason.clone() },
            (None, None) => MachineState::Created,
            (None, Some(machine)) if machine.is_paused() => MachineState::Paused,
            (None, Some(_)) => MachineState::Running,
        };
        let machine = self.machine.as_ref();
        let mut times = self.times;
        times.vsock_activated = machine.and_then(|machine| machine.vsock.activated());
        Status {
            state,
            vcpus: machine.map_or(0, |machine| machine.vcpus),
            memory_mib: machine.map_or(0, |machine| machine.memory_mib),
            exits: machine.map(Machine::exits).unwrap_or_default(),
            vsock: machine.map(|machine| machine.vsock.counts()).unwrap_or_default(),
            times,
        }
    }

    /// Tells the client why the machine ended, and waits a moment until it has read so.
    fn say_farewell(&mut self, reason: &ExitReason) -> io::Result<()> {
        self.say(&FromVmm::Event(Event::Exited { reason: reason.clone() }), None);
        let deadline = Instant::now() + FAREWELL;
        while let Some(client) = &mut self.client {
            let left = deadline.saturating_duration_since(Instant::now());
            if client.flush().is_err() || client.is_empty() || left.is_zero() {
                return Ok(());
            }
            self.wait(Some(left))?;
        }
        Ok(())
    }
}

/// Whether the other end of a stream is still there.
fn is_connected(stream: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut polled, Some(&at_once)), Ok(0))
}
