//! One connection: credit both ways, shutdown both ways, and what it wants to send next.

use std::collections::VecDeque;

use super::super::packet::{
    HOST_CID, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::{Ports, Room};

/// What a packet costs its receiver beyond its bytes: Linux refuses more packets than its buffer holds of these. It counts
/// about 600 bytes on 64-bit machines.
const PACKET_OVERHEAD: u32 = 1024;
/// The most in one turn; it is also bounded by the guest's buffers.
const MAX_PAYLOAD: u32 = 64 * 1024;
/// Less credit than this is not worth a packet while others are under way.
const MIN_PAYLOAD: u32 = 2048;
/// No more than this is under way, whatever the guest says it can buffer: what is remembered of it is bounded.
const MAX_WINDOW: u32 = 4 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The host wants to connect; REQUEST is to be sent, or has been.
    Connecting {
        sent: bool,
    },
    /// The guest wants to connect; the driver makes a stream.
    Accepting,
    /// RESPONSE is to be sent.
    Responding,
    Open,
    /// Over for the guest; what it sent is still being written to the stream.
    Draining,
}

/// What a connection does with its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Nothing,
    Control(Operation, u32),
    Data(Room),
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Connection {
    pub(super) ports: Ports,
    /// What is buffered for the stream at most, and advertised to the guest.
    buffer: u32,
    pub(super) state: State,
    /// It stands in the queue of turns.
    pub(super) has_turn: bool,
    /// Reading from the stream may give something.
    pub(super) readable: bool,
    /// The guest asked for a credit update, or is due one.
    pub(super) owes_credit: bool,
    /// The flags of all SHUTDOWNs that the guest sent.
    pub(super) guest_shutdown: u32,
    /// The flags that the guest should be told of, and those it was told of.
    host_shutdown: u32,
    told_shutdown: u32,
    /// The stream was closed for writing, or takes nothing any more.
    write_ended: bool,
    host_refuses: bool,
    /// The guest has ended it out of order.
    pub(super) abortive: bool,
    /// Bytes received from the guest, written to the stream, and reported as such; all wrap around.
    received: u32,
    forwarded: u32,
    reported: u32,
    /// Bytes sent to the guest and consumed by it; both wrap around.
    sent: u32,
    consumed: u32,
    guest_buffer: u32,
    /// The value of `sent` after each packet that is not consumed yet.
    in_flight: VecDeque<u32>,
    /// The guest was asked for its credit since it last consumed something.
    asked_credit: bool,
}

impl Connection {
    fn new(ports: Ports, state: State, buffer: u32) -> Self {
        Self {
            ports,
            buffer,
            state,
            has_turn: false,
            readable: false,
            owes_credit: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            write_ended: false,
            host_refuses: false,
            abortive: false,
            received: 0,
            forwarded: 0,
            reported: 0,
            sent: 0,
            consumed: 0,
            guest_buffer: 0,
            in_flight: VecDeque::new(),
            asked_credit: false,
        }
    }

    pub(super) fn connecting(ports: Ports, buffer: u32) -> Self {
        Self::new(ports, State::Connecting { sent: false }, buffer)
    }

    pub(super) fn accepting(ports: Ports, request: &Header, buffer: u32) -> Self {
        let mut connection = Self::new(ports, State::Accepting, buffer);
        connection.guest_buffer = request.buf_alloc;
        connection
    }

    pub(super) fn accepted(&mut self) {
        if self.state == State::Accepting {
            self.state = State::Responding;
        }
    }

    pub(super) fn open(&mut self) {
        self.state = State::Open;
    }

    /// The guest has heard nothing of it.
    pub(super) fn is_unannounced(&self) -> bool {
        self.state == State::Connecting { sent: false }
    }

    /// Takes the guest's view of the credit from a packet. False if it claims to have consumed what was never sent.
    pub(super) fn update_credit(&mut self, header: &Header) -> bool {
        let newly = header.fwd_cnt.wrapping_sub(self.consumed);
        if newly > self.under_way() {
            return false;
        }
        self.guest_buffer = header.buf_alloc;
        if newly > 0 {
            self.consumed = header.fwd_cnt;
            self.asked_credit = false;
            let under_way = self.under_way();
            while self.in_flight.front().is_some_and(|end| self.sent.wrapping_sub(*end) >= under_way) {
                self.in_flight.pop_front();
            }
        }
        true
    }

    /// Whether a packet is allowed in this state and within the credit that the guest was given.
    pub(super) fn allows(&self, operation: Operation, len: u32) -> bool {
        match operation {
            Operation::Request => false,
            Operation::Response => self.state == State::Connecting { sent: true },
            Operation::Reset => true,
            Operation::Shutdown | Operation::CreditUpdate | Operation::CreditRequest => {
                !self.is_unannounced()
            }
            Operation::Data => {
                self.state == State::Open
                    && self.guest_shutdown & SHUTDOWN_SEND == 0
                    && len <= self.buffer.saturating_sub(self.buffered())
            }
        }
    }

