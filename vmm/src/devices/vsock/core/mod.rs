//! The vsock protocol as a state machine without I/O (virtio 1.2, section 5.10). Whoever drives it tells it which packets the
//! guest sent and what became of reads and writes on the host's streams; it answers with packets for the guest and
//! [`Action`]s on the streams. It trusts nothing in a packet: memory, connections and pending resets are bounded, credit
//! is computed by saturating arithmetic, and a connection that breaks the protocol is reset without harm to the others.
//!
//! - A connection begins with REQUEST and RESPONSE; anything unexpected is answered with RST.
//! - Each side tells in every packet how much it can buffer (`buf_alloc`) and how much it has passed on (`fwd_cnt`); the
//!   other never has more under way than that. Linux counts its own overhead per packet too and resets a stream when
//!   that becomes too much, so packets are metered as well as bytes.
//! - The directions end one by one: the host's end of file is a SHUTDOWN(SEND), the guest's SHUTDOWN(SEND) ends the
//!   host's stream for writing after everything was written. Both together end the connection, acknowledged by RST.
//! - Connections with something to send take turns; a turn is a control packet or a bounded run of data packets.
//! - The more connections there are, the less is buffered for each, so that all buffers together stay bounded.

mod connection;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod story;

use std::collections::{HashMap, HashSet, VecDeque};

use self::connection::{Connection, Next, State};
use super::packet::{HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM};
use crate::control::VsockCounts;

/// What is buffered for a slow stream of the host's, and advertised to the guest, as long as there are few connections.
const BUFFER: u32 = 256 * 1024;
/// The most connections at a time.
pub(crate) const MAX_CONNECTIONS: usize = 4096;
/// The most resets that wait for room in the guest's queue; more are forgotten.
const MAX_RESETS: usize = 1024;
/// Host ports for connections that the host makes, unless it says which.
pub(crate) const FIRST_EPHEMERAL: u32 = 1 << 30;

/// Names a connection for as long as its stream exists, which may be longer than its ports are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Id(pub(crate) u64);

/// What names a connection in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Ports {
    pub(crate) host: u32,
    pub(crate) guest: u32,
}

/// What the driver must do with a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make a stream, then call [`Core::accepted`] or [`Core::refuse`].
    Accept(Id, Ports),
    /// Nothing more will be written to the stream.
    ShutdownWrite(Id),
    /// Nothing more will be read from the stream.
    ShutdownRead(Id),
    /// Close the stream and forget what is buffered for it.
    Close(Id),
    /// The same, and the stream's other end shall see that this was no orderly end.
    Abort(Id),
}

/// How much may be sent to the guest in one turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// At most this many bytes,
    pub(crate) bytes: u32,
    /// in at most this many packets.
    pub(crate) packets: u32,
}

/// A packet for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outgoing {
    /// Send this.
    Control(Header),
    /// Read up to this much from the stream and say by [`Core::read_done`] what came of it, once for each packet.
    Data(Id, Room),
}

/// What came of reading from a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadResult {
    /// This many bytes, at least one.
    Bytes(u32),
    WouldBlock,
    EndOfFile,
    Failed,
}

/// All connections of one machine.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Core {
    guest_cid: u64,
    connections: HashMap<Id, Connection>,
    by_ports: HashMap<Ports, Id>,
    listeners: HashSet<u32>,
    /// Connections that have something to send, each once.
    turns: VecDeque<Id>,
    resets: VecDeque<Ports>,
    actions: VecDeque<Action>,
    next_id: u64,
    next_port: u32,
    counts: VsockCounts,
}

