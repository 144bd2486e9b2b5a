//! The device between a driver and a server: one that is the real thing but for its process, and ones that misbehave.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

use coracle_file_server::control::{Grant, GrantId, GrantKind, Owners};
use coracle_file_server::fs::{Exported, Identity, Proc};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::super::tests::ring::{Ring, WRITABLE};
use super::super::{ActiveQueue, COMMON_FEATURES, STATUS_NEEDS_RESET, Signals};
use super::*;
use crate::memory::{self, Memory};
use crate::sys::borrow_event;

const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x20_0000;
const REPLY_LEN: u32 = 0x1_0000;
const FUSE_LOOKUP: u32 = 1;
const FUSE_INIT: u32 = 26;

/// A device whose server exports nothing.
pub(crate) fn with_real_server() -> (Fs, impl Fn(), JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    serve(theirs);
    Fs::new(ours.into(), 2).unwrap()
}

/// The real server without its process: what it exports, and its thread.
fn serve(frontend: UnixStream) -> (Arc<Exported>, JoinHandle<()>) {
    let files = Arc::new(Exported::new(Proc::ABSOLUTE, Identity::of_process().unwrap(), 1024));
    let exported = Arc::clone(&files);
    let serve = move || coracle_file_server::device::serve(files, frontend).unwrap();
    (exported, std::thread::spawn(serve))
}

fn grant(files: &Exported, name: &str, path: &Path) {
    let tree = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let id = GrantId::try_from(name.to_owned()).unwrap();
    let owners = Owners::Kept { uid: 0, gid: 0 };
    files.grant(Grant { id, kind: GrantKind::Directory, read_only: false, owners }, tree).unwrap();
}

/// A guest's driver.
struct Driver {
    fs: Fs,
    stop: Box<dyn Fn()>,
    thread: Option<JoinHandle<()>>,
    memory: Memory,
    rings: [Ring; 2],
    kicks: Vec<Arc<EventFd>>,
    line: EventFd,
    signals: Arc<Signals>,
}

impl Driver {
    fn new(socket: UnixStream) -> Self {
        let (fs, stop, thread) = Fs::new(socket.into(), 1).unwrap();
        assert_eq!(fs.queue_sizes().len(), 2);
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            fs,
            stop: Box::new(stop),
            thread: Some(thread),
            memory: memory::allocate_shared(&[(GuestAddress(0), 12 << 20), (GuestAddress(1 << 32), 2 << 20)])
                .unwrap(),
            rings: [Ring::new(0), Ring::new(1)],
            kicks: (0..2).map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())).collect(),
            signals: Arc::new(Signals::new(line.try_clone().unwrap())),
            line,
        }
    }

    fn activate(&mut self) {
        self.rings.iter_mut().for_each(|ring| ring.clear(&self.memory));
        let pairs = self.rings.iter().zip(&self.kicks);
        let queues = pairs
            .map(|(ring, kick)| ActiveQueue { queue: ring.device_side(true), kick: Arc::clone(kick) })
            .collect();
        self.fs.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: COMMON_FEATURES,
            signals: Arc::clone(&self.signals),
        });
    }

    fn reset(&mut self) {
        self.fs.reset();
        self.signals.reset();
    }

    /// Sends a FUSE message; the error and what follows the header.
    fn ask(&mut self, operation: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let len = 40 + body.len() as u32;
        let numbers = [len.to_le_bytes(), operation.to_le_bytes()];
        let message = [numbers.as_flattened(), &7u64.to_le_bytes(), &node.to_le_bytes(), &[0; 16], body];
        self.memory.write_slice(&message.concat(), GuestAddress(REQUEST)).unwrap();
        let parts = [(REQUEST, len, 0), (REPLY, REPLY_LEN, WRITABLE)];
        // It asks for an interrupt before it looks.
        assert_eq!(self.rings[1].take_used(&self.memory), None);
        self.rings[1].offer_chain(&self.memory, 0, &parts, true);
        self.kicks[1].write(1).unwrap();
        let (_, written) = loop {
            if let Some(used) = self.rings[1].take_used(&self.memory) {
                break used;
            }
            self.interrupt();
            assert_eq!(self.signals.pending() & 1, 1, "an interrupt without a reason");
        };
        let mut reply = vec![0; written as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        (i32::from_le_bytes(reply[4..8].try_into().unwrap()), reply.split_off(16))
    }

    fn init(&mut self) {
        let body = [7u32, 38, 0x2_0000, 0].map(u32::to_le_bytes);
        assert_eq!(self.ask(FUSE_INIT, 0, body.as_flattened()).0, 0);
    }

    fn expect_refusals(&mut self) {
        for _ in 0..3 {
            assert_eq!(self.ask(FUSE_LOOKUP, 1, b"name\0").0, -libc::ENOTCONN);
        }
    }

    fn look_up(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let (error, reply) = self.ask(FUSE_LOOKUP, parent, &[name.as_bytes(), b"\0"].concat());
        if error == 0 { Ok(u64::from_le_bytes(reply[..8].try_into().unwrap())) } else { Err(-error) }
    }

    fn interrupt(&self) {
        let mut polled = [PollFd::from_borrowed_fd(borrow_event(&self.line), PollFlags::IN)];
        let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
        assert!(poll(&mut polled, Some(&patience)).unwrap() > 0, "there is no interrupt");
        let _ = self.line.read();
    }

    /// Waits until the driver is told that the device does nothing more.
    fn expect_broken(&self) {
        while self.signals.status.load(Ordering::SeqCst) & STATUS_NEEDS_RESET == 0 {
            self.interrupt();
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        (self.stop)();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

#[test]
fn a_driver_sees_what_is_granted_and_may_reset_the_device_and_go_on() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (files, _) = serve(theirs);
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("inside")).unwrap();
    grant(&files, "tree", folder.path());
    let mut driver = Driver::new(ours);
    assert_eq!((driver.fs.device_type(), &driver.fs.config()[..8]), (26, &b"coracle\0"[..]));
    assert_eq!(driver.fs.config()[36..], 1u32.to_le_bytes());
    for _ in 0..3 {
        driver.activate();
        driver.init();
        let tree = driver.look_up(1, "tree").unwrap();
        assert!(driver.look_up(tree, "inside").is_ok());
        assert_eq!(driver.look_up(tree, "outside"), Err(libc::ENOENT));
        driver.reset();
        // An interrupt may have come for what was seen already; nobody looks at the rings now.
        let _ = driver.line.read();
        driver.kicks[1].write(1).unwrap();
        assert!(driver.line.read().is_err());
        driver.kicks[1].read().unwrap();
    }
}

#[test]
fn a_driver_that_breaks_a_ring_is_told_so_and_may_begin_anew() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    serve(theirs);
    let mut driver = Driver::new(ours);
    for _ in 0..2 {
        driver.activate();
        driver.init();
        // More than the ring holds.
        driver.memory.write_obj(1000u16, GuestAddress(0x5000 + 0x1000 + 2)).unwrap();
        driver.kicks[1].write(1).unwrap();
        driver.expect_broken();
        driver.reset();
    }
}

