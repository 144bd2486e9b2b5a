//! The core against a guest that behaves, one that does not, and a model.

mod model;

use super::super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

const CID: u64 = 3;
const GUEST_BUFFER: u32 = 64 * 1024;

fn packet(operation: Operation, ports: Ports) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        len: 0,
        kind: TYPE_STREAM,
        operation: operation as u16,
        flags: 0,
        buf_alloc: GUEST_BUFFER,
        fwd_cnt: 0,
    }
}

fn control(core: &mut Core) -> Header {
    match core.next_packet() {
        Some(Outgoing::Control(header)) => header,
        other => panic!("expected a control packet, not {other:?}"),
    }
}

fn is(header: &Header, operation: Operation) -> bool {
    header.operation == operation as u16
}

/// A connection made by the host, open.
fn connected(core: &mut Core) -> (Id, Ports) {
    let id = core.connect(9, None).unwrap();
    let request = control(core);
    assert!(is(&request, Operation::Request));
    let ports = Ports { host: request.src_port, guest: 9 };
    assert_eq!(core.guest_packet(&packet(Operation::Response, ports)), None);
    (id, ports)
}

/// Lets the core send everything that a stream with endless data gives, in packets of at most `chunk`.
fn pump(core: &mut Core, id: Id, chunk: u32) -> (usize, u32) {
    let (mut packets, mut bytes) = (0, 0);
    while let Some(outgoing) = core.next_packet() {
        if let Outgoing::Data(of, most) = outgoing {
            assert_eq!(of, id);
            let len = most.bytes.min(chunk);
            assert!(is(&core.read_done(id, ReadResult::Bytes(len)).unwrap(), Operation::Data));
            packets += 1;
            bytes += len;
        }
    }
    (packets, bytes)
}

#[test]
fn a_connection_before_the_driver_is_not_lost() {
    let mut core = Core::new(CID);
    core.connect(9, None).unwrap();
    core.device_reset();
    assert!(is(&control(&mut core), Operation::Request));
    core.device_reset();
    assert!(matches!(core.next_action(), Some(Action::Close(_))));
    assert_eq!(core.counts().open, 0);
}

#[test]
fn the_guest_connects_only_where_somebody_listens() {
    let mut core = Core::new(CID);
    core.listen(1024);
    for (host, listening) in [(1024, true), (1025, false)] {
        let ports = Ports { host, guest: 5 };
        assert_eq!(core.guest_packet(&packet(Operation::Request, ports)), None);
        match core.next_action() {
            Some(Action::Accept(id, accepted)) if listening => {
                assert_eq!(accepted, ports);
                core.accepted(id);
                assert!(is(&control(&mut core), Operation::Response));
            }
            None if !listening => assert!(is(&control(&mut core), Operation::Reset)),
            other => panic!("{host}: {other:?}"),
        }
    }
}

#[test]
fn no_more_is_under_way_than_the_guest_can_hold() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    core.host_readable(id);
    let (packets, bytes) = pump(&mut core, id, u32::MAX);
    assert!(bytes <= GUEST_BUFFER && bytes > GUEST_BUFFER / 2, "{packets} packets, {bytes} bytes");
    // The guest consumes everything: as much again.
    core.guest_packet(&Header { fwd_cnt: bytes, ..packet(Operation::CreditUpdate, ports) });
    assert_eq!(pump(&mut core, id, u32::MAX).1, bytes);
}

#[test]
fn small_packets_are_metered_by_number() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    core.host_readable(id);
    let (packets, bytes) = pump(&mut core, id, 10);
    assert!((32..=64).contains(&packets), "{packets} packets, {bytes} bytes");
    // It asked for the guest's credit once, and goes on when the guest has consumed something.
    assert!(!core.has_packets());
    core.guest_packet(&Header { fwd_cnt: 100, ..packet(Operation::CreditUpdate, ports) });
    assert!(pump(&mut core, id, 10).0 >= 9);
}

#[test]
fn a_guest_that_shrinks_its_buffer_gets_no_credit_out_of_it() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    core.host_readable(id);
    pump(&mut core, id, 4096);
    core.guest_packet(&Header { buf_alloc: 1, ..packet(Operation::CreditUpdate, ports) });
    assert_eq!(pump(&mut core, id, 4096), (0, 0));
}

#[test]
fn claiming_to_have_consumed_what_was_never_sent_is_a_reset() {
    let mut core = Core::new(CID);
    let (_, ports) = connected(&mut core);
    core.guest_packet(&Header { fwd_cnt: 1, ..packet(Operation::CreditUpdate, ports) });
    assert!(is(&control(&mut core), Operation::Reset));
    assert!(matches!(core.next_action(), Some(Action::Close(_))));
}

#[test]
fn sending_more_than_the_buffer_is_a_reset() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    let data = Header { len: 64 * 1024, ..packet(Operation::Data, ports) };
    for _ in 0..BUFFER / data.len {
        assert_eq!(core.guest_packet(&data), Some(id));
    }
    assert_eq!(core.guest_packet(&data), None);
    assert!(is(&control(&mut core), Operation::Reset));
    // What was sent before is still written.
    assert_eq!(core.next_action(), None);
    core.delivered(id, BUFFER);
    assert_eq!(core.next_action(), Some(Action::Close(id)));
}

