//! A guest's vsock driver, as the tests need it: it lays its buffers out in every way that virtio allows.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(super) use super::super::super::tests::ring::Layout;
use super::super::super::tests::ring::{BUFFERS, Ring, WRITABLE};
use super::super::super::{ActiveQueue, COMMON_FEATURES, Signals};
use super::super::packet::{HEADER_LEN, HOST_CID, Header, Operation, SHUTDOWN_SEND, TYPE_STREAM};
use super::super::*;
use crate::memory::{self, Memory};
use crate::sys::borrow_event;

pub(super) const GUEST_BUFFER: u32 = 256 * 1024;
const PATIENCE: Duration = Duration::from_secs(30);
const RECEIVE_AT: u64 = 0x10_0000;
const RECEIVE_SIZE: u32 = 4096;
const SEND_AT: u64 = 0x20_0000;
const SEND_SIZE: u32 = 70_000;

/// One connection as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Connection {
    pub(super) guest: u32,
    pub(super) host: u32,
}

pub(super) struct Guest {
    device: Vsock,
    pub(super) handle: VsockHandle,
    accepted: Receiver<Accepted>,
    pub(super) memory: Memory,
    receive: Ring,
    send: Ring,
    free_to_send: Vec<u16>,
    line: EventFd,
    pub(super) signals: Arc<Signals>,
    kicks: Vec<Arc<EventFd>>,
    layout: Layout,
    /// What was consumed of each connection.
    consumed: HashMap<Connection, u32>,
    next_port: u32,
    _thread: JoinHandle<()>,
}

