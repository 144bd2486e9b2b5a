//! The core against a model of both ends: whatever the order of events, every byte arrives once and in order, nothing
//! exceeds its credit, and everything that was opened is closed in the end.

use proptest::prelude::*;

use super::*;

/// What can happen, on one of a few connections.
#[derive(Debug, Clone)]
enum Happening {
    HostWrites(usize, u32),
    HostEnds(usize),
    GuestWrites(usize, u32),
    GuestEnds(usize),
    GuestReads(usize, u32),
    StreamTakes(usize, u32),
    Packets(usize, u32),
}

const CONNECTIONS: usize = 3;

fn happening() -> impl Strategy<Value = Happening> {
    let which = 0..CONNECTIONS;
    prop_oneof![
        (which.clone(), 1u32..20_000).prop_map(|(i, n)| Happening::HostWrites(i, n)),
        which.clone().prop_map(Happening::HostEnds),
        (which.clone(), 1u32..20_000).prop_map(|(i, n)| Happening::GuestWrites(i, n)),
        which.clone().prop_map(Happening::GuestEnds),
        (which.clone(), 1u32..40_000).prop_map(|(i, n)| Happening::GuestReads(i, n)),
        (which, 1u32..40_000).prop_map(|(i, n)| Happening::StreamTakes(i, n)),
        (1usize..20, 1u32..5000).prop_map(|(n, len)| Happening::Packets(n, len)),
    ]
}

/// Both ends of one connection, counted in bytes since its beginning.
#[derive(Debug, Clone, Default)]
struct Ends {
    host_wrote: u32,
    host_ended: bool,
    /// Left the stream for the guest; the guest read so much of it.
    to_guest: u32,
    guest_read: u32,
    packet_ends: Vec<u32>,
    guest_saw_end: bool,
    guest_wrote: u32,
    guest_ended: bool,
    /// Written to the stream.
    to_host: u32,
    reported: u32,
    stream_saw_end: bool,
}

#[derive(Clone)]
struct World {
    core: Core,
    ids: Vec<Id>,
    ports: Vec<Ports>,
    ends: Vec<Ends>,
    /// What the guest says it can hold.
    guest_buffer: u32,
}

impl World {
    fn new(connections: usize, guest_buffer: u32) -> Self {
        let mut core = Core::new(CID);
        let (ids, ports) = (0..connections).map(|_| connected(&mut core)).unzip();
        let ends = (0..connections).map(|_| Ends::default()).collect();
        let mut world = Self { core, ids, ports, ends, guest_buffer };
        for index in 0..connections {
            world.tell(index, Operation::CreditUpdate, 0, 0);
        }
        world
    }

    fn tell(&mut self, index: usize, operation: Operation, len: u32, flags: u32) -> Option<Id> {
        let fwd_cnt = self.ends[index].guest_read;
        let buf_alloc = self.guest_buffer;
        let header = Header { len, flags, fwd_cnt, buf_alloc, ..packet(operation, self.ports[index]) };
        let result = self.core.guest_packet(&header);
        self.act();
        result
    }

    fn act(&mut self) {
        while let Some(action) = self.core.next_action() {
            let Action::ShutdownWrite(id) = action else { panic!("{action:?}") };
            let index = self.index(id);
            let ends = &mut self.ends[index];
            assert!(ends.guest_ended && ends.to_host == ends.guest_wrote && !ends.stream_saw_end);
            ends.stream_saw_end = true;
        }
    }

    fn index(&self, id: Id) -> usize {
        self.ids.iter().position(|other| *other == id).unwrap()
    }

    fn happen(&mut self, happening: &Happening) {
        match *happening {
            Happening::HostWrites(index, len) => {
                if !self.ends[index].host_ended {
                    self.ends[index].host_wrote += len;
                    self.core.host_readable(self.ids[index]);
                }
            }
            Happening::HostEnds(index) => {
                self.ends[index].host_ended = true;
                self.core.host_readable(self.ids[index]);
            }
            Happening::GuestWrites(index, len) => {
                let ends = &mut self.ends[index];
                let credit = BUFFER - (ends.guest_wrote - ends.reported);
                let len = len.min(credit);
                if !ends.guest_ended && len > 0 {
                    ends.guest_wrote += len;
                    assert_eq!(self.tell(index, Operation::Data, len, 0), Some(self.ids[index]));
                }
            }
            Happening::GuestEnds(index) => {
                self.ends[index].guest_ended = true;
                self.tell(index, Operation::Shutdown, 0, SHUTDOWN_SEND);
            }
            Happening::GuestReads(index, len) => {
                let ends = &mut self.ends[index];
                ends.guest_read += len.min(ends.to_guest - ends.guest_read);
                // As Linux does: an update when everything was read.
                if ends.guest_read == ends.to_guest {
                    self.tell(index, Operation::CreditUpdate, 0, 0);
                }
            }
            Happening::StreamTakes(index, len) => {
                let ends = &mut self.ends[index];
                let len = len.min(ends.guest_wrote - ends.to_host);
                ends.to_host += len;
                if len > 0 {
                    self.core.delivered(self.ids[index], len);
                    self.act();
                }
            }
            Happening::Packets(count, room) => self.packets(count, room),
        }
    }