#[test]
fn a_descriptor_that_is_no_stream_is_refused() {
    let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for fd in [OwnedFd::from(datagrams), file.into(), listener.into()] {
        assert!(matches!(Fs::new(fd, 1), Err(FsError::NotAStream)));
    }
}

/// A request as it came: what, its body, and its descriptors.
type Asked = (u32, Vec<u8>, Vec<OwnedFd>);

/// The next request, or none after the end.
fn next(stream: &UnixStream) -> Option<Asked> {
    let mut header = [0; 12];
    let fds = receive(stream, &mut header)?;
    let size = u32::from_ne_bytes(header[8..].try_into().unwrap());
    let mut body = vec![0; size as usize];
    receive(stream, &mut body)?;
    Some((u32::from_ne_bytes(header[..4].try_into().unwrap()), body, fds))
}

fn receive(stream: &UnixStream, buffer: &mut [u8]) -> Option<Vec<OwnedFd>> {
    let (mut done, mut fds) = (0, Vec::new());
    while done < buffer.len() {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [std::io::IoSliceMut::new(&mut buffer[done..])];
        match recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) if message.bytes == 0 => return None,
            Ok(message) => done += message.bytes,
            Err(Errno::CONNRESET) => return None,
            Err(error) => panic!("{error}"),
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
    }
    Some(fds)
}

fn reply(mut stream: &UnixStream, request: u32, body: &[u8]) {
    let header = [request, 5, body.len() as u32].map(u32::to_ne_bytes);
    // The other end may have had enough.
    let _ = stream.write_all(&[header.as_flattened(), body].concat());
}

/// What a server that does its work answers.
fn right(stream: &UnixStream, (request, body, _): &Asked) {
    let number = match *request {
        code if code == FrontendReq::SET_PROTOCOL_FEATURES as u32 => return,
        code if code == FrontendReq::GET_VRING_BASE as u32 => return reply(stream, *request, body),
        code if code == FrontendReq::GET_FEATURES as u32 => COMMON_FEATURES | 1 << 30,
        code if code == FrontendReq::GET_PROTOCOL_FEATURES as u32 => 0b1_0000_0000_1001,
        code if code == FrontendReq::GET_QUEUE_NUM as u32 => 9,
        _ => 0,
    };
    reply(stream, *request, &number.to_ne_bytes());
}

