//! The host's side: starts a VMM as a process, boots a machine on it and talks to the guest.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use coracle_file_server::control::{Client as FilesClient, Grant, GrantId, GrantKind, Owners};
use coracle_vmm::control::{self, Boot, BootFds, Client, DataDisk, ExitReason, FileRegion, Notice};

use crate::guest::PORT;

pub(crate) const VMM_ROLE: &str = "--vmm";
pub(crate) const FILE_SERVER_ROLE: &str = "--file-server";
/// Everything is slow where the host itself is emulated.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const LAYERS: u64 = 16 << 40;

/// The guest kernel, where the build leaves it.
pub(crate) fn kernel() -> Option<PathBuf> {
    let folder = std::env::var_os("CORACLE_GUEST_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest"), PathBuf::from);
    let path = folder.join("vmlinux");
    path.exists().then_some(path)
}

pub(crate) fn be_the_vmm() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let control = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    match coracle_vmm::run(control) {
        Ok(ExitReason::Stopped | ExitReason::GuestReset) => ExitCode::SUCCESS,
        result => {
            eprintln!("vmm: {result:?}");
            ExitCode::FAILURE
        }
    }
}

pub(crate) fn be_the_file_server() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let control = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    match coracle_file_server::run(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("file server: {error:?}");
            ExitCode::FAILURE
        }
    }
}

/// Starts this program in a role, with a control socket at this path.
fn start_as(role: &str, control: &Path) -> Child {
    let listener = control::listen(control).unwrap();
    Command::new(std::env::current_exe().unwrap())
        .arg(role)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::from(listener))
        .spawn()
        .unwrap()
}

/// A file server's process, which has granted a folder of its own under the name `tree`.
pub(crate) struct Files {
    pub(crate) child: Child,
    pub(crate) client: FilesClient,
    pub(crate) tree: PathBuf,
    _folder: tempfile::TempDir,
}

impl Files {
    /// With the VMM's end of the socket between the two.
    fn start() -> (Self, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control.sock");
        let child = start_as(FILE_SERVER_ROLE, &control);
        let client = FilesClient::connect(&control, || ()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        client.serve(theirs.as_fd()).unwrap();
        let tree = folder.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        let files = Self { child, client, tree, _folder: folder };
        files.grant("tree", &files.tree);
        (files, ours.into())
    }

    pub(crate) fn grant(&self, name: &str, folder: &Path) {
        let (id, owners) = (GrantId::try_from(name.to_owned()).unwrap(), Owners::Kept { uid: 0, gid: 0 });
        let grant = Grant { id, kind: GrantKind::Directory, read_only: false, owners };
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let tree = rustix::fs::open(folder, flags, rustix::fs::Mode::empty()).unwrap();
        self.client.grant(grant, tree.as_fd()).unwrap();
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A VMM process with a machine.
pub(crate) struct Vm {
    pub(crate) client: Client,
    pub(crate) notices: Receiver<Notice>,
    pub(crate) child: Child,
    pub(crate) control: PathBuf,
    pub(crate) disk: File,
    /// The guest's first connection; dropping it closes it.
    pub(crate) ready: Option<UnixStream>,
    /// If the machine has a file server.
    pub(crate) files: Option<Files>,
    /// The VMM's end of the socket between the two, until it has it.
    file_server: Option<OwnedFd>,
    folder: tempfile::TempDir,
}

pub(crate) struct Options {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) serial: bool,
    pub(crate) keep: bool,
    pub(crate) files: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { vcpus: 1, memory_mib: 512, serial: true, keep: false, files: false }
    }
}

pub(crate) const DISK: u64 = 64 << 20;

impl Vm {
    /// Starts a VMM without booting.
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("control.sock");
        let child = start_as(VMM_ROLE, &control);
        let (sender, notices) = channel();
        let client = Client::connect(&control, move |notice| {
            let _ = sender.send(notice);
        })
        .unwrap();
        let disk = tempfile::tempfile_in(folder.path()).unwrap();
        disk.set_len(DISK).unwrap();
        Self { client, notices, child, control, disk, ready: None, files: None, file_server: None, folder }
    }