    fn packets(&mut self, count: usize, room: u32) {
        for _ in 0..count {
            match self.core.next_packet() {
                None => return,
                Some(Outgoing::Control(header)) => self.guest_sees(&header),
                Some(Outgoing::Data(id, most)) => self.read(id, most.bytes.min(room)),
            }
        }
    }

    fn read(&mut self, id: Id, most: u32) {
        let index = self.index(id);
        let ends = &self.ends[index];
        let result = match (ends.host_wrote - ends.to_guest, ends.host_ended) {
            (0, true) => ReadResult::EndOfFile,
            (0, false) => ReadResult::WouldBlock,
            (available, _) => ReadResult::Bytes(available.min(most)),
        };
        if let Some(header) = self.core.read_done(id, result) {
            self.guest_sees(&header);
        }
        self.act();
    }

    fn guest_sees(&mut self, header: &Header) {
        let index = self.ports.iter().position(|ports| ports.host == header.src_port).unwrap();
        let ends = &mut self.ends[index];
        assert_eq!(header.fwd_cnt, ends.to_host);
        ends.reported = header.fwd_cnt;
        match Operation::from_number(header.operation).unwrap() {
            Operation::Data => {
                assert!(!ends.guest_saw_end && header.len > 0);
                ends.to_guest += header.len;
                let read = ends.guest_read;
                ends.packet_ends.push(ends.to_guest);
                ends.packet_ends.retain(|end| *end > read);
                assert!(ends.to_guest - read <= self.guest_buffer);
                let overhead = ends.packet_ends.len() as u32 * 600;
                assert!(ends.packet_ends.len() == 1 || overhead <= self.guest_buffer);
            }
            Operation::Shutdown => {
                assert_eq!(header.flags, SHUTDOWN_SEND);
                assert!(ends.host_ended && ends.to_guest == ends.host_wrote && !ends.guest_saw_end);
                ends.guest_saw_end = true;
            }
            Operation::CreditUpdate => {}
            Operation::CreditRequest => {
                self.tell(index, Operation::CreditUpdate, 0, 0);
            }
            other => panic!("{other:?}"),
        }
    }

    /// Lets everybody do what they can until nothing changes, then looks whether all of it arrived.
    fn settle(mut self) {
        let connections = self.ids.len();
        for index in 0..connections {
            self.happen(&Happening::HostEnds(index));
            self.happen(&Happening::GuestEnds(index));
        }
        for _ in 0..10_000 {
            for index in 0..connections {
                self.happen(&Happening::GuestReads(index, u32::MAX));
                self.happen(&Happening::StreamTakes(index, u32::MAX));
            }
            if !self.core.has_packets() {
                break;
            }
            self.packets(10, 4096);
        }
        for ends in &self.ends {
            assert_eq!((ends.to_guest, ends.guest_read), (ends.host_wrote, ends.host_wrote), "{ends:?}");
            assert_eq!(ends.to_host, ends.guest_wrote, "{ends:?}");
            assert!(ends.guest_saw_end && ends.stream_saw_end, "{ends:?}");
        }
        for index in 0..connections {
            let header = Header { flags: SHUTDOWN_BOTH, ..packet(Operation::Shutdown, self.ports[index]) };
            self.core.guest_packet(&header);
        }
        assert_eq!(self.core.counts().open, 0);
    }
}

