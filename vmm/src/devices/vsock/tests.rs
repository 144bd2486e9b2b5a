//! The whole device against a driver and real streams: what goes wrong in other user-space implementations, case by case.

mod driver;

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use driver::{Connection, GUEST_BUFFER, Guest, Layout};

use super::packet::{Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

const PATIENCE: Duration = Duration::from_secs(30);

/// The host's ends that a daemon hands over: what it keeps, and what the device gets.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Unix,
    Tcp,
}

trait Stream: Read + Write + Send {
    fn shut(&self, how: Shutdown);
}

impl Stream for UnixStream {
    fn shut(&self, how: Shutdown) {
        self.shutdown(how).unwrap();
    }
}

impl Stream for TcpStream {
    fn shut(&self, how: Shutdown) {
        self.shutdown(how).unwrap();
    }
}

fn streams(kind: Kind) -> (Box<dyn Stream>, OwnedFd) {
    match kind {
        Kind::Unix => {
            let (kept, given) = UnixStream::pair().unwrap();
            kept.set_read_timeout(Some(PATIENCE)).unwrap();
            (Box::new(kept), given.into())
        }
        Kind::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let kept = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            kept.set_read_timeout(Some(PATIENCE)).unwrap();
            (Box::new(kept), listener.accept().unwrap().0.into())
        }
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[rstest::rstest]
fn the_guest_ends_its_direction_and_still_receives(#[values(Kind::Unix, Kind::Tcp)] kind: Kind) {
    let mut guest = Guest::new(Layout::Whole);
    let (mut host, given) = streams(kind);
    let connection = guest.accept(given);
    guest.write(connection, b"question");
    guest.say(connection, Operation::Shutdown, SHUTDOWN_SEND);
    let mut question = String::new();
    host.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    let answer = pattern(300_000);
    let expected = answer.clone();
    let writer = std::thread::spawn(move || {
        host.write_all(&answer).unwrap();
        host.shut(Shutdown::Write);
        host
    });
    assert_eq!(guest.read_to_end(connection), expected);
    guest.say(connection, Operation::Shutdown, SHUTDOWN_BOTH);
    guest.expect(Operation::Reset);
    drop(writer.join().unwrap());
}

#[rstest::rstest]
fn the_host_ends_its_direction_and_still_receives(#[values(Kind::Unix, Kind::Tcp)] kind: Kind) {
    let mut guest = Guest::new(Layout::Whole);
    let (mut host, given) = streams(kind);
    let connection = guest.accept(given);
    host.write_all(b"question").unwrap();
    host.shut(Shutdown::Write);
    assert_eq!(guest.read_to_end(connection), b"question");
    let answer = pattern(1_000_000);
    let expected = answer.clone();
    let reader = std::thread::spawn(move || {
        let mut found = Vec::new();
        host.read_to_end(&mut found).unwrap();
        found
    });
    write_all(&mut guest, connection, &answer);
    guest.say(connection, Operation::Shutdown, SHUTDOWN_SEND);
    assert!(reader.join().unwrap() == expected);
}

/// Sends with regard to the host's credit.
fn write_all(guest: &mut Guest, connection: Connection, bytes: &[u8]) {
    let (mut sent, mut forwarded) = (0, 0);
    while (sent as usize) < bytes.len() {
        let room = (GUEST_BUFFER - (sent - forwarded)).min(60_000);
        if room == 0 {
            let (header, _) = guest.expect(Operation::CreditUpdate);
            if header.src_port == connection.host {
                forwarded = header.fwd_cnt;
            }
            continue;
        }
        let end = bytes.len().min((sent + room) as usize);
        guest.write(connection, &bytes[sent as usize..end]);
        sent = end as u32;
    }
}

#[test]
fn the_end_of_a_pipe_to_write_to_gets_its_bytes_and_then_its_end() {
    let mut guest = Guest::new(Layout::Whole);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let connection = guest.accept(writer);
    // Nothing will come from it, which the guest is told at once.
    assert_eq!(guest.expect(Operation::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.write(connection, b"into the pipe");
    guest.say(connection, Operation::Shutdown, SHUTDOWN_SEND);
    let mut found = String::new();
    reader.read_to_string(&mut found).unwrap();
    assert_eq!(found, "into the pipe");
}

#[test]
fn the_end_of_a_pipe_to_read_from_gives_its_bytes_and_then_its_end() {
    let mut guest = Guest::new(Layout::Whole);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let connection = guest.accept(reader);
    assert_eq!(guest.expect(Operation::Shutdown).0.flags, SHUTDOWN_RECEIVE);
    writer.write_all(b"out of the pipe").unwrap();
    drop(writer);
    assert_eq!(guest.read_to_end(connection), b"out of the pipe");
}

#[test]
fn a_guest_that_wants_no_more_from_a_pipe_lets_its_writer_know() {
    let mut guest = Guest::new(Layout::Whole);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let connection = guest.accept(reader);
    guest.expect(Operation::Shutdown);
    guest.say(connection, Operation::Shutdown, SHUTDOWN_RECEIVE);
    let error = loop {
        if let Err(error) = writer.write_all(&[0; 4096]) {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_host_that_made_its_socket_blocking_again_does_not_block_the_device() {
    let mut guest = Guest::new(Layout::Whole);
    let (mut host, given) = UnixStream::pair().unwrap();
    let same_file = given.try_clone().unwrap();
    let slow = guest.accept(given);
    same_file.set_nonblocking(false).unwrap();
    // More than a socket holds, and nobody reads.
    write_all(&mut guest, slow, &pattern(GUEST_BUFFER as usize));
    let (mut other_host, other) = streams(Kind::Unix);
    let other = guest.accept(other);
    guest.write(other, b"!");
    other_host.read_exact(&mut [0]).unwrap();
    // An empty one does not block it either.
    other_host.write_all(b"?").unwrap();
    assert_eq!(guest.expect(Operation::Data).1, b"?");
    let mut all = vec![0; GUEST_BUFFER as usize];
    host.read_exact(&mut all).unwrap();
    assert!(all == pattern(all.len()));
}

#[rstest::rstest]
fn every_layout_of_descriptors_carries_the_same_bytes(
    #[values(Layout::Whole, Layout::HeaderApart, Layout::HeaderCut, Layout::Crumbs, Layout::Indirect)]
    layout: Layout,
) {
    let mut guest = Guest::new(layout);
    guest.handle.listen(1024);
    let (connection, stream) = guest.connect(1024);
    let data = pattern(200_000);
    write_all(&mut guest, connection, &data);
    let mut host = UnixStream::from(stream);
    let mut found = vec![0; data.len()];
    host.read_exact(&mut found).unwrap();
    assert!(found == data);
    let writer = std::thread::spawn(move || {
        host.write_all(&data).unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        data
    });
    let found = guest.read_to_end(connection);
    assert!(found == writer.join().unwrap());
}

#[test]
fn without_buffers_of_the_guest_the_device_sleeps() {
    let mut guest = Guest::absent(Layout::Whole);
    guest.activate();
    let (mut host, given) = streams(Kind::Unix);
    host.write_all(&[1; 100_000]).unwrap();
    guest.handle.connect(9, None, given);
    let rounds = |guest: &Guest| guest.handle.shown.rounds.load(Ordering::Relaxed);
    // No packet can come. What the device does meanwhile is counted.
    assert!(guest.receive_within(Duration::from_millis(100)).is_none());
    let before = rounds(&guest);
    assert!(guest.receive_within(Duration::from_millis(300)).is_none());
    assert_eq!(rounds(&guest), before, "it is busy with nothing");
    guest.give_buffers();
    let (request, _) = guest.expect(Operation::Request);
    let connection = Connection { guest: 9, host: request.src_port };
    guest.say(connection, Operation::Response, 0);
    guest.expect(Operation::Data);
}

#[test]
fn an_idle_device_sleeps() {
    let mut guest = Guest::new(Layout::Whole);
    let (_host, given) = streams(Kind::Unix);
    let connection = guest.accept(given);
    guest.write(connection, b"x");
    assert!(guest.receive_within(Duration::from_millis(100)).is_none());
    let before = guest.handle.shown.rounds.load(Ordering::Relaxed);
    assert!(guest.receive_within(Duration::from_millis(300)).is_none());
    assert_eq!(guest.handle.shown.rounds.load(Ordering::Relaxed), before);
}

#[test]
fn one_slow_stream_holds_up_nobody_and_loses_nothing() {
    let mut guest = Guest::new(Layout::Whole);
    let (mut slow_host, slow) = streams(Kind::Unix);
    let (mut quick_host, quick) = streams(Kind::Tcp);
    let (slow, quick) = (guest.accept(slow), guest.accept(quick));
    let kept = pattern(GUEST_BUFFER as usize);
    write_all(&mut guest, slow, &kept);
    let data = pattern(500_000);
    let expected = data.clone();
    let reader = std::thread::spawn(move || {
        let mut found = vec![0; expected.len()];
        quick_host.read_exact(&mut found).unwrap();
        found == expected
    });
    write_all(&mut guest, quick, &data);
    assert!(reader.join().unwrap());
    let mut found = vec![0; kept.len()];
    slow_host.read_exact(&mut found).unwrap();
    assert!(found == kept);
}

/// The guest's side of a slow peer: it reads nothing of one connection.
#[test]
fn a_connection_that_the_guest_does_not_read_holds_up_nobody() {
    let mut guest = Guest::new(Layout::Whole);
    let (mut unread_host, unread) = UnixStream::pair().unwrap();
    let unread = guest.accept(unread);
    unread_host.set_nonblocking(true).unwrap();
    let (mut read_host, read) = streams(Kind::Unix);
    let read = guest.accept(read);
    let mut got = 0;
    while let Ok(len) = unread_host.write(&[1; 65536]) {
        got += len;
    }
    read_host.write_all(b"through").unwrap();
    let mut held = 0;
    loop {
        let (header, payload) = guest.receive();
        match (header.dst_port, header.src_port) == (read.guest, read.host) {
            true if header.operation == Operation::Data as u16 => {
                assert_eq!(payload, b"through");
                break;
            }
            // It is received and never said to be consumed.
            _ => held += payload.len(),
        }
    }
    assert!(held <= GUEST_BUFFER as usize && held <= got, "{held} of {got} bytes");
    assert_eq!(unread.guest, read.guest);
}

#[test]
fn a_thousand_connections_are_served_alike() {
    const COUNT: usize = 1000;
    let mut guest = Guest::new(Layout::Whole);
    guest.handle.listen(7);
    let mut streams: Vec<_> = (0..COUNT).map(|_| guest.connect(7)).collect();
    for (_, stream) in &mut streams {
        let mut host = UnixStream::from(stream.try_clone().unwrap());
        host.write_all(&[1; 20_000]).unwrap();
    }
    // Nobody gets its fourth turn before everybody had one; several packets may be one turn.
    let mut seen = HashSet::new();
    let mut most = std::collections::HashMap::<u32, usize>::new();
    while seen.len() < COUNT {
        let (header, payload) = guest.receive();
        if header.operation == Operation::Data as u16 {
            seen.insert(header.dst_port);
            *most.entry(header.dst_port).or_default() += payload.len();
        }
    }
    let greedy = most.values().max().unwrap();
    assert!(*greedy <= 20_000, "{greedy} bytes of one before the last had any");
    for (connection, stream) in streams {
        guest.write(connection, &connection.guest.to_le_bytes());
        let mut found = [0; 4];
        UnixStream::from(stream).read_exact(&mut found).unwrap();
        assert_eq!(u32::from_le_bytes(found), connection.guest);
    }
}

#[test]
fn a_connection_made_before_the_driver_is_there_is_not_lost() {
    let mut guest = Guest::absent(Layout::Whole);
    let (mut host, given) = streams(Kind::Unix);
    host.write_all(b"early").unwrap();
    host.shut(Shutdown::Write);
    guest.handle.connect(9, None, given);
    guest.activate();
    // Some drivers reset the device once before they use it.
    guest.reset();
    guest.activate();
    guest.give_buffers();
    let (request, _) = guest.expect(Operation::Request);
    let connection = Connection { guest: 9, host: request.src_port };
    guest.say(connection, Operation::Response, 0);
    assert_eq!(guest.read_to_end(connection), b"early");
}

#[test]
fn a_reset_of_the_device_ends_its_connections_and_new_ones_work() {
    let mut guest = Guest::new(Layout::Whole);
    for _ in 0..3 {
        let (mut host, given) = streams(Kind::Unix);
        let connection = guest.accept(given);
        guest.write(connection, b"last words");
        host.read_exact(&mut [0; 10]).unwrap();
        host.write_all(&[0; 50_000]).unwrap();
        guest.reset();
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)), "the stream outlived the driver");
        guest.activate();
        guest.give_buffers();
    }
    let (mut host, given) = streams(Kind::Unix);
    guest.accept(given);
    host.write_all(b"again").unwrap();
    assert_eq!(guest.expect(Operation::Data).1, b"again");
    assert_eq!(guest.handle.counts().open, 1);
}

#[rstest::rstest]
fn a_host_that_vanishes_is_seen_by_the_guest(#[values(Kind::Unix, Kind::Tcp)] kind: Kind) {
    let mut guest = Guest::new(Layout::Whole);
    let (host, given) = streams(kind);
    let connection = guest.accept(given);
    drop(host);
    let mut flags = 0;
    while flags & SHUTDOWN_SEND == 0 {
        flags |= guest.expect(Operation::Shutdown).0.flags;
    }
    // A socket tells only by refusing that it takes nothing any more.
    while flags != SHUTDOWN_BOTH {
        guest.write(connection, b"into the void");
        if let Some((header, _)) = guest.receive_within(Duration::from_millis(20)) {
            assert_eq!(header.operation, Operation::Shutdown as u16);
            flags |= header.flags;
        }
    }
    guest.say(connection, Operation::Reset, 0);
}

#[test]
fn a_packet_that_lies_about_its_length_costs_only_its_own_connection() {
    let mut guest = Guest::new(Layout::HeaderApart);
    let (mut good_host, good) = streams(Kind::Unix);
    let (mut bad_host, bad) = streams(Kind::Unix);
    let (good, bad) = (guest.accept(good), guest.accept(bad));
    let lie = Header { len: u32::MAX, ..guest.header(bad, Operation::Data) };
    guest.send(&lie, b"short");
    guest.expect(Operation::Reset);
    assert_eq!(bad_host.read(&mut [0]).unwrap(), 0);
    guest.write(good, b"fine");
    let mut found = [0; 4];
    good_host.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"fine");
    assert_eq!(guest.signals.status.load(Ordering::SeqCst), 0);
}

#[test]
fn more_than_the_credit_is_a_reset() {
    let mut guest = Guest::new(Layout::Whole);
    let (_host, given) = streams(Kind::Unix);
    let connection = guest.accept(given);
    // Nobody reads: a socket holds some of it, the device as much as it promised.
    for _ in 0..40 {
        guest.write(connection, &[0; 60_000]);
    }
    while guest.receive().0.operation != Operation::Reset as u16 {}
}

#[test]
fn what_is_no_stream_is_refused_without_harm() {
    let mut guest = Guest::new(Layout::Whole);
    guest.handle.connect(9, None, tempfile::tempfile().unwrap().into());
    let (mut host, given) = streams(Kind::Unix);
    host.write_all(b"next").unwrap();
    guest.accept(given);
    assert_eq!(guest.expect(Operation::Data).1, b"next");
}
