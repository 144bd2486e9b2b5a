//! A program inside the jail: what it was granted it can use, and every way to more is refused. It runs as the user of the test, and as an
//! ordinary user if that is root.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Error, Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

const INSIDE: &str = "--inside";
const NOBODY: u32 = 65534;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == INSIDE) {
        return inside(&arguments[1]);
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let program = folder.path().join("prisoner");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let me = rustix::process::geteuid().as_raw();
    let users = if me == 0 { vec![0, NOBODY] } else { vec![me] };
    let mut all_well = true;
    for user in users {
        let mut command = Command::new(&program);
        command.args([INSIDE, folder.path().to_str().unwrap()]);
        if user != me {
            command.uid(user).gid(user);
        }
        println!("as user {user}:");
        all_well &= command.status().unwrap().success();
    }
    if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What is tried, and what it answers: a negative number is a refusal that `errno` explains.
type Attempt = (&'static str, fn() -> i64);

fn inside(folder: &str) -> ExitCode {
    let granted = rustix::fs::openat(CWD, folder, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    // A descriptor that strayed in.
    let stray = File::open("/").unwrap().into_raw_fd();
    let kept = granted.as_raw_fd();
    coracle_file_server::jail::enter(&[kept]).unwrap();
    let mut failed = 0;
    let mut judge = |name: &str, ok: bool, error: Error| {
        println!("{} {name}: {error}", if ok { "ok  " } else { "FAIL" });
        failed += u32::from(!ok);
    };
    for (name, attempt) in ATTEMPTS {
        let refused = attempt() < 0;
        judge(name, refused, Error::last_os_error());
    }
    // SAFETY: only asks.
    let open = (3..4096).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } != -1).count();
    judge("no descriptor strayed in", open == 1 && stray >= 3, Error::from_raw_os_error(0));
    let worked = use_grant(&granted);
    judge(
        "the grant can be used",
        worked.is_ok(),
        worked.err().unwrap_or_else(|| Error::from_raw_os_error(0)),
    );
    let thread = std::thread::spawn(|| vec![1u8; 1 << 20].iter().map(|byte| u64::from(*byte)).sum::<u64>());
    judge("threads are there", thread.join().is_ok_and(|sum| sum == 1 << 20), Error::from_raw_os_error(0));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the server does with a grant: the working directory leads from descriptors to files.
fn use_grant(granted: &std::os::fd::OwnedFd) -> std::io::Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let name = format!("made-{}", std::process::id());
    let made = rustix::fs::openat(granted, &name, flags, Mode::from_raw_mode(0o600))?;
    File::from(made).write_all(b"content")?;
    let path = rustix::fs::openat2(granted, &name, OFlags::PATH, Mode::empty(), ResolveFlags::BENEATH)?;
    let again = rustix::fs::openat(CWD, path.as_raw_fd().to_string(), OFlags::RDONLY, Mode::empty())?;
    let mut text = String::new();
    File::from(again).read_to_string(&mut text)?;
    if text == "content" { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
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

const ATTEMPTS: &[Attempt] = &[
    ("open a file of the host", || open(c"/etc/passwd", libc::O_RDONLY)),
    ("open the processes", || open(c"/proc/self/status", libc::O_RDONLY)),
    ("make a file in the root", || open(c"/made", libc::O_WRONLY | libc::O_CREAT)),
    ("open another process's memory", || open(c"../../1/mem", libc::O_RDONLY)),
    ("open another process's root", || open(c"../../1/root/etc/passwd", libc::O_RDONLY)),
    ("open the root beneath the first process", || open(c"../root/etc/passwd", libc::O_RDONLY)),
    ("run a program", || call(libc::SYS_execve, [text(c"/bin/true"), 0, 0, 0])),
    ("run a program by descriptor", || call(libc::SYS_execveat, [3, text(c""), 0, 0])),
    ("make a process", || call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0])),
    ("make a process otherwise", || call(libc::SYS_clone3, [0, 0, 0, 0])),
    ("make a socket", || {
        call(libc::SYS_socket, [i64::from(libc::AF_INET), i64::from(libc::SOCK_STREAM), 0, 0])
    }),
    ("make a socket of the system", || {
        call(libc::SYS_socket, [i64::from(libc::AF_UNIX), i64::from(libc::SOCK_STREAM), 0, 0])
    }),
    ("open by a handle", || call(libc::SYS_open_by_handle_at, [3, 0, 0, 0])),
    ("mount", || call(libc::SYS_mount, [text(c"x"), text(c"/"), text(c"tmpfs"), 0])),
    ("copy a mount", || call(libc::SYS_open_tree, [3, text(c""), 0x1000, 0])),
    ("change the root", || call(libc::SYS_chroot, [text(c"."), 0, 0, 0])),
    ("change the directory", || call(libc::SYS_fchdir, [3, 0, 0, 0])),
    ("become another user", || call(libc::SYS_setuid, [1, 0, 0, 0])),
    ("gain capabilities", || call(libc::SYS_capset, [0, 0, 0, 0])),
    ("make namespaces", || call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0])),
    ("trace a process", || call(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), 1, 0, 0])),
    ("end a process", || call(libc::SYS_kill, [1, 0, 0, 0])),
    ("take another's descriptor", || call(libc::SYS_pidfd_open, [1, 0, 0, 0])),
    ("make memory executable", || {
        let all = i64::from(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        call(libc::SYS_mmap, [0, 4096, all, i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)])
    }),
    ("make a ring for requests", || call(libc::SYS_io_uring_setup, [1, 0, 0, 0])),
    ("load BPF", || call(libc::SYS_bpf, [0, 0, 0, 0])),
    ("use keys", || call(libc::SYS_keyctl, [0, 0, 0, 0])),
];
