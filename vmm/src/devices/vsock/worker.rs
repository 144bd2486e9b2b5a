//! The vsock thread: waits for kicks, streams and commands, moves packets between the queues and the core, and bytes
//! between streams and guest memory. It never blocks on anything but the wait for all of them; nothing in it is polled.
//! Where the guest has several buffers free, one system call fills all of them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::net::Shutdown;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::super::buffers::{self, Buffers};
use super::super::worker::{Command, Inbox};
use super::super::{Activation, Broken};
use super::core::{Action, Core, Id, Outgoing, ReadResult, Room};
use super::packet::{HEADER_LEN, Header};
use super::streams::{Directions, Streams};
use super::{Accepted, GUEST_CID, Shown, VsockCommand};
use crate::clock;
use crate::limit::warn_limited;
use crate::memory::Memory;
use crate::sys::borrow_event;

const TOKEN_WAKE: u64 = 0;
/// The tokens of the queues to and from the guest follow. Ids of connections begin at 16.
const TOKEN_QUEUE: u64 = 1;
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
/// Packets of one direction before the other gets its turn.
const BATCH: usize = 256;
/// Buffers of the guest that one read may fill.
const MOST_SLOTS: u32 = 64;

/// Runs the device until it is stopped.
pub(super) fn run(
    inbox: &Inbox<VsockCommand>,
    on_accept: impl FnMut(Accepted),
    shown: &Shown,
) -> io::Result<()> {
    let streams = Streams::new()?;
    let data = epoll::EventData::new_u64(TOKEN_WAKE);
    epoll::add(streams.epoll(), borrow_event(inbox.wake()), data, epoll::EventFlags::IN)?;
    let mut worker = Worker { inbox, on_accept, shown, streams, core: Core::new(GUEST_CID), active: None };
    let mut events = Vec::with_capacity(128);
    let mut more = false;
    loop {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        events.clear();
        match epoll::wait(worker.streams.epoll(), spare_capacity(&mut events), more.then_some(&at_once)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        shown.rounds.fetch_add(1, Ordering::Relaxed);
        for event in &events {
            if worker.on_event(event.data.u64(), event.flags).is_break() {
                return Ok(());
            }
        }
        more = worker.move_packets();
        *shown.counts.lock().unwrap_or_else(PoisonError::into_inner) = worker.core.counts();
    }
}

/// Serves what is in the rings, without a thread; true if that broke the device. The host listens, connects and has something to say.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn serve_once(activation: Activation) -> bool {
    let (_commands, inbox) = super::super::worker::commands().expect("an event");
    let shown = Shown::default();
    let streams = Streams::new().expect("an epoll");
    let on_accept = drop::<Accepted>;
    let mut worker =
        Worker { inbox: &inbox, on_accept, shown: &shown, streams, core: Core::new(GUEST_CID), active: None };
    (0..4).for_each(|port| worker.core.listen(port));
    let (kept, given) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    std::io::Write::write_all(&mut &kept, b"early words").expect("a socket takes a few bytes");
    worker.obey(VsockCommand::Connect { port: 5, from: None, stream: given.into() });
    let signals = std::sync::Arc::clone(&activation.signals);
    worker.activate(activation);
    while worker.move_packets() {}
    worker.core.host_readable(Id(16));
    while worker.move_packets() {}
    worker.deactivate();
    signals.status.load(Ordering::SeqCst) != 0
}

struct Worker<'a, F> {
    inbox: &'a Inbox<VsockCommand>,
    on_accept: F,
    shown: &'a Shown,
    streams: Streams,
    core: Core,
    active: Option<Activation>,
}