/// What a server does when it is asked for `fault`.
#[derive(Debug, Clone, Copy)]
enum Fault {
    HangUp,
    Hang,
    Refuse,
    AnswerOther,
    AnswerLong,
    Garbage,
}

/// A server that works until it is asked for something; what it was asked.
fn faulty(stream: UnixStream, request: FrontendReq, fault: Fault) -> Receiver<Asked> {
    let (tell, asked) = channel();
    std::thread::spawn(move || {
        while let Some(message) = next(&stream) {
            if message.0 != request as u32 {
                right(&stream, &message);
            } else {
                match fault {
                    Fault::HangUp => return,
                    Fault::Hang => {}
                    Fault::Refuse => reply(&stream, message.0, &1u64.to_ne_bytes()),
                    Fault::AnswerOther => reply(&stream, message.0 + 1, &0u64.to_ne_bytes()),
                    Fault::AnswerLong => reply(&stream, message.0, &[0; 16]),
                    Fault::Garbage => {
                        let _ = (&stream).write_all(&[0xff; 64]);
                    }
                }
            }
            if tell.send(message).is_err() {
                return;
            }
        }
    });
    asked
}

#[test]
fn the_server_is_told_everything_in_order() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let asked = faulty(theirs, FrontendReq::SET_LOG_BASE, Fault::Hang);
    let mut driver = Driver::new(ours);
    driver.activate();
    driver.reset();
    drop(driver);
    let asked: Vec<_> = asked.iter().collect();
    use FrontendReq as F;
    let ring = [
        F::SET_VRING_NUM,
        F::SET_VRING_ADDR,
        F::SET_VRING_BASE,
        F::SET_VRING_ERR,
        F::SET_VRING_CALL,
        F::SET_VRING_KICK,
    ];
    let begin =
        [F::GET_FEATURES, F::GET_PROTOCOL_FEATURES, F::SET_PROTOCOL_FEATURES, F::GET_QUEUE_NUM, F::SET_OWNER];
    let memory = [F::SET_FEATURES, F::SET_MEM_TABLE, F::SET_INFLIGHT_FD];
    let end = [F::SET_VRING_ENABLE, F::SET_VRING_ENABLE, F::GET_VRING_BASE, F::GET_VRING_BASE];
    let expected = [&begin[..], &memory, &ring, &ring, &end].concat();
    assert_eq!(asked.iter().map(|asked| asked.0).collect::<Vec<_>>(), expected.map_codes());
    let of = |request: F| asked.iter().find(|asked| asked.0 == request as u32).unwrap();
    // Two regions with their places in the file; the server learns no address of this process.
    let (_, table, files) = of(F::SET_MEM_TABLE);
    let numbers: Vec<u64> = table.as_chunks::<8>().0.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect();
    assert_eq!(numbers, [2, 0, 12 << 20, 0, 0, 1 << 32, 2 << 20, 1 << 32, 12 << 20]);
    let counts = [files, &of(F::SET_VRING_KICK).2, &of(F::SET_VRING_CALL).2].map(Vec::len);
    assert_eq!(counts, [2, 1, 1]);
    assert_eq!(of(F::SET_FEATURES).1, (COMMON_FEATURES | 1 << 30).to_ne_bytes());
}

trait Codes {
    fn map_codes(self) -> Vec<u32>;
}

impl Codes for Vec<FrontendReq> {
    fn map_codes(self) -> Vec<u32> {
        self.into_iter().map(|request| request as u32).collect()
    }
}

#[rstest::rstest]
fn a_server_that_fails_is_given_up_and_every_request_is_refused(
    #[values(
        FrontendReq::GET_FEATURES,
        FrontendReq::GET_QUEUE_NUM,
        FrontendReq::SET_MEM_TABLE,
        FrontendReq::SET_VRING_KICK
    )]
    request: FrontendReq,
    #[values(Fault::HangUp, Fault::Refuse, Fault::AnswerOther, Fault::AnswerLong, Fault::Garbage)]
    fault: Fault,
) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let _asked = faulty(theirs, request, fault);
    let mut driver = Driver::new(ours);
    // Also when the driver tries again.
    for _ in 0..2 {
        driver.activate();
        driver.expect_refusals();
        driver.reset();
    }
}

