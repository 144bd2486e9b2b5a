//! Filters of system calls. A call that is not listed fails with EPERM: the code here copes with errors
//! from the system, so that a libc that wants something harmless costs nothing, and code of somebody else's gets nothing.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// A system call, and what must hold of its arguments; any of the rules is enough, and none at all means always.
#[derive(Debug)]
pub struct Call(pub i64, pub Vec<Vec<Condition>>);

/// The argument's number, a mask, and what must be left of it.
pub type Condition = (u8, u64, u64);

/// The mask for an argument of 32 bits that must be exactly this.
pub const ALL: u64 = u64::MAX;

const EXECUTABLE: Condition = (2, libc::PROT_EXEC as u64, 0);

/// Calls that are allowed whatever their arguments.
pub fn always(numbers: &[i64]) -> impl Iterator<Item = Call> {
    numbers.iter().map(|number| Call(*number, Vec::new()))
}

/// What the standard library and libc do in any thread: memory, locks, logs, clocks, the thread's own end, and kicks and panics, which
/// signal a thread of this process.
pub fn runtime() -> Vec<Call> {
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

/// Answers `clone3` with ENOSYS: its flags cannot be looked at, and libc then uses `clone`.
///
/// # Errors
/// Where the system takes no filter.
pub fn hide_clone3() -> io::Result<()> {
    let unknown = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    install_rules(unknown, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

/// Takes from this thread, and from those that it starts, every system call but these.
///
/// # Errors
/// Where the system takes no filter.
pub fn install(calls: Vec<Call>) -> io::Result<()> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for Call(number, alternatives) in calls {
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
    install_rules(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
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

fn install_rules(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matches: SeccompAction,
) -> io::Result<()> {
    let filter =
        SeccompFilter::new(rules, mismatch, matches, TargetArch::x86_64).map_err(io::Error::other)?;
    let program: BpfProgram = filter.try_into().map_err(|error| io::Error::other(format!("{error}")))?;
    apply_filter(&program).map_err(io::Error::other)
}