impl<F: FnMut(Accepted)> Worker<'_, F> {
    fn on_event(&mut self, token: u64, flags: epoll::EventFlags) -> std::ops::ControlFlow<()> {
        match token {
            TOKEN_WAKE => {
                // Nothing to take is fine: the descriptor does not block.
                let _ = self.inbox.wake().read();
                while let Some(command) = self.inbox.next() {
                    match command {
                        Command::Activate(activation) => self.activate(activation),
                        Command::Reset(done) => {
                            self.deactivate();
                            // The transport waits, unless its thread has ended.
                            let _ = done.send(());
                        }
                        Command::Stop => return std::ops::ControlFlow::Break(()),
                        Command::Other(command) => self.obey(command),
                    }
                }
            }
            token if token < 16 => self.take_kick(token - TOKEN_QUEUE),
            token => self.on_stream(Id(token), flags),
        }
        std::ops::ControlFlow::Continue(())
    }

    fn obey(&mut self, command: VsockCommand) {
        match command {
            VsockCommand::Listen { port, done } => {
                self.core.listen(port);
                // The client waits, unless its thread has ended.
                let _ = done.send(());
            }
            VsockCommand::Connect { port, from, stream } => {
                let Some(id) = self.core.connect(port, from) else {
                    return warn_limited!(port, ?from, "too many vsock connections, or the port is taken");
                };
                match self.streams.add(id, stream) {
                    Ok(Directions { gives, takes }) => self.core.one_way(id, gives, takes),
                    Err(error) => {
                        tracing::warn!(port, %error, "a descriptor cannot be used as a stream");
                        self.core.refuse(id);
                    }
                }
            }
        }
    }

    fn activate(&mut self, activation: Activation) {
        for (index, queue) in activation.queues.iter().enumerate().take(2) {
            let data = epoll::EventData::new_u64(TOKEN_QUEUE + index as u64);
            let added =
                epoll::add(self.streams.epoll(), borrow_event(&queue.kick), data, epoll::EventFlags::IN);
            if let Err(error) = added {
                tracing::error!(%error, "cannot wait for the guest's kicks");
                activation.signals.broken();
                return;
            }
        }
        // Only the first activation is shown.
        let _ = self.shown.activated.compare_exchange(0, clock::now(), Ordering::Relaxed, Ordering::Relaxed);
        self.active = Some(activation);
    }

    fn deactivate(&mut self) {
        if let Some(activation) = self.active.take() {
            for queue in activation.queues.iter().take(2) {
                // They were added at activation.
                let _ = epoll::delete(self.streams.epoll(), borrow_event(&queue.kick));
            }
        }
        self.core.device_reset();
        self.act();
    }

    fn take_kick(&self, index: u64) {
        let queues = self.active.as_ref().map_or(&[][..], |activation| &activation.queues);
        if let Some(queue) = usize::try_from(index).ok().and_then(|index| queues.get(index)) {
            let _ = queue.kick.read();
        }
    }

    fn on_stream(&mut self, id: Id, flags: epoll::EventFlags) {
        use epoll::EventFlags;
        if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            match self.streams.flush(id) {
                Ok(0) => {}
                Ok(len) => self.core.delivered(id, len),
                Err(_) => self.stream_gone(id),
            }
        }
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.stream_gone(id);
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.core.host_readable(id);
        }
    }

    fn stream_gone(&mut self, id: Id) {
        self.streams.forget_backlog(id);
        self.core.host_gone(id);
    }

    /// Moves packets both ways; true if there is more to do at once.
    fn move_packets(&mut self) -> bool {
        self.act();
        let Some(mut activation) = self.active.take() else { return false };
        let result = self.exchange(&mut activation);
        match result {
            Ok(more) => {
                self.active = Some(activation);
                self.act();
                more
            }
            Err(error) => {
                warn_limited!(%error, "the guest broke the vsock device");
                activation.signals.broken();
                self.active = Some(activation);
                self.deactivate();
                false
            }
        }
    }

    fn exchange(&mut self, activation: &mut Activation) -> Result<bool, Broken> {
        let Activation { memory, queues, signals, .. } = activation;
        let from_guest = &mut queues.get_mut(FROM_GUEST).ok_or(Broken::Ring)?.queue;
        let before = from_guest.next_used();
        let more_from = self.receive_from_guest(memory, from_guest)?;
        let mut interrupt = from_guest.next_used() != before && from_guest.needs_notification(memory)?;
        self.act();
        let to_guest = &mut queues.get_mut(TO_GUEST).ok_or(Broken::Ring)?.queue;
        let before = to_guest.next_used();
        let more_to = self.send_to_guest(memory, to_guest)?;
        interrupt |= to_guest.next_used() != before && to_guest.needs_notification(memory)?;
        if interrupt {
            signals.queue();
        }
        Ok(more_from || more_to)
    }

    /// Takes what the guest sent; true if there is more.
    fn receive_from_guest(&mut self, memory: &Memory, queue: &mut Queue) -> Result<bool, Broken> {
        let mut budget = BATCH;
        loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.iter(memory)?.next() {
                let head = chain.head_index();
                let (packet, _) = buffers::collect(memory, chain)?;
                self.packet_from_guest(packet)?;
                queue.add_used(memory, head, 0)?;
                budget -= 1;
                if budget == 0 {
                    return Ok(true);
                }
            }
            if !queue.enable_notification(memory)? {
                return Ok(false);
            }
        }
    }

    fn packet_from_guest(&mut self, mut packet: Buffers<'_>) -> Result<(), Broken> {
        let mut bytes = [0; HEADER_LEN];
        packet.split_front(HEADER_LEN).and_then(|front| front.copy_to(&mut bytes)).ok_or(Broken::Chain)?;
        let header = Header::decode(&bytes);
        let payload = usize::try_from(header.len).ok().and_then(|len| packet.split_front(len));
        let Some(payload) = payload else {
            warn_limited!("a vsock packet is shorter than its header says");
            self.core.malformed_packet(&header);
            return Ok(());
        };
        if let Some(id) = self.core.guest_packet(&header) {
            match self.streams.write(id, payload) {
                Ok(0) => {}
                Ok(len) => self.core.delivered(id, len),
                Err(_) => self.stream_gone(id),
            }
        }
        Ok(())
    }

    /// Fills the guest's buffers as long as there are any and there is something to send; true if there is more.
    fn send_to_guest(&mut self, memory: &Memory, queue: &mut Queue) -> Result<bool, Broken> {
        let mut slots = Slots { memory, queue, taken: VecDeque::new() };
        let mut budget = BATCH;
        let more = loop {
            if !self.core.has_packets() {
                break false;
            }
            // The guest kicks when it gives new buffers; until then nothing here is ready.
            if !slots.have_one(true)? {
                break false;
            }
            let sent = match self.core.next_packet() {
                None => continue,
                Some(Outgoing::Control(header)) => slots.fill(&header).map(|()| 1)?,
                Some(Outgoing::Data(id, room)) => match self.send_data(id, room, &mut slots)? {
                    Some(sent) => sent,
                    None => break false,
                },
            };
            if sent >= budget {
                break true;
            }
            budget -= sent;
        };
        slots.give_back();
        Ok(more)
    }

    /// Reads from a stream into as many of the guest's buffers as the room allows, by one system call. Returns the number of
    /// packets that became of it; `None` if the guest's next buffer has no place for data.
    fn send_data(&mut self, id: Id, room: Room, slots: &mut Slots<'_, '_>) -> Result<Option<usize>, Broken> {
        let Some(target) = slots.gather(room)? else {
            // There may be larger ones behind it, when the guest gives them.
            self.core.read_deferred(id);
            return Ok(None);
        };
        let result = self.streams.read(id, &target);
        let ReadResult::Bytes(mut left) = result else {
            self.core.read_done(id, result);
            if result == ReadResult::Failed {
                self.streams.forget_backlog(id);
            }
            return Ok(Some(0));
        };
        let mut sent = 0;
        while left > 0 {
            let len = slots.room_of_next().min(left);
            let Some(header) = self.core.read_done(id, ReadResult::Bytes(len)) else { break };
            slots.fill(&header)?;
            left -= len;
            sent += 1;
        }
        Ok(Some(sent))
    }

    /// Does to the streams what the core asks for.
    fn act(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::ShutdownWrite(id) => self.streams.shut(id, Shutdown::Write),
                Action::ShutdownRead(id) => self.streams.shut(id, Shutdown::Read),
                Action::Close(id) => self.streams.close(id),
                Action::Abort(id) => self.streams.abort(id),
                Action::Accept(id, ports) => match self.streams.make(id) {
                    Ok(stream) => {
                        self.core.accepted(id);
                        self.announce(ports.host, ports.guest, stream);
                    }
                    Err(error) => {
                        warn_limited!(port = ports.host, %error, "cannot make a stream for the guest's connection");
                        self.core.refuse(id);
                    }
                },
            }
        }
    }

    fn announce(&mut self, port: u32, guest_port: u32, stream: OwnedFd) {
        tracing::debug!(port, guest_port, fd = ?stream.as_fd(), "the guest connected");
        (self.on_accept)(Accepted { port, guest_port, stream });
    }
}

