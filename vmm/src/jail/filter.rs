//! The system calls that each kind of thread may make; see `coracle_worker::jail::filter` for what becomes of others.
//!
//! The main thread begins with everything that any thread will need, since threads inherit its filter; each then narrows
//! itself, the main thread too, when the machine is built.

use std::io;

use coracle_worker::jail::filter::{self, ALL, Call, always, runtime};

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The process before its machine is built: everything below.
    Main,
    /// The main thread after that: it serves the control socket.
    Server,
    Processor,
    /// The vsock device.
    Streams,
    /// A block device.
    Disk,
    /// The conversation with the file server.
    Files,
    /// A device that only answers requests: rng, balloon.
    Simple,
}

/// `ioctl`s of KVM have this type.
const KVM: u64 = 0xae << 8;

impl Role {
    fn calls(self) -> Vec<Call> {
        let mut calls = runtime();
        match self {
            Self::Main => {
                calls.extend(server());
                calls.extend(builder());
                calls.extend(processor());
                calls.extend(streams());
                calls.extend(disk());
                calls.extend(files());
                calls.extend(simple());
            }
            Self::Server => calls.extend(server()),
            Self::Processor => calls.extend(processor()),
            Self::Streams => calls.extend(streams()),
            Self::Disk => calls.extend(disk()),
            Self::Files => calls.extend(files()),
            Self::Simple => calls.extend(simple()),
        }
        calls
    }
}

/// The control socket, files that are looked at when they arrive, and the end of the conversation with the file server.
fn server() -> Vec<Call> {
    always(&[
        libc::SYS_accept4,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
    ])
    .chain([Call(libc::SYS_ioctl, vec![vec![(1, ALL, libc::FIONBIO)]])])
    .collect()
}

/// Building a machine: threads (and no processes), events, the kernel's file, memory that is shared, the file server's socket, KVM.
fn builder() -> Vec<Call> {
    const THREAD: u64 = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
    // In the order of KVM's numbers: create machine, check extension, size of a processor's state, supported CPUID, create
    // processor, memory, task state, identity map, interrupt controllers, irqfd, timer, ioeventfd, registers, MSRs, FPU, local
    // interrupt controller, CPUID.
    const NUMBERS: [u64; 20] = [
        0x01, 0x03, 0x04, 0x05, 0x41, 0x46, 0x47, 0x48, 0x60, 0x76, 0x77, 0x79, 0x82, 0x83, 0x84, 0x89, 0x8d,
        0x8e, 0x8f, 0x90,
    ];
    let kvm = NUMBERS.map(|number| vec![(1, 0xffff, KVM | number)]).to_vec();
    let mut calls = vec![
        Call(libc::SYS_ioctl, kvm),
        Call(libc::SYS_clone, vec![vec![(0, THREAD, THREAD)]]),
        // Answered with ENOSYS by a filter of its own: its flags cannot be looked at, and libc then uses `clone`.
        Call(libc::SYS_clone3, Vec::new()),
        // Memory of a fixed size: what is in it is not executable, and nothing here executes.
        Call(
            libc::SYS_memfd_create,
            [SEALABLE, SEALABLE | libc::MFD_NOEXEC_SEAL]
                .map(|flags| vec![(1, ALL, u64::from(flags))])
                .to_vec(),
        ),
        Call(libc::SYS_fcntl, vec![vec![(1, ALL, libc::F_ADD_SEALS as u64)]]),
        Call(libc::SYS_getsockopt, vec![vec![(1, ALL, libc::SOL_SOCKET as u64)]]),
    ];
    calls.extend(always(&[libc::SYS_eventfd2, libc::SYS_pread64, libc::SYS_sysinfo, libc::SYS_ftruncate]));
    calls
}

const SEALABLE: libc::c_uint = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;

/// Run, read registers (for a report of what went wrong), tell the guest's clock of a pause; give up a file server that hangs.
fn processor() -> Vec<Call> {
    let mut calls = vec![Call(
        libc::SYS_ioctl,
        [0x80, 0x81, 0xad].map(|number| vec![(1, 0xffff, KVM | number)]).to_vec(),
    )];
    calls.extend(always(&[libc::SYS_shutdown]));
    calls
}

/// Streams of others, and new ones between this process and others: never a socket with an address.
fn streams() -> Vec<Call> {
    always(&[
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_readv,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_shutdown,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
    ])
    .chain([
        Call(libc::SYS_socketpair, vec![vec![(0, ALL, libc::AF_UNIX as u64)]]),
        // A connection that the guest has reset is closed so that its other end sees that.
        Call(
            libc::SYS_setsockopt,
            vec![vec![(1, ALL, libc::SOL_SOCKET as u64), (2, ALL, libc::SO_LINGER as u64)]],
        ),
    ])
    .collect()
}

/// Positions in files, and the ring, which restricts itself.
fn disk() -> Vec<Call> {
    always(&[
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_pwrite64,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_io_uring_enter,
    ])
    .collect()
}

/// A socket that is there already.
fn files() -> Vec<Call> {
    always(&[libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_shutdown]).collect()
}

fn simple() -> Vec<Call> {
    Vec::new()
}

/// Takes from this thread, and from those that it starts, every system call that its role does not need.
pub(crate) fn narrow(role: Role) -> io::Result<()> {
    if role == Role::Main {
        filter::hide_clone3()?;
    }
    filter::install(role.calls())
}