    /// Bytes that the guest sent and that are not written yet.
    pub(super) fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    pub(super) fn received(&mut self, len: u32) {
        self.received = self.received.wrapping_add(len);
    }

    pub(super) fn delivered(&mut self, len: u32) {
        // More than is buffered cannot have been written.
        self.forwarded = self.forwarded.wrapping_add(len.min(self.buffered()));
        if self.forwarded.wrapping_sub(self.reported) >= self.buffer / 4 {
            self.owes_credit = true;
        }
    }

    /// The stream takes nothing more: what is buffered for it is lost, and what the guest sends will be.
    pub(super) fn host_refuses(&mut self) {
        self.delivered(self.buffered());
        if !self.write_ended {
            self.write_ended = true;
            self.host_refuses = true;
            self.host_shutdown |= SHUTDOWN_RECEIVE;
        }
    }

    /// Payload is thrown away.
    pub(super) fn discards(&self) -> bool {
        self.host_refuses
    }

    /// The stream has ended: nothing more comes from it.
    pub(super) fn host_ended(&mut self) {
        self.readable = false;
        self.host_shutdown |= SHUTDOWN_SEND;
    }

    pub(super) fn has_host_ended(&self) -> bool {
        self.host_shutdown & SHUTDOWN_SEND != 0
    }

    /// True once: when the guest has ended its direction and everything was written.
    pub(super) fn ends_writing(&mut self) -> bool {
        let ends = self.guest_shutdown & SHUTDOWN_SEND != 0
            && self.buffered() == 0
            && !self.write_ended
            && self.state != State::Draining;
        self.write_ended |= ends;
        ends
    }

    /// True if this SHUTDOWN says for the first time that the guest receives no more.
    pub(super) fn stops_reading(&self, before: u32) -> bool {
        self.guest_shutdown & !before & SHUTDOWN_RECEIVE != 0
    }

    pub(super) fn wants_turn(&self) -> bool {
        match self.state {
            State::Connecting { sent } => !sent,
            State::Responding => true,
            State::Open => {
                self.untold_shutdown() != 0 || self.owes_credit || self.room().bytes > 0 || self.should_ask()
            }
            State::Accepting | State::Draining => false,
        }
    }

    /// Decides what to send now, and counts control packets as sent.
    pub(super) fn next(&mut self) -> Next {
        match self.state {
            State::Connecting { sent: false } => {
                self.state = State::Connecting { sent: true };
                return Next::Control(Operation::Request, 0);
            }
            State::Responding => {
                self.state = State::Open;
                return Next::Control(Operation::Response, 0);
            }
            State::Open => {}
            State::Connecting { .. } | State::Accepting | State::Draining => return Next::Nothing,
        }
        if self.untold_shutdown() != 0 {
            self.told_shutdown = self.host_shutdown;
            return Next::Control(Operation::Shutdown, self.told_shutdown);
        }
        if std::mem::take(&mut self.owes_credit) {
            return Next::Control(Operation::CreditUpdate, 0);
        }
        if self.should_ask() {
            self.asked_credit = true;
            return Next::Control(Operation::CreditRequest, 0);
        }
        match self.room() {
            Room { bytes: 0, .. } => Next::Nothing,
            room => Next::Data(room),
        }
    }

    fn untold_shutdown(&self) -> u32 {
        self.host_shutdown & !self.told_shutdown
    }

    /// Bytes that were sent to the guest and that it has not consumed.
    fn under_way(&self) -> u32 {
        self.sent.wrapping_sub(self.consumed)
    }

    fn reads(&self) -> bool {
        self.readable
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// How much may be read from the stream and sent now.
    fn room(&self) -> Room {
        if !self.reads() {
            return Room::default();
        }
        let window = self.guest_buffer.min(MAX_WINDOW);
        let bytes = window.saturating_sub(self.under_way()).min(MAX_PAYLOAD);
        let in_flight = u32::try_from(self.in_flight.len()).unwrap_or(u32::MAX);
        // One packet may always be under way, however small the guest's buffer is.
        let packets = (window / PACKET_OVERHEAD).max(1).saturating_sub(in_flight);
        if in_flight > 0 && bytes < MIN_PAYLOAD || bytes == 0 || packets == 0 {
            return Room::default();
        }
        Room { bytes, packets }
    }

    /// Data waits for credit and the guest may not know it: it may have consumed packets without saying so.
    fn should_ask(&self) -> bool {
        self.reads() && self.room().bytes == 0 && !self.asked_credit && !self.in_flight.is_empty()
    }

    pub(super) fn sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
        self.in_flight.push_back(self.sent);
    }

    /// A header with our side of the credit.
    pub(super) fn header(&mut self, guest_cid: u64, operation: Operation, flags: u32, len: u32) -> Header {
        self.reported = self.forwarded;
        self.owes_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            operation: operation as u16,
            flags: flags & SHUTDOWN_BOTH,
            buf_alloc: self.buffer,
            fwd_cnt: self.forwarded,
        }
    }
}
