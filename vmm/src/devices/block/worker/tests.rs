//! The disk's thread against a driver, with io_uring and without: the two must not differ in anything but speed.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::super::tests::ring::{BUFFERS, Ring as DriverRing, WRITABLE};
use super::super::super::worker::{Commands, spawn};
use super::super::super::{COMMON_FEATURES, STATUS_NEEDS_RESET, Signals};
use super::super::{DataDisk, FEATURE_FLUSH};
use super::*;
use crate::jail::Role;
use crate::memory;
use crate::sys::borrow_event;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const CAPACITY: u64 = 8 << 20;
const LEN: u32 = 64 << 10;
/// Each request has its header, its status and its data at a place of its own.
const HEADERS: u64 = 0x1_0000;
const STATUSES: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;

struct Driver {
    memory: Memory,
    ring: DriverRing,
    kick: Arc<EventFd>,
    line: EventFd,
    signals: Arc<Signals>,
    commands: Commands<()>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    fn new(file: OwnedFd, way: Way) -> Self {
        let requests = Requests::new(DataDisk::new(file, CAPACITY).unwrap());
        let (commands, thread) = spawn("disk", Role::Disk, move |inbox| run(&inbox, requests, way)).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let driver = Self {
            memory: memory::allocate(&[(GuestAddress(0), 16 << 20)]).unwrap(),
            ring: DriverRing::new(0),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            signals: Arc::new(Signals::new(line.try_clone().unwrap())),
            line,
            commands,
            thread: Some(thread),
        };
        driver.activate();
        driver
    }

    fn activate(&self) {
        self.commands.send(Command::Activate(Activation {
            memory: self.memory.clone(),
            queues: vec![ActiveQueue { queue: self.ring.device_side(true), kick: Arc::clone(&self.kick) }],
            features: COMMON_FEATURES | FEATURE_FLUSH,
            signals: Arc::clone(&self.signals),
        }));
    }

    fn data(&self, buffer: u16) -> GuestAddress {
        GuestAddress(DATA + u64::from(buffer) * u64::from(LEN))
    }

    fn offer(&mut self, buffer: u16, kind: u32, sector: u64, len: u32) {
        let header = HEADERS + 16 * u64::from(buffer);
        let status = STATUSES + u64::from(buffer);
        self.memory.write_obj(kind, GuestAddress(header)).unwrap();
        self.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        self.memory.write_obj(0xeeu8, GuestAddress(status)).unwrap();
        let mut parts = vec![(header, 16, 0)];
        if len > 0 {
            parts.push((self.data(buffer).0, len, if kind == IN { WRITABLE } else { 0 }));
        }
        parts.push((status, 1, WRITABLE));
        self.ring.offer_chain(&self.memory, buffer, &parts, buffer.is_multiple_of(2));
    }

    /// The next answered request: its buffer and its status.
    fn answer(&mut self) -> (u16, u8) {
        loop {
            if let Some((buffer, _)) = self.ring.take_used(&self.memory) {
                let status = GuestAddress(STATUSES + u64::from(buffer));
                return (buffer, self.memory.read_obj(status).unwrap());
            }
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        let mut polled = [PollFd::from_borrowed_fd(borrow_event(&self.line), PollFlags::IN)];
        let patience = Timespec::try_from(Duration::from_secs(30)).unwrap();
        assert!(poll(&mut polled, Some(&patience)).unwrap() > 0, "the disk does not answer");
        let _ = self.line.read();
    }

    fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    fn request(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        self.offer(0, kind, sector, len);
        self.kick();
        self.answer().1
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.commands.send(Command::Stop);
        let ended = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || ended.is_ok());
    }
}

fn file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(CAPACITY).unwrap();
    file
}

fn content(buffer: u16) -> Vec<u8> {
    (0..LEN).map(|i| (i.wrapping_mul(31) >> 3) as u8 ^ buffer as u8).collect()
}