impl Guest {
    /// A device whose driver is not there yet.
    pub(super) fn absent(layout: Layout) -> Self {
        let (sender, accepted) = channel();
        let sender = Mutex::new(sender);
        let (device, handle, thread) =
            Vsock::new(move |accepted| drop(sender.lock().unwrap().send(accepted))).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let signals = Arc::new(Signals::new(line.try_clone().unwrap()));
        Self {
            device,
            handle,
            accepted,
            memory: memory::allocate(&[(GuestAddress(0), 16 << 20)]).unwrap(),
            receive: Ring::new(0),
            send: Ring::new(1),
            free_to_send: (0..BUFFERS).collect(),
            line,
            signals,
            kicks: (0..3).map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())).collect(),
            layout,
            consumed: HashMap::new(),
            next_port: 1000,
            _thread: thread,
        }
    }

    /// A device in service, with all of the driver's buffers.
    pub(super) fn new(layout: Layout) -> Self {
        let mut guest = Self::absent(layout);
        guest.activate();
        guest.give_buffers();
        guest
    }

    pub(super) fn activate(&mut self) {
        let events = Ring::new(2);
        let queues = [&self.receive, &self.send, &events]
            .into_iter()
            .zip(&self.kicks)
            .map(|(ring, kick)| ActiveQueue { queue: ring.device_side(true), kick: Arc::clone(kick) })
            .collect();
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: COMMON_FEATURES,
            signals: Arc::clone(&self.signals),
        });
    }

    pub(super) fn reset(&mut self) {
        self.device.reset();
        self.receive.clear(&self.memory);
        self.send.clear(&self.memory);
        self.free_to_send = (0..BUFFERS).collect();
        self.consumed.clear();
    }

    pub(super) fn give_buffers(&mut self) {
        (0..BUFFERS).for_each(|buffer| self.give_buffer(buffer));
        self.kicks[0].write(1).unwrap();
    }

    fn give_buffer(&mut self, buffer: u16) {
        let at = RECEIVE_AT + u64::from(buffer) * u64::from(RECEIVE_SIZE);
        self.receive.offer(&self.memory, buffer, at, RECEIVE_SIZE, self.layout, WRITABLE);
    }

    /// Waits for an interrupt; false if there is none for this long.
    fn wait(&self, patience: Duration) -> bool {
        let mut polled = [PollFd::from_borrowed_fd(borrow_event(&self.line), PollFlags::IN)];
        let timeout = Timespec::try_from(patience).unwrap();
        let woken = poll(&mut polled, Some(&timeout)).unwrap() > 0;
        let _ = self.line.read();
        woken
    }

    /// The next packet; `None` if none comes for this long.
    pub(super) fn receive_within(&mut self, patience: Duration) -> Option<(Header, Vec<u8>)> {
        let deadline = Instant::now() + patience;
        let (buffer, len) = loop {
            if let Some(used) = self.receive.take_used(&self.memory) {
                break used;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait(left) {
                return None;
            }
        };
        let mut bytes = vec![0; len as usize];
        let at = RECEIVE_AT + u64::from(buffer) * u64::from(RECEIVE_SIZE);
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        self.give_buffer(buffer);
        self.kicks[0].write(1).unwrap();
        let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, GUEST_CID, TYPE_STREAM));
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        if header.operation == Operation::Data as u16 {
            let connection = Connection { guest: header.dst_port, host: header.src_port };
            *self.consumed.entry(connection).or_default() += header.len;
        }
        Some((header, bytes.split_off(HEADER_LEN)))
    }

    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        self.receive_within(PATIENCE).expect("no packet from the device")
    }

    /// The next packet of this kind; credit is given and asked for in between as a driver does.
    pub(super) fn expect(&mut self, operation: Operation) -> (Header, Vec<u8>) {
        loop {
            let (header, payload) = self.receive();
            let connection = Connection { guest: header.dst_port, host: header.src_port };
            match Operation::from_number(header.operation).unwrap() {
                found if found == operation => return (header, payload),
                Operation::CreditRequest => self.say(connection, Operation::CreditUpdate, 0),
                Operation::CreditUpdate => {}
                other => panic!("{other:?} instead of {operation:?}"),
            }
        }
    }

    /// Reads from the only connection that anything comes on, up to the host's end of it.
    pub(super) fn read_to_end(&mut self, connection: Connection) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let (header, payload) = self.receive();
            assert_eq!((header.dst_port, header.src_port), (connection.guest, connection.host));
            all.extend(payload);
            match Operation::from_number(header.operation).unwrap() {
                Operation::Data | Operation::CreditRequest => {
                    self.say(connection, Operation::CreditUpdate, 0)
                }
                Operation::Shutdown if header.flags & SHUTDOWN_SEND != 0 => return all,
                Operation::CreditUpdate | Operation::Shutdown => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(super) fn header(&self, connection: Connection, operation: Operation) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: connection.guest,
            dst_port: connection.host,
            len: 0,
            kind: TYPE_STREAM,
            operation: operation as u16,
            flags: 0,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: self.consumed.get(&connection).copied().unwrap_or(0),
        }
    }

    /// Sends a control packet.
    pub(super) fn say(&mut self, connection: Connection, operation: Operation, flags: u32) {
        let header = Header { flags, ..self.header(connection, operation) };
        self.send(&header, &[]);
    }

    pub(super) fn write(&mut self, connection: Connection, bytes: &[u8]) {
        let header = Header { len: bytes.len() as u32, ..self.header(connection, Operation::Data) };
        self.send(&header, bytes);
    }

    pub(super) fn send(&mut self, header: &Header, payload: &[u8]) {
        let buffer = loop {
            while let Some((buffer, _)) = self.send.take_used(&self.memory) {
                self.free_to_send.push(buffer);
            }
            match self.free_to_send.pop() {
                Some(buffer) => break buffer,
                None => assert!(self.wait(PATIENCE), "the device takes no packets"),
            }
        };
        let at = SEND_AT + u64::from(buffer) * u64::from(SEND_SIZE);
        self.memory.write_slice(&[&header.encode(), payload].concat(), GuestAddress(at)).unwrap();
        let len = (HEADER_LEN + payload.len()) as u32;
        self.send.offer(&self.memory, buffer, at, len, self.layout, 0);
        self.kicks[1].write(1).unwrap();
    }

    /// A connection that the guest makes, and its stream.
    pub(super) fn connect(&mut self, host: u32) -> (Connection, OwnedFd) {
        self.next_port += 1;
        let connection = Connection { guest: self.next_port, host };
        self.say(connection, Operation::Request, 0);
        self.expect(Operation::Response);
        let accepted = self.accepted.recv_timeout(PATIENCE).unwrap();
        assert_eq!((accepted.port, accepted.guest_port), (host, connection.guest));
        (connection, accepted.stream)
    }

    /// A connection that the host makes with a descriptor, accepted by the guest.
    pub(super) fn accept(&mut self, stream: impl Into<OwnedFd>) -> Connection {
        self.handle.connect(9, None, stream.into());
        let (request, _) = self.expect(Operation::Request);
        let connection = Connection { guest: 9, host: request.src_port };
        self.say(connection, Operation::Response, 0);
        connection
    }
}
