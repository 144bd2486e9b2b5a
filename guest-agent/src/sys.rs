//! The system calls that no safe wrapper offers. Everything unsafe of the agent is in this file and in [`crate::bpf`]; each function is safe
//! to call as its documentation says.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_int, c_long};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::UnshareFlags;
use tokio::io::unix::AsyncFd;

use crate::seccomp::{Filter, Instruction};

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Which side of a fork this is.
pub(crate) enum Forked {
    /// The new process.
    Child,
    /// The old one.
    Parent {
        /// The new process's id.
        pid: u32,
    },
}

/// Forks. Only for processes that have one thread (it panics otherwise), so that the child may run any code.
pub(crate) fn fork() -> io::Result<Forked> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    assert_eq!(threads, 1, "fork needs a process with one thread");
    fork_single_threaded()
}

/// As [`fork`], for places where /proc is not the own one; the caller knows that there is one thread.
pub(crate) fn fork_single_threaded() -> io::Result<Forked> {
    // SAFETY: there is no other thread whose locks the child could inherit.
    let pid = check(unsafe { libc::fork() }.into())?;
    Ok(if pid == 0 { Forked::Child } else { Forked::Parent { pid: pid as u32 } })
}

/// libc's constant is too narrow.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// The result of [`clone_into`] in the parent.
pub(crate) struct Cloned {
    /// The child's process id in the caller's pid namespace.
    pub pid: u32,
    /// The child's pidfd.
    pub pidfd: OwnedFd,
}

/// Clones the calling process into a cgroup, as a child of the caller's own parent; `None` in the child. Only the
/// single-threaded fork server calls it, so that the child may run any code.
pub(crate) fn clone_into(cgroup: BorrowedFd<'_>, namespaces: u64) -> io::Result<Option<Cloned>> {
    let mut pidfd: c_int = -1;
    // SAFETY: an all-zero clone_args is a valid value of that plain structure.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | (libc::CLONE_PIDFD | libc::CLONE_PARENT) as u64 | CLONE_INTO_CGROUP;
    args.pidfd = (&raw mut pidfd) as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM and without a stack this is a fork: the child has its own copy of everything. The kernel
    // writes the pidfd into a variable that outlives the call. The caller has one thread.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel made this descriptor for us in the call above and nothing else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Some(Cloned { pid: pid as u32, pidfd }))
}

/// Filters the calling thread's system calls from now on. The thread needs CAP_SYS_ADMIN or no_new_privs.
pub(crate) fn filter_system_calls(filter: &Filter) -> io::Result<()> {
    let convert = |instruction: Instruction| libc::sock_filter {
        code: instruction.code,
        jt: instruction.jump_true,
        jf: instruction.jump_false,
        k: instruction.value,
    };
    let mut program: Vec<libc::sock_filter> = filter.instructions().map(convert).collect();
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let argument = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies and checks the program, which has the length that the argument says and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, mode, filter.flags, &raw const argument) })?;
    Ok(())
}

/// Leaves namespaces, those of the calling thread. Never with `FILES`, and never where another thread counts on sharing them.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the table of file descriptors stays shared, which is what the function warns of.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Executes a program; returns only on failure.
pub(crate) fn execve(program: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer, and the strings they point to live until the call returns.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends the process at once: no destructors, no exit handlers.
pub(crate) fn exit_now(code: u8) -> ! {
    // SAFETY: has no precondition.
    unsafe { libc::_exit(code.into()) }
}

/// Marks every descriptor from `first` up to be closed by `execve`.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: changes flags of descriptors only.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Closes every descriptor. Only for a process that uses none of them again, through no Rust object.
pub(crate) fn close_everything() {
    // SAFETY: the caller never again uses what it owned: it ends by `exit_now`, which runs no destructor.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
}

/// Gives every signal its default action and blocks none, as a new program expects it.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: setting the default action is always allowed; SIGKILL, SIGSTOP and glibc's own refuse, harmlessly.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut none = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set before it is used.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// Blocks all signals, for [`next_signal`].
pub(crate) fn block_all_signals() {
    let mut all = std::mem::MaybeUninit::uninit();
    // SAFETY: sigfillset initializes the set before it is used.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// Waits for one of the blocked signals.
pub(crate) fn next_signal() -> Option<c_int> {
    let mut all = std::mem::MaybeUninit::uninit();
    let mut signal = 0;
    // SAFETY: sigfillset initializes the set before it is used; the kernel writes one integer.
    let failed = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigwait(all.as_ptr(), &raw mut signal)
    };
    (failed == 0).then_some(signal)
}

/// `kill(2)`, for the init in a container.
pub(crate) fn kill(pid: u32, signal: c_int) {
    // SAFETY: has no precondition.
    unsafe { libc::kill(pid as libc::pid_t, signal) };
}

/// Looks for an ended child without reaping it.
pub(crate) fn peek_ended_child() -> Option<u32> {
    // SAFETY: an all-zero siginfo is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the kernel writes one siginfo into a variable that outlives the call.
    let failed = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, options) };
    // SAFETY: waitid fills in the pid, or leaves the zero that was there.
    let pid = unsafe { info.si_pid() };
    (failed == 0 && pid > 0).then_some(pid as u32)
}

