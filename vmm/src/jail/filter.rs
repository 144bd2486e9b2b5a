//! The system calls that each kind of thread may make. A call that is not listed fails with EPERM: the code here copes with errors
//! from the system, so that a libc that wants something harmless costs nothing, and code of somebody else's gets nothing.
//!
//! The main thread begins with everything that any thread will need, since threads inherit its filter; each then narrows
//! itself, the main thread too, when the machine is built.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

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
    /// A device that only answers requests: rng, balloon.
    Simple,
}

/// A system call, and what must hold of its arguments; any of the rules is enough, and none at all means always.
struct Call(i64, Vec<Vec<Condition>>);

/// The argument's number, a mask, and what must be left of it.
type Condition = (u8, u64, u64);

const EXECUTABLE: Condition = (2, libc::PROT_EXEC as u64, 0);
const ALL: u64 = u64::MAX;
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
                calls.extend(simple());
            }
            Self::Server => calls.extend(server()),
            Self::Processor => calls.extend(processor()),
            Self::Streams => calls.extend(streams()),
            Self::Disk => calls.extend(disk()),
            Self::Simple => calls.extend(simple()),
        }
        calls
    }
}

fn always(numbers: &[i64]) -> impl Iterator<Item = Call> {
    numbers.iter().map(|number| Call(*number, Vec::new()))
}

/// What the standard library and libc do in any thread: memory, locks, logs, clocks, the thread's own end, and kicks and panics, which
/// signal a thread of this process.
fn runtime() -> Vec<Call> {
    let mine = u64::from(std::process::id());
    let mut calls = vec![
        Call(libc::SYS_mmap, vec![vec![EXECUTABLE]]),
        Call(libc::SYS_mprotect, vec![vec![EXECUTABLE]]),
        Call(libc::SYS_tgkill, vec![vec![(0, ALL, mine)]]),
        Call(libc::SYS_prctl, vec![vec![(0, ALL, libc::PR_SET_NAME as u64)]]),
        // A thread may narrow itself further.
        Call(libc::SYS_seccomp, Vec::new()),
        Call(libc::SYS_prctl, vec![vec![(0, ALL, libc::PR_SET_NO_NEW_PRIVS as u64)]]),
        Call(
            libc::SYS_fcntl,
            [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_DUPFD_CLOEXEC]
                .map(|command| vec![(1, ALL, command as u64)])
                .to_vec(),
        ),
    ];
    calls.extend(always(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_close,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_restart_syscall,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_getrandom,
        libc::SYS_poll,
        libc::SYS_ppoll,
    ]));
    calls
}

/// The control socket, and files that are looked at when they arrive.
fn server() -> Vec<Call> {
    always(&[
        libc::SYS_accept4,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
    ])
    .chain([Call(libc::SYS_ioctl, vec![vec![(1, ALL, libc::FIONBIO)]])])
    .collect()
}

/// Building a machine: threads (and no processes), events, the kernel's file, KVM.
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
    ];
    calls.extend(always(&[libc::SYS_eventfd2, libc::SYS_pread64, libc::SYS_sysinfo]));
    calls
}

/// Run, read registers (for a report of what went wrong), tell the guest's clock of a pause.
fn processor() -> Vec<Call> {
    vec![Call(libc::SYS_ioctl, [0x80, 0x81, 0xad].map(|number| vec![(1, 0xffff, KVM | number)]).to_vec())]
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
    .chain([Call(libc::SYS_socketpair, vec![vec![(0, ALL, libc::AF_UNIX as u64)]])])
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

fn simple() -> Vec<Call> {
    Vec::new()
}

/// Takes from this thread, and from those that it starts, every system call that its role does not need.
pub(crate) fn narrow(role: Role) -> io::Result<()> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for Call(number, alternatives) in role.calls() {
        if alternatives.is_empty() {
            unconditional.push(number);
        }
        let compiled =
            alternatives.iter().map(|conditions| rule(conditions)).collect::<Result<Vec<_>, _>>()?;
        rules.entry(number).or_default().extend(compiled);
    }
    for number in unconditional {
        rules.insert(number, Vec::new());
    }
    if role == Role::Main {
        let unknown = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        install(unknown, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    }
    install(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn rule(conditions: &[Condition]) -> io::Result<SeccompRule> {
    let conditions = conditions
        .iter()
        .map(|(argument, mask, value)| {
            // Numbers of 32 bits are compared as such: what stands above them does not reach the kernel's code either.
            let (len, op) = match *mask {
                ALL => (Len::Dword, Op::Eq),
                mask => (Len::Qword, Op::MaskedEq(mask)),
            };
            SeccompCondition::new(*argument, len, op, *value)
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(io::Error::other)?;
    SeccompRule::new(conditions).map_err(io::Error::other)
}

fn install(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matches: SeccompAction,
) -> io::Result<()> {
    let filter =
        SeccompFilter::new(rules, mismatch, matches, TargetArch::x86_64).map_err(io::Error::other)?;
    let program: BpfProgram = filter.try_into().map_err(|error| io::Error::other(format!("{error}")))?;
    apply_filter(&program).map_err(io::Error::other)
}