fn any_header() -> impl Strategy<Value = Header> {
    let number = prop_oneof![0u32..4, Just(u32::MAX), any::<u32>()];
    (0u16..9, 0u32..3, 0u32..4, number.clone(), 0u32..5, number.clone(), number).prop_map(
        |(operation, host, guest, len, flags, buf_alloc, fwd_cnt)| Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: if host == 2 { FIRST_EPHEMERAL } else { host },
            len,
            kind: TYPE_STREAM,
            operation,
            flags,
            buf_alloc,
            fwd_cnt,
        },
    )
}

/// Every sequence of these, on one connection: small and large writes, slow and eager readers, both ends.
const ALPHABET: [Happening; 9] = [
    Happening::HostWrites(0, 100),
    Happening::HostWrites(0, 9000),
    Happening::HostEnds(0),
    Happening::GuestWrites(0, 300_000),
    Happening::GuestEnds(0),
    Happening::GuestReads(0, 1500),
    Happening::StreamTakes(0, 100_000),
    Happening::Packets(1, 1000),
    Happening::Packets(3, 5000),
];

fn try_all(world: &World, depth: usize, tried: &mut usize) {
    *tried += 1;
    world.clone().settle();
    if depth > 0 {
        for happening in &ALPHABET {
            let mut next = world.clone();
            next.happen(happening);
            try_all(&next, depth - 1, tried);
        }
    }
}

/// The window is a few packets, so that its edges are met within a few events. The world asserts at each step that no more is
/// under way than there is credit for, and in the end that every byte arrived once.
#[rstest::rstest]
#[case::a_few_packets(5000)]
#[case::less_than_one_packet_costs(700)]
fn every_short_history_ends_well(#[case] guest_buffer: u32) {
    let mut tried = 0;
    try_all(&World::new(1, guest_buffer), 4, &mut tried);
    assert_eq!(tried, 1 + 9 + 81 + 729 + 6561);
}

/// What a guest may claim of its credit, the absurd included.
fn claim() -> impl Strategy<Value = (u32, u32)> {
    let number = || prop_oneof![0u32..3, 0u32..100_000, Just(u32::MAX), Just(1 << 31), any::<u32>()];
    (number(), number())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_arrives_once_and_in_order(happenings in prop::collection::vec(happening(), 0..150)) {
        let mut world = World::new(CONNECTIONS, GUEST_BUFFER);
        for happening in &happenings {
            world.happen(happening);
        }
        world.settle();
    }

    #[test]
    fn whatever_the_guest_claims_no_more_is_under_way_than_it_can_hold(
        steps in prop::collection::vec((claim(), any::<bool>(), 1u32..9000), 0..60),
    ) {
        let mut core = Core::new(CID);
        let (id, ports) = connected(&mut core);
        core.host_readable(id);
        // A guest that is believed says the truth about what it consumed: its claims are taken modulo what it got.
        let (mut sent, mut consumed) = (0u32, 0u32);
        for ((buf_alloc, claimed), honest, chunk) in steps {
            let fwd_cnt = if honest { consumed + claimed.checked_rem(sent - consumed + 1).unwrap_or(0) } else { claimed };
            core.guest_packet(&Header { buf_alloc, fwd_cnt, ..packet(Operation::CreditUpdate, ports) });
            if fwd_cnt.wrapping_sub(consumed) > sent - consumed {
                prop_assert_eq!(core.counts().open, 0);
                return Ok(());
            }
            consumed = fwd_cnt;
            let before = sent;
            while let Some(outgoing) = core.next_packet() {
                if let Outgoing::Data(id, room) = outgoing {
                    let len = room.bytes.min(chunk);
                    core.read_done(id, ReadResult::Bytes(len));
                    sent += len;
                }
            }
            prop_assert!(sent == before || sent - consumed <= buf_alloc);
        }
    }

    #[test]
    fn no_sequence_of_packets_breaks_the_core(headers in prop::collection::vec(any_header(), 0..200)) {
        let mut core = Core::new(CID);
        core.listen(1);
        let made = core.connect(1, None).unwrap();
        core.host_readable(made);
        for header in headers {
            if let Some(id) = core.guest_packet(&header) {
                core.delivered(id, header.len / 2);
            }
            while let Some(action) = core.next_action() {
                if let Action::Accept(id, _) = action {
                    core.accepted(id);
                    core.host_readable(id);
                }
            }
            if let Some(Outgoing::Data(id, most)) = core.next_packet() {
                prop_assert!(most.bytes > 0 && most.packets > 0);
                core.read_done(id, ReadResult::Bytes(most.bytes.min(1000)));
            }
        }
        core.device_reset();
        let _ = core.next_packet();
    }
}