/// A buffer that the guest gave for one packet.
struct Slot<'m> {
    head: u16,
    header: Buffers<'m>,
    payload: Buffers<'m>,
}

/// The guest's buffers, in order. Those that were taken and not filled go back.
struct Slots<'m, 'q> {
    memory: &'m Memory,
    queue: &'q mut Queue,
    taken: VecDeque<Slot<'m>>,
}

impl<'m> Slots<'m, '_> {
    /// Takes one more buffer; false if there is none. If `arm`, the guest will then kick when it gives one.
    fn take(&mut self, arm: bool) -> Result<bool, Broken> {
        loop {
            if let Some(chain) = self.queue.iter(self.memory)?.next() {
                let head = chain.head_index();
                let (_, mut payload) = buffers::collect(self.memory, chain)?;
                let header = payload.split_front(HEADER_LEN).ok_or(Broken::Chain)?;
                self.taken.push_back(Slot { head, header, payload });
                return Ok(true);
            }
            if !arm || !self.queue.enable_notification(self.memory)? {
                return Ok(false);
            }
        }
    }

    fn have_one(&mut self, arm: bool) -> Result<bool, Broken> {
        Ok(!self.taken.is_empty() || self.take(arm)?)
    }

    /// How many bytes the next buffer takes.
    fn room_of_next(&self) -> u32 {
        let room = self.taken.front().map_or(0, |slot| slot.payload.len());
        u32::try_from(room).unwrap_or(u32::MAX)
    }

    /// The places for data of the next buffers, as far as the room reaches; `None` if the first of them has none.
    fn gather(&mut self, room: Room) -> Result<Option<Buffers<'m>>, Broken> {
        let most = usize::try_from(room.bytes).unwrap_or(usize::MAX);
        let mut target = Buffers::default();
        for index in 0..room.packets.min(MOST_SLOTS) as usize {
            if target.len() >= most || index == self.taken.len() && !self.take(false)? {
                break;
            }
            let Some(slot) = self.taken.get(index) else { break };
            if slot.payload.len() == 0 || !target.append(&slot.payload) {
                break;
            }
        }
        let len = target.len().min(most);
        Ok(target.split_front(len).filter(|target| target.len() > 0))
    }

    /// Completes the next buffer; its data, if there is any, is in it already.
    fn fill(&mut self, header: &Header) -> Result<(), Broken> {
        let slot = self.taken.pop_front().ok_or(Broken::Ring)?;
        slot.header.copy_from(&header.encode()).ok_or(Broken::Chain)?;
        // One packet is far smaller than 4 GiB.
        let len = HEADER_LEN as u32 + header.len;
        Ok(self.queue.add_used(self.memory, slot.head, len)?)
    }

    /// Makes what was taken and not filled available again.
    fn give_back(self) {
        for _ in &self.taken {
            self.queue.go_to_previous_position();
        }
    }
}