/// Sends any of the signals 1 to 64.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: u8) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is what kill(2) uses.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), c_int::from(signal), no_info, 0)
    })?;
    Ok(())
}

/// Ties a descriptor to the event loop; reads and writes no longer block.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: an `OwnedFd` stands for the same open descriptor for as long as it lives.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Sets and clears MOUNT_ATTR flags of the mount at `fd`, which may be detached.
pub(crate) fn mount_setattr(fd: impl AsFd, recursive: bool, set: u64, clear: u64) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, and the structure has the size that is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

/// Brings the loopback interface of the current network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a complete ifreq with a terminated name.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) }.into())?;
    Ok(())
}

fn set_option(socket: impl AsFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the value is an integer of the length that is passed, and the kernel only reads it.
    check(unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw const value).cast(), len).into()
    })?;
    Ok(())
}

/// Lets a socket have addresses that are not the machine's.
pub(crate) fn set_transparent(socket: impl AsFd, v6: bool) -> io::Result<()> {
    match v6 {
        true => set_option(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1),
        false => set_option(socket, libc::SOL_IP, libc::IP_TRANSPARENT, 1),
    }
}

/// Has each datagram come with the address that it was sent to.
pub(crate) fn tell_original_destination(socket: impl AsFd, v6: bool) -> io::Result<()> {
    match v6 {
        true => set_option(socket, libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR, 1),
        false => set_option(socket, libc::SOL_IP, libc::IP_RECVORIGDSTADDR, 1),
    }
}

const BLKPG: u64 = 0x1269;
const BLKPG_ADD_PARTITION: c_int = 1;
const BLKPG_DEL_PARTITION: c_int = 2;

#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: c_int,
    devname: [u8; 64],
    volname: [u8; 64],
}

#[repr(C)]
struct BlkpgArgument {
    op: c_int,
    flags: c_int,
    datalen: c_int,
    data: *mut BlkpgPartition,
}

fn blkpg(disk: BorrowedFd<'_>, op: c_int, number: u8, start: i64, length: i64) -> io::Result<()> {
    let mut partition =
        BlkpgPartition { start, length, number: number.into(), devname: [0; 64], volname: [0; 64] };
    let mut argument = BlkpgArgument {
        op,
        flags: 0,
        datalen: size_of::<BlkpgPartition>() as c_int,
        data: &raw mut partition,
    };
    // SAFETY: the argument and the structure it points to are laid out as linux/blkpg.h says and outlive the call.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &raw mut argument) }.into())?;
    Ok(())
}

/// Makes a byte range of a disk a partition.
pub(crate) fn add_partition(disk: BorrowedFd<'_>, number: u8, start: u64, length: u64) -> io::Result<()> {
    let (Ok(start), Ok(length)) = (i64::try_from(start), i64::try_from(length)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    blkpg(disk, BLKPG_ADD_PARTITION, number, start, length)
}

/// Takes a partition away; the kernel refuses while it is in use.
pub(crate) fn delete_partition(disk: BorrowedFd<'_>, number: u8) -> io::Result<()> {
    blkpg(disk, BLKPG_DEL_PARTITION, number, 0, 0)
}

/// Attaches a file to a free loop device, read-only; the device frees itself when it is no longer used.
pub(crate) fn loop_device(file: BorrowedFd<'_>) -> io::Result<(OwnedFd, String)> {
    const LOOP_CTL_GET_FREE: u64 = 0x4C82;
    const LOOP_CONFIGURE: u64 = 0x4C0A;
    const LO_FLAGS_READ_ONLY: u32 = 1;
    const LO_FLAGS_AUTOCLEAR: u32 = 4;
    // struct loop_config: fd, block_size, struct loop_info64 (232 bytes, lo_flags at 52), 8 reserved words.
    const CONFIG_LEN: usize = 8 + 232 + 64;
    let control = std::fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    loop {
        // SAFETY: takes no argument.
        let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) }.into())?;
        let path = format!("/dev/loop{number}");
        let device = std::fs::File::open(&path)?;
        let mut config = [0u64; CONFIG_LEN / 8];
        config[0] = file.as_raw_fd() as u64;
        // lo_flags is the upper half of the word that begins at byte 8 + 48.
        config[7] = u64::from(LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR) << 32;
        // SAFETY: the buffer has the size and alignment of struct loop_config.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, config.as_ptr()) };
        match check(result.into()) {
            Ok(_) => return Ok((device.into(), path)),
            // Another process took the free device between the two calls.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
}