#[test]
fn a_server_that_dies_later_leaves_refusals() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let to_kill = theirs.try_clone().unwrap();
    let (_, server) = serve(theirs);
    let mut driver = Driver::new(ours);
    driver.activate();
    driver.init();
    to_kill.shutdown(std::net::Shutdown::Both).unwrap();
    server.join().unwrap();
    driver.expect_refusals();
    driver.reset();
    driver.activate();
    driver.expect_refusals();
    // A ring that makes no sense is one here, too.
    driver.memory.write_obj(1000u16, GuestAddress(0x5000 + 0x1000 + 2)).unwrap();
    driver.kicks[1].write(1).unwrap();
    driver.expect_broken();
}

#[test]
fn what_a_server_had_in_hand_when_it_died_is_refused_as_well() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let to_kill = theirs.try_clone().unwrap();
    let asked = faulty(theirs, FrontendReq::SET_LOG_BASE, Fault::Hang);
    let mut driver = Driver::new(ours);
    driver.activate();
    let is = |asked: &Asked, request: FrontendReq| asked.0 == request as u32;
    let (_, _, ledger) = asked.iter().find(|asked| is(asked, FrontendReq::SET_INFLIGHT_FD)).unwrap();
    assert_eq!(asked.iter().filter(|asked| is(asked, FrontendReq::SET_VRING_ENABLE)).take(2).count(), 2);
    // Three requests, of which it took the first two and answered the first. It took them long ago: the driver has offered others since.
    for buffer in 0..3 {
        let (at, reply) = (REQUEST + 64 * u64::from(buffer), REPLY + 64 * u64::from(buffer));
        driver.memory.write_slice(&[buffer as u8; 40], GuestAddress(at)).unwrap();
        driver.rings[1].offer_chain(&driver.memory, buffer, &[(at, 40, 0), (reply, 64, WRITABLE)], true);
    }
    let heads = [0u16, 4, 8];
    let used = driver.rings[1].device_side(true).used_ring();
    driver.memory.write_obj(u32::from(heads[0]), GuestAddress(used + 4)).unwrap();
    driver.memory.write_obj(1u16, GuestAddress(used + 2)).unwrap();
    let ledger = fs::File::from(ledger.into_iter().next().unwrap());
    let region = 16 + 16 * 512;
    let entry = |head: u16| region + 16 + 16 * u64::from(head);
    for (at, bytes) in [(region + 14, 1u16.to_ne_bytes()), (entry(heads[1]), [1, 0])] {
        std::os::unix::fs::FileExt::write_all_at(&ledger, &bytes, at).unwrap();
    }
    to_kill.shutdown(std::net::Shutdown::Both).unwrap();
    let mut answered = Vec::new();
    while answered.len() < 3 {
        match driver.rings[1].take_used(&driver.memory) {
            Some((buffer, _)) => answered.push(buffer),
            None => driver.interrupt(),
        }
    }
    assert_eq!(answered, [0, 1, 2]);
    for buffer in 1..3u64 {
        let error: i32 = driver.memory.read_obj(GuestAddress(REPLY + 64 * buffer + 4)).unwrap();
        let number: u64 = driver.memory.read_obj(GuestAddress(REPLY + 64 * buffer + 8)).unwrap();
        assert_eq!((error, number), (-libc::ENOTCONN, u64::from_ne_bytes([buffer as u8; 8])));
    }
}

#[test]
fn a_server_that_speaks_unasked_is_given_up() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let speaker = theirs.try_clone().unwrap();
    let asked = faulty(theirs, FrontendReq::SET_LOG_BASE, Fault::Hang);
    let mut driver = Driver::new(ours);
    driver.activate();
    let enabled = |asked: &Asked| asked.0 == FrontendReq::SET_VRING_ENABLE as u32;
    assert_eq!(asked.iter().filter(enabled).take(2).count(), 2);
    reply(&speaker, 1, &[0; 8]);
    drop(speaker);
    driver.expect_refusals();
}

#[test]
fn a_driver_does_not_wait_long_for_a_server_that_hangs() {
    for request in [FrontendReq::GET_FEATURES, FrontendReq::SET_FEATURES, FrontendReq::GET_VRING_BASE] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let asked = faulty(theirs, request, Fault::Hang);
        let mut driver = Driver::new(ours);
        driver.fs.reset_limit = Duration::from_millis(100);
        driver.activate();
        // Until it hangs, or is about to.
        let last = match request {
            FrontendReq::GET_VRING_BASE => FrontendReq::SET_VRING_ENABLE,
            request => request,
        };
        assert!(asked.iter().any(|asked| asked.0 == last as u32));
        driver.reset();
        driver.activate();
        driver.expect_refusals();
    }
}

#[test]
fn a_device_whose_server_never_came_can_be_stopped() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    drop(Driver::new(ours));
}
