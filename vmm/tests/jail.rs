//! A program inside the jail that tries to get out: every way is refused. It runs as the user of the test, and as an ordinary user
//! if that is root. What a VMM does need still works there.
#![allow(unsafe_code)]

use std::io::Error;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

const INSIDE: &str = "--inside";
const UNFILTERED: &str = "--unfiltered";
const NOBODY: u32 = 65534;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == INSIDE) {
        return inside();
    }
    if arguments.first().is_some_and(|argument| argument == UNFILTERED) {
        return unfiltered();
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("prisoner");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    // SAFETY: only asks.
    let me = unsafe { libc::geteuid() };
    let mut users = vec![me];
    if me == 0 {
        users.push(NOBODY);
    }
    let mut all_well = true;
    for user in users {
        for role in [INSIDE, UNFILTERED] {
            let mut command = Command::new(&program);
            command.arg(role);
            if user != me {
                command.uid(user).gid(user);
            }
            println!("as user {user}, {role}:");
            all_well &= command.status().unwrap().success();
        }
    }
    if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What is tried, and what it answers: a negative number is a refusal that `errno` explains.
type Attempt = (&'static str, fn() -> i64);

fn inside() -> ExitCode {
    // A descriptor that strayed in.
    let stray = std::fs::File::open("/").unwrap();
    let stray = std::os::fd::IntoRawFd::into_raw_fd(stray);
    coracle_vmm::jail::enter(&[]).unwrap();
    let mut failed = 0;
    let mut judge = |name: &str, ok: bool, error: Error| {
        println!("{} {name}: {error}", if ok { "ok  " } else { "FAIL" });
        failed += u32::from(!ok);
    };
    for (name, attempt) in ATTEMPTS {
        let refused = attempt() == -1;
        let error = Error::last_os_error();
        let by_rule = matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS));
        judge(name, refused && by_rule, error);
    }
    // SAFETY: only asks.
    let open = (3..4096).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } != -1).count();
    judge("no descriptor strayed in", open == 0 && stray >= 3, Error::from_raw_os_error(0));
    let thread = std::thread::spawn(|| vec![1u8; 1 << 20].iter().map(|byte| u64::from(*byte)).sum::<u64>());
    judge(
        "threads and memory are there",
        thread.join().is_ok_and(|sum| sum == 1 << 20),
        Error::from_raw_os_error(0),
    );
    let caught = std::panic::catch_unwind(|| panic!("on purpose, to see that it is survived"));
    judge("a panic is survived", caught.is_err(), Error::from_raw_os_error(0));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Without the system call filter the other layers still hide files and networks.