#[test]
fn the_guest_is_told_when_its_bytes_were_written() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    core.guest_packet(&Header { len: 65536, ..packet(Operation::Data, ports) });
    assert_eq!(core.next_packet(), None);
    core.delivered(id, 65536);
    let update = control(&mut core);
    assert!(is(&update, Operation::CreditUpdate));
    assert_eq!((update.fwd_cnt, update.buf_alloc), (65536, BUFFER));
    core.guest_packet(&packet(Operation::CreditRequest, ports));
    assert!(is(&control(&mut core), Operation::CreditUpdate));
}

#[test]
fn the_hosts_end_of_file_leaves_the_other_direction_open() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    core.host_readable(id);
    assert!(matches!(core.next_packet(), Some(Outgoing::Data(..))));
    assert_eq!(core.read_done(id, ReadResult::EndOfFile), None);
    let shutdown = control(&mut core);
    assert!(is(&shutdown, Operation::Shutdown));
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    assert_eq!(core.guest_packet(&Header { len: 5, ..packet(Operation::Data, ports) }), Some(id));
    core.delivered(id, 5);
    core.guest_packet(&Header { flags: SHUTDOWN_BOTH, ..packet(Operation::Shutdown, ports) });
    assert!(is(&control(&mut core), Operation::Reset));
    assert_eq!(core.next_action(), Some(Action::Close(id)));
    assert_eq!(core.counts().open, 0);
}

#[test]
fn a_guest_that_gives_up_is_told_from_one_that_has_finished() {
    let mut core = Core::new(CID);
    let close = |core: &mut Core, ports, flags| {
        core.guest_packet(&Header { flags, ..packet(Operation::Shutdown, ports) });
    };
    let (id, ports) = connected(&mut core);
    close(&mut core, ports, SHUTDOWN_BOTH);
    assert_eq!(core.next_action(), Some(Action::Abort(id)));
    assert!(is(&control(&mut core), Operation::Reset));
    let (id, ports) = connected(&mut core);
    close(&mut core, ports, SHUTDOWN_SEND);
    assert_eq!(core.next_action(), Some(Action::ShutdownWrite(id)));
    close(&mut core, ports, SHUTDOWN_BOTH);
    assert_eq!(core.next_action(), Some(Action::Close(id)));
}

#[test]
fn a_host_port_that_is_asked_for_is_had_once() {
    let mut core = Core::new(CID);
    core.listen(1024);
    core.connect(9, Some(77)).unwrap();
    let request = control(&mut core);
    assert_eq!((request.src_port, request.dst_port), (77, 9));
    assert!(core.connect(9, Some(77)).is_none());
    assert!(core.connect(8, Some(77)).is_some());
    assert!(core.connect(9, Some(1024)).is_none());
    assert!(core.connect(9, Some(FIRST_EPHEMERAL)).is_none());
}

#[test]
fn the_guests_end_reaches_the_stream_after_its_last_byte() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    core.guest_packet(&Header { len: 100, ..packet(Operation::Data, ports) });
    core.guest_packet(&Header { flags: SHUTDOWN_SEND, ..packet(Operation::Shutdown, ports) });
    core.delivered(id, 60);
    assert_eq!(core.next_action(), None);
    core.delivered(id, 40);
    assert_eq!(core.next_action(), Some(Action::ShutdownWrite(id)));
    assert_eq!(core.next_action(), None);
    // The host's direction is still open.
    core.host_readable(id);
    assert_eq!(pump(&mut core, id, 1000).1 % 1000, 0);
    // Data after its end is not allowed.
    assert_eq!(core.guest_packet(&Header { len: 1, ..packet(Operation::Data, ports) }), None);
    assert!(is(&control(&mut core), Operation::Reset));
}

#[test]
fn ports_can_be_used_again_while_the_last_bytes_are_written() {
    let mut core = Core::new(CID);
    core.listen(1024);
    let ports = Ports { host: 1024, guest: 5 };
    core.guest_packet(&packet(Operation::Request, ports));
    let Some(Action::Accept(first, _)) = core.next_action() else { panic!("no connection") };
    core.accepted(first);
    control(&mut core);
    core.guest_packet(&Header { len: 9, ..packet(Operation::Data, ports) });
    core.guest_packet(&packet(Operation::Reset, ports));
    assert_eq!(core.next_action(), None);
    core.guest_packet(&packet(Operation::Request, ports));
    let Some(Action::Accept(second, _)) = core.next_action() else { panic!("no connection") };
    assert_ne!(first, second);
    core.delivered(first, 9);
    assert_eq!(core.next_action(), Some(Action::Abort(first)));
    core.accepted(second);
    assert!(is(&control(&mut core), Operation::Response));
}