    /// Boots and waits until the guest is ready.
    pub(crate) fn boot(kernel: &Path, options: &Options) -> Self {
        let mut vm = Self::start();
        vm.client.vsock_listen(PORT, options.keep).unwrap();
        if options.files {
            let (files, socket) = Files::start();
            (vm.files, vm.file_server) = (Some(files), Some(socket));
        }
        vm.try_boot(kernel, options).unwrap();
        vm.file_server = None;
        let (port, stream) = vm.accepted();
        assert_eq!(port, PORT);
        let mut stream = UnixStream::from(stream);
        let mut line = [0; 6];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"ready\n");
        vm.ready = Some(stream);
        vm
    }

    pub(crate) fn request(kernel: &Path, options: &Options) -> Boot {
        Boot {
            vcpus: options.vcpus,
            memory_mib: options.memory_mib,
            kernel: FileRegion { offset: 0, len: kernel.metadata().unwrap().len() },
            initramfs: FileRegion { offset: 0, len: initramfs().metadata().unwrap().len() },
            data_disk: DataDisk { len: DISK },
            layers_capacity: LAYERS,
            cmdline_extra: String::new(),
            serial: options.serial,
            file_server: options.files,
        }
    }

    pub(crate) fn try_boot(&self, kernel: &Path, options: &Options) -> Result<(), control::ClientError> {
        self.boot_with(Self::request(kernel, options), kernel)
    }

    pub(crate) fn boot_with(&self, request: Boot, kernel: &Path) -> Result<(), control::ClientError> {
        let kernel = File::open(kernel).unwrap();
        let serial = File::create(self.folder.path().join("serial.log")).unwrap();
        let fds = BootFds {
            kernel: kernel.as_fd(),
            initramfs: initramfs().as_fd(),
            data_disk: self.disk.as_fd(),
            serial: request.serial.then(|| serial.as_fd()),
            file_server: self.file_server.as_ref().map(AsFd::as_fd).filter(|_| request.file_server),
        };
        self.client.boot(request, fds)
    }

    pub(crate) fn serial(&self) -> String {
        let bytes = std::fs::read(self.folder.path().join("serial.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) fn accepted(&self) -> (u32, OwnedFd) {
        match self.notices.recv_timeout(PATIENCE) {
            Ok(Notice::VsockAccepted { port, stream, .. }) => (port, stream),
            other => panic!("no connection from the guest but {other:?}; its console:\n{}", self.serial()),
        }
    }

    /// Connects to the guest's command port and sends a command line.
    pub(crate) fn command(&self, line: &str) -> UnixStream {
        let mut stream = self.connect(PORT);
        writeln!(stream, "{line}").unwrap();
        stream
    }

    pub(crate) fn connect(&self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        self.client.vsock_connect(port, theirs.as_fd()).unwrap();
        ours
    }

    /// A command whose whole answer is text.
    pub(crate) fn ask(&self, line: &str) -> String {
        let mut answer = String::new();
        self.command(line).read_to_string(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    /// A command with input, and its whole answer.
    pub(crate) fn exchange(&self, line: &str, input: &[u8]) -> Vec<u8> {
        let stream = self.command(line);
        let mut writer = stream.try_clone().unwrap();
        let input = input.to_vec();
        let thread = std::thread::spawn(move || {
            writer.write_all(&input).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = Vec::new();
        (&stream).read_to_end(&mut answer).unwrap();
        thread.join().unwrap();
        answer
    }

    /// How much memory the VMM has, in bytes, the guest's included.
    pub(crate) fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// Waits for the end of the machine and of the VMM.
    pub(crate) fn end(&mut self) -> (ExitReason, bool) {
        let reason = loop {
            match self.notices.recv_timeout(PATIENCE) {
                Ok(Notice::Exited(reason)) => break reason,
                Ok(Notice::VsockAccepted { .. }) => {}
                other => panic!("no end but {other:?}; the guest's console:\n{}", self.serial()),
            }
        };
        (reason, self.child.wait().unwrap().success())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the guest's console:\n{}", self.serial());
        }
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn initramfs() -> &'static File {
    static FILE: OnceLock<File> = OnceLock::new();
    FILE.get_or_init(|| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&crate::initramfs::build()).unwrap();
        file
    })
}
