//! The server as a child process, and the kernel's mount of it.

use std::fs::{File, Permissions};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;

use coracle_file_server::control::{self, Client, Grant, GrantId, GrantKind, Owners};
use coracle_file_server::fs::Exported;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The first argument of the process that serves.
pub(crate) const SERVE: &str = "--serve";
/// The ordinary user.
pub(crate) const USER: u32 = 12345;
/// The kernel's longest request, with room for its header.
const BUFFER: usize = (1 << 20) + 4096;

/// Whom the server runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Root,
    User,
}

/// Own mount namespace, so that nothing is left behind.
pub(crate) fn prepare() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse");
    // SAFETY: the flag makes nothing unshared that another thread relies on; there is none.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    // SAFETY: sets a number; files of the test have the modes that it says.
    unsafe { libc::umask(0o022) };
}

/// A directory of the host, granted as `g`, and where it is mounted.
pub(crate) struct Mounted {
    pub(crate) who: Who,
    /// The granted directory on the host.
    pub(crate) outside: PathBuf,
    /// The same as the client sees it.
    pub(crate) inside: PathBuf,
    /// The mount's root.
    pub(crate) root: PathBuf,
    pub(crate) client: Client,
    pub(crate) server: std::sync::Mutex<Child>,
    /// A directory of the host that is not granted, in which all of this is.
    pub(crate) folder: tempfile::TempDir,
}

impl std::panic::RefUnwindSafe for Mounted {}

impl Mounted {
    pub(crate) fn new(who: Who) -> Self {
        Self::with_descriptors(who, 1024)
    }

    pub(crate) fn with_descriptors(who: Who, descriptors: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let (outside, root) = (folder.path().join("outside"), folder.path().join("mnt"));
        std::fs::create_dir(&outside).unwrap();
        std::fs::create_dir(&root).unwrap();
        if who == Who::User {
            chown(&outside, Some(USER), Some(USER)).unwrap();
        }
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let control = folder.path().join("control");
        let listener = control::listen(&control).unwrap();
        let server = start(who, descriptors, &listener, &device);
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        let data = std::ffi::CString::new(data).unwrap();
        mount("coracle", &root, "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(data.as_c_str()))
            .unwrap();
        let client = Client::connect(&control, || ()).unwrap();
        let mounted =
            Self { who, inside: root.join("g"), outside, root, client, server: server.into(), folder };
        mounted.grant("g", &mounted.outside, false);
        mounted
    }

    /// The mapping of owners that fits the server.
    pub(crate) fn owners(&self) -> Owners {
        match self.who {
            Who::Root => Owners::Real,
            Who::User => Owners::Kept { uid: 0, gid: 0 },
        }
    }

    pub(crate) fn grant(&self, id: &str, path: &Path, read_only: bool) {
        let kind = if path.is_dir() { GrantKind::Directory } else { GrantKind::File };
        let tree = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let grant = Grant { id: name(id), kind, read_only, owners: self.owners() };
        self.client.grant(grant, tree.as_fd()).unwrap();
    }

    /// How many descriptors the server has.
    pub(crate) fn server_descriptors(&self) -> usize {
        let pid = self.server.lock().unwrap().id();
        std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    }

    /// The server's resident memory in bytes.
    pub(crate) fn server_memory(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.server.lock().unwrap().id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Unmounts, and sees that the server ends well and nothing was left referenced.
    pub(crate) fn end(self) {
        unmount(&self.root, UnmountFlags::DETACH).unwrap();
        drop(self.client);
        let status = self.server.lock().unwrap().wait().unwrap();
        assert!(status.success(), "the server: {status}");
        let _ = self.folder.close();
    }
}

pub(crate) fn name(id: &str) -> GrantId {
    GrantId::try_from(id.to_owned()).unwrap()
}

fn start(who: Who, descriptors: u64, listener: &OwnedFd, device: &File) -> Child {
    let fds = [listener.as_raw_fd(), device.as_raw_fd()];
    let mut command = Command::new("/proc/self/exe");
    command.arg(SERVE).args(fds.map(|fd| fd.to_string()));
    let user = (who == Who::User).then_some(USER);
    let prepare = move || {
        for fd in fds {
            // SAFETY: the descriptors are open in the parent, which waits until the child runs its program.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } == -1 {
                return Err(std::io::Error::last_os_error());
            }
        }
        let limit = Rlimit { current: Some(descriptors), maximum: Some(descriptors) };
        rustix::process::setrlimit(Resource::Nofile, limit)?;
        if let Some(user) = user {
            // SAFETY: plain system calls with numbers.
            let failed = unsafe {
                libc::setgroups(0, std::ptr::null()) != 0
                    || libc::setgid(user) != 0
                    || libc::setuid(user) != 0
            };
            if failed {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls only.
    unsafe { command.pre_exec(prepare) };
    command.spawn().unwrap()
}

/// The server's process.
pub(crate) fn serve(arguments: &[String]) -> ExitCode {
    let number = |index: usize| arguments[index].parse::<RawFd>().unwrap();
    // SAFETY: they were handed down for this, and nothing else owns them.
    let control = unsafe { OwnedFd::from_raw_fd(number(1)) };
    // SAFETY: as above.
    let device = unsafe { File::from_raw_fd(number(2)) };
    let keep = [device.as_raw_fd()];
    let result = coracle_file_server::run_beside(control, &keep, |files| {
        for _ in 0..3 {
            let (device, files) = (device.try_clone().unwrap(), Arc::clone(&files));
            std::thread::spawn(move || answer(&device, files));
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

/// Answers the kernel's requests until it unmounts.
fn answer(mut device: &File, files: Arc<Exported>) {
    let server = Server::new(files);
    let mut request = vec![0; BUFFER];
    let mut reply = vec![0; BUFFER];
    loop {
        let len = match device.read(&mut request) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            Err(_) => continue,
        };
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut request[..len])).unwrap();
        let writer = FuseDevWriter::<()>::new(device.as_raw_fd(), &mut reply).unwrap();
        // What the kernel has given up is not answered.
        let _ = server.handle_message(reader, writer.into(), None, None);
    }
}

/// Runs a program, and gives its output; it must succeed.
pub(crate) fn run(directory: &Path, words: &[&str]) -> String {
    let output = Command::new(words[0])
        .args(&words[1..])
        .current_dir(directory)
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_COUNT", "3")
        .envs([("GIT_CONFIG_KEY_0", "safe.directory"), ("GIT_CONFIG_VALUE_0", "*")])
        .envs([("GIT_CONFIG_KEY_1", "user.email"), ("GIT_CONFIG_VALUE_1", "a@example.com")])
        .envs([("GIT_CONFIG_KEY_2", "user.name"), ("GIT_CONFIG_VALUE_2", "a")])
        .output()
        .unwrap_or_else(|error| panic!("{words:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{words:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

/// Runs `call` as another user, in a process of its own; what it says is its exit code.
pub(crate) fn as_user(uid: u32, call: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the test has one thread of its own at this point; the child makes system calls and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: plain system calls with numbers.
        unsafe {
            libc::setgroups(0, std::ptr::null());
            libc::setgid(uid);
            libc::setuid(uid);
        }
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).unwrap_or(99);
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    libc::WEXITSTATUS(status)
}