fn unfiltered() -> ExitCode {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // The jail closes it.
    let _ = std::os::fd::IntoRawFd::into_raw_fd(listener);
    coracle_vmm::jail::enter_unfiltered(&[]).unwrap();
    let results = [
        ("open a file", std::fs::File::open("/etc/passwd").map(drop)),
        ("list the root", std::fs::read_dir("/").map(drop)),
        ("open the processes", std::fs::File::open("/proc/self/status").map(drop)),
        ("make a file", std::fs::File::create("/tmp/made-in-jail").map(drop)),
        ("run a program", Command::new("/bin/true").status().map(drop)),
        ("connect to the host", std::net::TcpStream::connect(address).map(drop)),
        ("listen", std::net::TcpListener::bind("127.0.0.1:0").map(drop)),
    ];
    let mut all_well = true;
    for (name, result) in results {
        println!("{} {name}: {result:?}", if result.is_err() { "ok  " } else { "FAIL" });
        all_well &= result.is_err();
    }
    if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A system call with up to four arguments.
fn call(number: i64, arguments: [i64; 4]) -> i64 {
    let [a, b, c, d] = arguments;
    // SAFETY: all pointers given below are to constants or null; what the calls would do is refused, or undone by the process's end.
    unsafe { libc::syscall(number, a, b, c, d, 0, 0) }
}

fn text(text: &'static std::ffi::CStr) -> i64 {
    text.as_ptr() as i64
}

fn open(path: &'static std::ffi::CStr, flags: i32) -> i64 {
    call(libc::SYS_openat, [i64::from(libc::AT_FDCWD), text(path), i64::from(flags), 0o600])
}

fn socket(family: i32, kind: i32) -> i64 {
    call(libc::SYS_socket, [i64::from(family), i64::from(kind), 0, 0])
}

/// The process that started this one.
fn parent() -> i64 {
    // SAFETY: only asks.
    i64::from(unsafe { libc::getppid() })
}

const ATTEMPTS: &[Attempt] = &[
    ("open a file", || open(c"/etc/passwd", libc::O_RDONLY)),
    ("open the processes", || open(c"/proc/self/maps", libc::O_RDONLY)),
    ("open the root", || open(c"/", libc::O_PATH)),
    ("open what is here", || open(c".", libc::O_RDONLY)),
    ("open /dev/kvm again", || open(c"/dev/kvm", libc::O_RDWR)),
    ("make a file", || open(c"/tmp/made", libc::O_CREAT | libc::O_WRONLY)),
    ("open in the old way", || call(libc::SYS_open, [text(c"/etc/passwd"), 0, 0, 0])),
    ("open by openat2", || call(libc::SYS_openat2, [i64::from(libc::AT_FDCWD), text(c"/etc/passwd"), 0, 24])),
    ("open by handle", || call(libc::SYS_open_by_handle_at, [3, 0, 0, 0])),
    ("remove a file", || call(libc::SYS_unlinkat, [i64::from(libc::AT_FDCWD), text(c"/tmp/x"), 0, 0])),
    ("read a link", || {
        call(libc::SYS_readlinkat, [i64::from(libc::AT_FDCWD), text(c"/proc/self/exe"), 0, 0])
    }),
    ("make memory that is a file", || call(libc::SYS_memfd_create, [text(c"x"), 0, 0, 0])),
    ("make memory that is a file to execute", || {
        call(libc::SYS_memfd_create, [text(c"x"), i64::from(libc::MFD_EXEC | libc::MFD_ALLOW_SEALING), 0, 0])
    }),
    ("make a TCP socket", || socket(libc::AF_INET, libc::SOCK_STREAM)),
    ("make a UDP socket", || socket(libc::AF_INET6, libc::SOCK_DGRAM)),
    ("make a unix socket", || socket(libc::AF_UNIX, libc::SOCK_STREAM)),
    ("make a netlink socket", || socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    ("make a vsock socket", || socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
    ("make a pair of other sockets", || {
        call(libc::SYS_socketpair, [i64::from(libc::AF_TIPC), i64::from(libc::SOCK_STREAM), 0, 0])
    }),
    ("connect", || call(libc::SYS_connect, [0, 0, 0, 0])),
    ("bind", || call(libc::SYS_bind, [0, 0, 0, 0])),
    ("listen", || call(libc::SYS_listen, [0, 1, 0, 0])),
    ("execute a program", || call(libc::SYS_execve, [text(c"/bin/true"), 0, 0, 0])),
    ("execute by descriptor", || call(libc::SYS_execveat, [0, text(c""), 0, 0])),
    ("fork", || call(libc::SYS_fork, [0; 4])),
    ("vfork", || call(libc::SYS_vfork, [0; 4])),
    ("clone a process", || call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0])),
    ("clone3 a process", || call(libc::SYS_clone3, [0, 0, 0, 0])),
    ("be traced", || call(libc::SYS_ptrace, [i64::from(libc::PTRACE_TRACEME), 0, 0, 0])),
    ("trace", || call(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), parent(), 0, 0])),
    ("read another's memory", || call(libc::SYS_process_vm_readv, [parent(), 0, 0, 0])),
    ("take another's descriptor", || call(libc::SYS_pidfd_open, [parent(), 0, 0, 0])),
    ("signal another", || call(libc::SYS_kill, [parent(), 0, 0, 0])),
    ("signal another's thread", || call(libc::SYS_tgkill, [parent(), parent(), 0, 0])),
    ("mount", || call(libc::SYS_mount, [text(c"x"), text(c"/"), text(c"tmpfs"), 0])),
    ("unshare", || call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0])),
    ("join a namespace", || call(libc::SYS_setns, [0, 0, 0, 0])),
    ("change the root", || call(libc::SYS_chroot, [text(c"/"), 0, 0, 0])),
    ("become another user", || call(libc::SYS_setuid, [0, 0, 0, 0])),
    ("raise a limit", || call(libc::SYS_prlimit64, [0, 7, 0, 0])),
    ("gain capabilities", || call(libc::SYS_capset, [0, 0, 0, 0])),
    ("make memory executable", || {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        call(libc::SYS_mmap, [0, 4096, i64::from(protection), i64::from(flags)])
    }),
    ("change memory to executable", || {
        call(libc::SYS_mprotect, [ATTEMPTS.as_ptr() as i64 & !4095, 4096, i64::from(libc::PROT_EXEC), 0])
    }),
    ("load BPF", || call(libc::SYS_bpf, [0, 0, 0, 0])),
    ("watch performance", || call(libc::SYS_perf_event_open, [0, 0, 0, 0])),
    ("handle page faults", || call(libc::SYS_userfaultfd, [0, 0, 0, 0])),
    ("use keys", || call(libc::SYS_keyctl, [0, 0, 0, 0])),
    ("type into a terminal", || call(libc::SYS_ioctl, [0, libc::TIOCSTI as i64, text(c"x"), 0])),
    ("set the clock", || call(libc::SYS_settimeofday, [0, 0, 0, 0])),
    ("reboot", || call(libc::SYS_reboot, [0, 0, 0, 0])),
];