#[rstest::rstest]
fn a_queue_full_of_requests_is_answered_each_with_its_own_data(
    #[values(Way::SideBySide, Way::OneByOne)] way: Way,
) {
    let file = file();
    let mut driver = Driver::new(file.try_clone().unwrap().into(), way);
    for kind in [OUT, IN] {
        for buffer in 0..BUFFERS {
            let start = if kind == OUT { content(buffer) } else { vec![0; LEN as usize] };
            driver.memory.write_slice(&start, driver.data(buffer)).unwrap();
            driver.offer(buffer, kind, u64::from(buffer) * u64::from(LEN) / 512, LEN);
        }
        driver.kick();
        let mut answered: Vec<_> = (0..BUFFERS).map(|_| driver.answer()).collect();
        answered.sort_unstable();
        assert!(answered.iter().zip(0..BUFFERS).all(|(answer, buffer)| *answer == (buffer, 0)));
    }
    for buffer in 0..BUFFERS {
        let mut found = vec![0; LEN as usize];
        driver.memory.read_slice(&mut found, driver.data(buffer)).unwrap();
        assert!(found == content(buffer), "request {buffer} has other data");
        file.read_exact_at(&mut found, u64::from(buffer) * u64::from(LEN)).unwrap();
        assert!(found == content(buffer));
    }
    assert_eq!(driver.request(FLUSH, 0, 0), 0);
}

#[rstest::rstest]
fn a_disk_that_shrinks_or_refuses_gives_errors_and_lives_on(
    #[values(Way::SideBySide, Way::OneByOne)] way: Way,
) {
    let file = file();
    let mut driver = Driver::new(file.try_clone().unwrap().into(), way);
    assert_eq!(driver.request(IN, 0, LEN), 0);
    file.set_len(4096 + 512).unwrap();
    assert_eq!(driver.request(IN, 8, 4096), 1);
    assert_eq!(driver.request(IN, 0, 4096), 0);
    file.set_len(CAPACITY).unwrap();
    assert_eq!(driver.request(IN, 8, 4096), 0);
    // A file that cannot be written to any more.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let mut driver = Driver::new(File::open(path).unwrap().into(), way);
    assert_eq!(driver.request(OUT, 0, 4096), 1);
    assert_eq!(driver.request(IN, 0, 4096), 0);
    assert_eq!(driver.signals.status.load(Ordering::SeqCst), 0);
}

#[rstest::rstest]
fn a_reset_in_mid_flight_is_clean(#[values(Way::SideBySide, Way::OneByOne)] way: Way) {
    let mut driver = Driver::new(file().into(), way);
    for _ in 0..50 {
        for buffer in 0..BUFFERS {
            driver.offer(buffer, if buffer % 3 == 0 { OUT } else { IN }, u64::from(buffer), LEN);
        }
        driver.kick();
        driver.commands.reset();
        // Nothing touches guest memory from here on.
        let address = driver.data(0);
        let zeroes = vec![0; usize::from(BUFFERS) * LEN as usize];
        driver.memory.write_slice(&zeroes, address).unwrap();
        let mut found = vec![1; zeroes.len()];
        driver.memory.read_slice(&mut found, address).unwrap();
        assert!(found == zeroes);
        driver.ring.clear(&driver.memory);
        let _ = driver.kick.read();
        driver.activate();
        assert_eq!(driver.request(IN, 0, 512), 0);
        driver.commands.reset();
        driver.ring.clear(&driver.memory);
        driver.activate();
    }
}

#[rstest::rstest]
fn a_driver_that_breaks_the_rules_must_reset_the_disk(#[values(Way::SideBySide, Way::OneByOne)] way: Way) {
    let mut driver = Driver::new(file().into(), way);
    driver.offer(1, IN, 0, LEN);
    // No place for the status.
    driver.ring.offer_chain(&driver.memory, 2, &[(HEADERS, 16, 0)], false);
    driver.kick();
    while driver.signals.status.load(Ordering::SeqCst) & STATUS_NEEDS_RESET == 0 {
        driver.interrupt();
    }
    driver.commands.reset();
    driver.ring.clear(&driver.memory);
    driver.activate();
    assert_eq!(driver.request(IN, 0, 512), 0);
}