impl Core {
    pub(crate) fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            listeners: HashSet::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            actions: VecDeque::new(),
            next_id: 16,
            next_port: FIRST_EPHEMERAL,
            counts: VsockCounts::default(),
        }
    }

    pub(crate) fn counts(&self) -> VsockCounts {
        VsockCounts { open: self.connections.len() as u64, ..self.counts }
    }

    /// What must be done to streams now; call until there is nothing.
    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The guest may connect to this port of the host.
    pub(crate) fn listen(&mut self, port: u32) {
        self.listeners.insert(port);
    }

    /// Connects to a port of the guest, as soon as its driver is there; from a certain port of the host, or from any that is
    /// free. `None` if there are too many connections, or if that port cannot be had.
    pub(crate) fn connect(&mut self, guest_port: u32, from: Option<u32>) -> Option<Id> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return None;
        }
        let ports = match from {
            Some(host) if host < FIRST_EPHEMERAL => Ports { host, guest: guest_port },
            Some(_) => return None,
            None => self.next_free(guest_port),
        };
        if !self.is_free(ports) {
            return None;
        }
        let id = self.insert(Connection::connecting(ports, self.buffer_for_one_more()));
        self.counts.connected += 1;
        self.take_turn(id);
        Some(id)
    }

    /// The stream for [`Action::Accept`] exists.
    pub(crate) fn accepted(&mut self, id: Id) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.accepted();
            self.counts.accepted += 1;
            self.take_turn(id);
        }
    }

    /// There will be no stream for [`Action::Accept`].
    pub(crate) fn refuse(&mut self, id: Id) {
        self.reset(id);
    }

    /// The stream is one that gives nothing, or that takes nothing: the end of a pipe has one direction only.
    pub(crate) fn one_way(&mut self, id: Id, gives: bool, takes: bool) {
        if !gives {
            self.read_done(id, ReadResult::EndOfFile);
        }
        if !takes {
            self.host_gone(id);
        }
    }

    /// The stream can be read (or has ended, which reading will tell).
    pub(crate) fn host_readable(&mut self, id: Id) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.readable = true;
            self.take_turn(id);
        }
    }

    /// The stream's other end is gone: nothing written will arrive any more.
    pub(crate) fn host_gone(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.host_refuses();
        self.after_delivery(id);
    }

    /// Bytes that the guest sent have been written to the stream.
    pub(crate) fn delivered(&mut self, id: Id, len: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.delivered(len);
        self.counts.bytes_to_host += u64::from(len);
        self.after_delivery(id);
    }

    /// A packet from the guest. `Some` means: its payload belongs to this stream. Write it or buffer it, and report what
    /// was written to [`Core::delivered`] or a failure to [`Core::host_gone`].
    pub(crate) fn guest_packet(&mut self, header: &Header) -> Option<Id> {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return None;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let operation = Operation::from_number(header.operation).filter(|_| header.kind == TYPE_STREAM);
        let Some(operation) = operation else {
            self.reset_ports(ports);
            return None;
        };
        match self.by_ports.get(&ports).copied() {
            Some(id) => self.packet_for(id, operation, header),
            None => {
                self.packet_for_nobody(ports, operation, header);
                None
            }
        }
    }

    /// A packet could not be taken apart; its connection, if there is one, cannot be trusted any more.
    pub(crate) fn malformed_packet(&mut self, header: &Header) {
        if header.src_cid == self.guest_cid && header.dst_cid == HOST_CID {
            self.reset_ports(Ports { host: header.dst_port, guest: header.src_port });
        }
    }

    /// Whether [`Core::next_packet`] may have something.
    pub(crate) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// The next packet for the guest.
    pub(crate) fn next_packet(&mut self) -> Option<Outgoing> {
        if let Some(ports) = self.resets.pop_front() {
            return Some(Outgoing::Control(self.reset_header(ports)));
        }
        while let Some(id) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.has_turn = false;
            match connection.next() {
                Next::Nothing => {}
                Next::Control(operation, flags) => {
                    let header = connection.header(self.guest_cid, operation, flags, 0);
                    self.take_turn(id);
                    return Some(Outgoing::Control(header));
                }
                // It takes its next turn when the read is done.
                Next::Data(room) => return Some(Outgoing::Data(id, room)),
            }
        }
        None
    }

    /// What became of the read that [`Outgoing::Data`] asked for; a header if a packet is to be sent.
    pub(crate) fn read_done(&mut self, id: Id, result: ReadResult) -> Option<Header> {
        let connection = self.connections.get_mut(&id)?;
        let mut header = None;
        match result {
            ReadResult::Bytes(len) => {
                connection.sent(len);
                header = Some(connection.header(self.guest_cid, Operation::Data, 0, len));
                self.counts.bytes_to_guest += u64::from(len);
            }
            ReadResult::WouldBlock => connection.readable = false,
            ReadResult::EndOfFile => connection.host_ended(),
            ReadResult::Failed => {
                connection.host_ended();
                connection.host_refuses();
            }
        }
        self.after_delivery(id);
        header
    }

    /// The packet that was asked for cannot be sent now: the connection keeps its turn.
    pub(crate) fn read_deferred(&mut self, id: Id) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.has_turn
        {
            connection.has_turn = true;
            self.turns.push_front(id);
        }
    }

    /// The guest's driver is gone. Only connections that it has never heard of survive.
    pub(crate) fn device_reset(&mut self) {
        self.resets.clear();
        let gone: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| !connection.is_unannounced())
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.unlink(id);
            self.drain(id);
        }
    }

    /// All together at most 160 MiB, which takes a guest with thousands of connections and a host that reads none of them.
    fn buffer_for_one_more(&self) -> u32 {
        match self.connections.len() {
            0..256 => BUFFER,
            256..1024 => BUFFER / 4,
            _ => BUFFER / 16,
        }
    }

    fn next_free(&mut self, guest_port: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_port, guest: guest_port };
            self.next_port =
                self.next_port.checked_add(1).filter(|port| *port < u32::MAX).unwrap_or(FIRST_EPHEMERAL);
            if self.is_free(ports) {
                return ports;
            }
        }
    }

    fn is_free(&self, ports: Ports) -> bool {
        !self.by_ports.contains_key(&ports) && !self.listeners.contains(&ports.host)
    }

    fn insert(&mut self, connection: Connection) -> Id {
        let id = Id(self.next_id);
        self.next_id += 1;
        self.by_ports.insert(connection.ports, id);
        self.connections.insert(id, connection);
        id
    }

    fn take_turn(&mut self, id: Id) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.has_turn
            && connection.wants_turn()
        {
            connection.has_turn = true;
            self.turns.push_back(id);
        }
    }

    fn packet_for_nobody(&mut self, ports: Ports, operation: Operation, header: &Header) {
        match operation {
            Operation::Reset => {}
            Operation::Request
                if self.listeners.contains(&ports.host) && self.connections.len() < MAX_CONNECTIONS =>
            {
                let id = self.insert(Connection::accepting(ports, header, self.buffer_for_one_more()));
                self.actions.push_back(Action::Accept(id, ports));
            }
            _ => self.push_reset(ports),
        }
    }

    fn packet_for(&mut self, id: Id, operation: Operation, header: &Header) -> Option<Id> {
        let connection = self.connections.get_mut(&id)?;
        if operation == Operation::Reset {
            self.counts.reset += 1;
            connection.abortive = true;
            self.unlink(id);
            self.drain(id);
            return None;
        }
        let fits = connection.update_credit(header) && connection.allows(operation, header.len);
        if !fits {
            self.reset(id);
            return None;
        }
        let mut payload = None;
        match operation {
            Operation::Response => connection.open(),
            Operation::Data if header.len > 0 => {
                connection.received(header.len);
                payload = Some(id);
                if connection.discards() {
                    connection.delivered(header.len);
                    payload = None;
                }
            }
            Operation::CreditRequest => connection.owes_credit = true,
            Operation::Shutdown => self.guest_shutdown(id, header.flags),
            _ => {}
        }
        self.take_turn(id);
        payload
    }

    fn guest_shutdown(&mut self, id: Id, flags: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let before = connection.guest_shutdown;
        connection.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if connection.guest_shutdown == SHUTDOWN_BOTH {
            // An orderly end comes one direction after the other: whoever lets go of both while both were open has given up.
            connection.abortive = before & SHUTDOWN_SEND == 0 && !connection.has_host_ended();
            let ports = connection.ports;
            self.push_reset(ports);
            self.unlink(id);
            self.drain(id);
        } else {
            if connection.stops_reading(before) {
                self.actions.push_back(Action::ShutdownRead(id));
            }
            self.after_delivery(id);
        }
    }

    /// Does what waited for the last buffered byte to be written.
    fn after_delivery(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.ends_writing() {
            self.actions.push_back(Action::ShutdownWrite(id));
        }
        if connection.state == State::Draining && connection.buffered() == 0 {
            let abortive = connection.abortive;
            self.connections.remove(&id);
            self.actions.push_back(if abortive { Action::Abort(id) } else { Action::Close(id) });
        } else {
            self.take_turn(id);
        }
    }

    /// The ports are free again.
    fn unlink(&mut self, id: Id) {
        if let Some(connection) = self.connections.get(&id)
            && self.by_ports.get(&connection.ports) == Some(&id)
        {
            self.by_ports.remove(&connection.ports);
        }
    }

    /// Writes what is buffered, then closes.
    fn drain(&mut self, id: Id) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.state = State::Draining;
            self.after_delivery(id);
        }
    }

    fn reset_ports(&mut self, ports: Ports) {
        match self.by_ports.get(&ports).copied() {
            Some(id) => self.reset(id),
            None => self.push_reset(ports),
        }
    }

    fn reset(&mut self, id: Id) {
        let Some(connection) = self.connections.get(&id) else { return };
        let (ports, unannounced) = (connection.ports, connection.is_unannounced());
        self.counts.reset += 1;
        if !unannounced {
            self.push_reset(ports);
        }
        self.unlink(id);
        self.drain(id);
    }

    fn push_reset(&mut self, ports: Ports) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(ports);
        }
    }

    fn reset_header(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            kind: TYPE_STREAM,
            operation: Operation::Reset as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests;