#[test]
fn a_stream_that_takes_nothing_more_tells_the_guest() {
    let mut core = Core::new(CID);
    let (id, ports) = connected(&mut core);
    core.guest_packet(&Header { len: 100, ..packet(Operation::Data, ports) });
    core.host_gone(id);
    let shutdown = control(&mut core);
    assert!(is(&shutdown, Operation::Shutdown));
    assert_eq!((shutdown.flags, shutdown.fwd_cnt), (SHUTDOWN_RECEIVE, 100));
    // What the guest had under way is thrown away, and its credit given back.
    for _ in 0..100 {
        assert_eq!(core.guest_packet(&Header { len: 65536, ..packet(Operation::Data, ports) }), None);
    }
    assert!(is(&control(&mut core), Operation::CreditUpdate));
}

#[test]
fn connections_take_turns() {
    let mut core = Core::new(CID);
    let ids: Vec<Id> = (0..3).map(|_| connected(&mut core).0).collect();
    ids.iter().for_each(|id| core.host_readable(*id));
    let mut order = Vec::new();
    for _ in 0..9 {
        let Some(Outgoing::Data(id, _)) = core.next_packet() else { panic!("nothing to send") };
        core.read_done(id, ReadResult::Bytes(1));
        order.push(id);
    }
    assert_eq!(order, [ids.clone(), ids.clone(), ids].concat());
}

#[test]
fn a_deferred_read_keeps_its_turn() {
    let mut core = Core::new(CID);
    let (id, _) = connected(&mut core);
    core.host_readable(id);
    let first = core.next_packet();
    assert!(matches!(first, Some(Outgoing::Data(..))));
    core.read_deferred(id);
    assert_eq!(core.next_packet(), first);
}

#[test]
fn packets_from_elsewhere_and_of_other_kinds_open_nothing() {
    let mut core = Core::new(CID);
    core.listen(1);
    let request = packet(Operation::Request, Ports { host: 1, guest: 1 });
    for wrong in [
        Header { src_cid: 4, ..request },
        Header { dst_cid: 7, ..request },
        Header { kind: 2, ..request },
        Header { operation: 0, ..request },
        Header { operation: 8, ..request },
        packet(Operation::Data, Ports { host: 1, guest: 1 }),
        packet(Operation::Reset, Ports { host: 1, guest: 1 }),
    ] {
        assert_eq!(core.guest_packet(&wrong), None);
        assert_eq!(core.next_action(), None);
    }
    assert_eq!(core.counts().open, 0);
}

#[test]
fn a_flood_is_bounded() {
    let mut core = Core::new(CID);
    core.listen(1);
    for guest in 0..100_000 {
        core.guest_packet(&packet(Operation::Data, Ports { host: 2, guest }));
        core.guest_packet(&packet(Operation::Request, Ports { host: 1, guest }));
    }
    assert_eq!(core.counts().open, MAX_CONNECTIONS as u64);
    assert!(core.resets.len() <= MAX_RESETS);
    assert!(core.connect(1, None).is_none());
}

#[test]
fn with_thousands_of_connections_nobody_is_served_twice_before_everybody_was_once() {
    let mut core = Core::new(CID);
    let ids: Vec<Id> = (0..MAX_CONNECTIONS).map(|_| connected(&mut core).0).collect();
    ids.iter().for_each(|id| core.host_readable(*id));
    for _ in 0..3 {
        for expected in &ids {
            let Some(Outgoing::Data(id, _)) = core.next_packet() else { panic!("nothing to send") };
            assert_eq!(id, *expected);
            core.read_done(id, ReadResult::Bytes(1));
        }
    }
}

#[test]
fn all_that_is_buffered_together_is_bounded() {
    let mut core = Core::new(CID);
    core.listen(1);
    let mut sum = 0u64;
    for guest in 0..MAX_CONNECTIONS as u32 {
        core.guest_packet(&packet(Operation::Request, Ports { host: 1, guest }));
        let Some(Action::Accept(id, _)) = core.next_action() else { panic!("not accepted") };
        core.accepted(id);
        sum += u64::from(control(&mut core).buf_alloc);
    }
    assert!(sum <= 160 << 20, "{sum}");
    // When they are gone, there is room for all of a new one again.
    core.device_reset();
    while core.next_action().is_some() {}
    core.guest_packet(&packet(Operation::Request, Ports { host: 1, guest: 1 }));
    let Some(Action::Accept(id, _)) = core.next_action() else { panic!("not accepted") };
    core.accepted(id);
    assert_eq!(control(&mut core).buf_alloc, BUFFER);
}

#[test]
fn a_pipe_that_only_takes_is_told_to_the_guest_when_it_is_there() {
    let mut core = Core::new(CID);
    let id = core.connect(9, None).unwrap();
    core.one_way(id, false, true);
    let request = control(&mut core);
    assert!(is(&request, Operation::Request) && !core.has_packets());
    core.guest_packet(&packet(Operation::Response, Ports { host: request.src_port, guest: 9 }));
    let shutdown = control(&mut core);
    assert_eq!((shutdown.operation, shutdown.flags), (Operation::Shutdown as u16, SHUTDOWN_SEND));
}
