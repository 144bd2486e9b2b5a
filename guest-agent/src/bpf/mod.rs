//! BPF programs of cgroups, and the ring buffer that they write to. Everything unsafe about it is in this file; each
//! function is safe to call as its documentation says.
#![allow(unsafe_code)]

pub(crate) mod assembler;

use std::ffi::{c_int, c_long};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use assembler::Instruction;

const MAP_CREATE: c_int = 0;
const PROG_LOAD: c_int = 5;
const PROG_ATTACH: c_int = 8;
const MAP_TYPE_RINGBUF: u32 = 27;
const ALLOW_MULTI: u32 = 2;
/// In a record's header: it is still being written, or was given up.
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const RECORD_HEADER: usize = 8;

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

#[repr(C)]
struct ProgAttach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Calls bpf(2) with a structure that begins as the command's part of `union bpf_attr` does.
///
/// # Safety
/// What the structure points to must be valid for the command.
unsafe fn bpf<T>(command: c_int, attr: &T) -> io::Result<c_long> {
    // SAFETY: the structure has the size that is passed; for the rest the caller answers.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor that the kernel has just made.
fn owned(fd: c_long) -> OwnedFd {
    // SAFETY: bpf(2) gave this descriptor to its caller, who gives it here and nowhere else.
    unsafe { OwnedFd::from_raw_fd(fd as c_int) }
}

/// What a program of a cgroup is asked for; see linux/bpf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// It decides about the use of devices.
    Devices,
    /// It hears of events of TCP sockets.
    Sockets,
}

impl Purpose {
    /// `BPF_PROG_TYPE_…`
    fn program_type(self) -> u32 {
        match self {
            Self::Devices => 15,
            Self::Sockets => 13,
        }
    }

    /// `BPF_CGROUP_…`
    fn attach_type(self) -> u32 {
        match self {
            Self::Devices => 6,
            Self::Sockets => 3,
        }
    }
}

/// Loads a program.
pub(crate) fn load(purpose: Purpose, program: &[Instruction]) -> io::Result<OwnedFd> {
    let instructions: Vec<u64> = program.iter().map(|instruction| instruction.pack()).collect();
    let attr = ProgLoad {
        prog_type: purpose.program_type(),
        insn_cnt: u32::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        insns: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    // SAFETY: the instructions and the licence outlive the call; the kernel checks the program.
    unsafe { bpf(PROG_LOAD, &attr) }.map(owned)
}

/// Has a program asked in a cgroup, and in those below it, for as long as the cgroup exists.
pub(crate) fn attach(purpose: Purpose, cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attr = ProgAttach {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: purpose.attach_type(),
        attach_flags: ALLOW_MULTI,
    };
    // SAFETY: the structure holds descriptors that are open during the call, and no pointer.
    unsafe { bpf(PROG_ATTACH, &attr) }.map(drop)
}

/// A ring buffer that programs write records to. It has one reader, which this is.
#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    /// How far the reader is; a page of its own.
    consumer: *mut libc::c_void,
    /// How far the writers are; a page of its own, with the data after it, twice in a row so that no record is in two pieces.
    producer: *mut libc::c_void,
    size: usize,
}

// SAFETY: the mappings belong to this object alone, and `read` takes it exclusively.
unsafe impl Send for Ring {}

impl Ring {
    /// One with room for `size` bytes, a power of two and a multiple of the page size.
    pub(crate) fn new(size: u32) -> io::Result<Self> {
        let attr = MapCreate {
            map_type: MAP_TYPE_RINGBUF,
            key_size: 0,
            value_size: 0,
            max_entries: size,
            map_flags: 0,
        };
        // SAFETY: the structure holds no pointer.
        let fd = unsafe { bpf(MAP_CREATE, &attr) }.map(owned)?;
        let size = size as usize;
        let page = rustix::param::page_size();
        let map = |len: usize, protection: c_int, offset: usize| {
            let null = std::ptr::null_mut();
            let offset = offset as libc::off_t;
            // SAFETY: a new mapping of a descriptor that is open; nothing else is at the place that the kernel chooses.
            let at = unsafe { libc::mmap(null, len, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
            if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
        };
        let consumer = map(page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        match map(page + 2 * size, libc::PROT_READ, page) {
            Ok(producer) => Ok(Self { fd, consumer, producer, size }),
            Err(error) => {
                // SAFETY: the mapping was made above with this length, and no one uses it.
                unsafe { libc::munmap(consumer, page) };
                Err(error)
            }
        }
    }

    /// Takes the records that are there, a ring full of them at most, however fast they are written; whether there may be more.
    pub(crate) fn read(&mut self, mut take: impl FnMut(&[u8])) -> bool {
        let page = rustix::param::page_size();
        // SAFETY: both pages begin with an aligned u64 that the kernel and this reader use atomically.
        let (consumer, producer) =
            unsafe { (AtomicU64::from_ptr(self.consumer.cast()), AtomicU64::from_ptr(self.producer.cast())) };
        let mut at = consumer.load(Ordering::Relaxed);
        let enough = at.saturating_add(self.size as u64);
        while at < producer.load(Ordering::Acquire) {
            if at >= enough {
                return true;
            }
            let offset = page + (at as usize & (self.size - 1));
            // SAFETY: the kernel keeps positions at multiples of 8 below the end of the data, which is mapped twice; the header's
            // first word is aligned and only the kernel writes it, atomically.
            let header =
                unsafe { AtomicU32::from_ptr(self.producer.byte_add(offset).cast()) }.load(Ordering::Acquire);
            if header & BUSY != 0 {
                break;
            }
            let len = (header & !DISCARDED) as usize;
            if len > self.size - RECORD_HEADER {
                break;
            }
            if header & DISCARDED == 0 {
                // SAFETY: a finished record lies whole in the doubled mapping, and its bytes do not change until the consumer's
                // position passes it.
                take(unsafe {
                    std::slice::from_raw_parts(self.producer.byte_add(offset + RECORD_HEADER).cast(), len)
                });
            }
            at += (RECORD_HEADER + len).next_multiple_of(8) as u64;
            consumer.store(at, Ordering::Release);
        }
        false
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let page = rustix::param::page_size();
        // SAFETY: the mappings were made with these lengths and are used through this object only.
        unsafe {
            libc::munmap(self.consumer, page);
            libc::munmap(self.producer, page + 2 * self.size);
        }
    }
}

/// The number by which the kernel tells network namespaces apart: that of a socket's.
pub(crate) fn network_cookie(socket: impl AsFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: c_int = 71;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into a variable of that size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
