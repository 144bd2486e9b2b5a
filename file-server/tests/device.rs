//! The real process, driven as the VMM drives it: its control socket, vhost-user, rings in shared memory.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coracle_file_server::control::{self, Client, Grant, GrantId, GrantKind, Owners};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 0x40_0000;
const QUEUE_SIZE: u16 = 16;
const RING: u64 = 0x1000;
const AVAILABLE: u64 = RING + 0x1000;
const USED: u64 = RING + 0x2000;
const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x2_0000;

/// A machine that mounts what a real server serves.
struct Machine {
    server: Child,
    client: Client,
    folder: tempfile::TempDir,
    memory: GuestMemoryMmap,
    frontend: Option<Frontend>,
    kick: EventFd,
    call: EventFd,
    sent: u16,
}

impl Machine {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let listener = control::listen(&path).unwrap();
        // The program takes its control socket as descriptor 3.
        let server = Command::new("sh")
            .args([
                "-c",
                &format!("exec \"$0\" 3<&{}", listener.as_raw_fd()),
                env!("CARGO_BIN_EXE_coracle-fsd"),
            ])
            .stdin(Stdio::null())
            .spawn_with(&listener);
        let client = Client::connect(&path, || ()).unwrap();
        let memfd = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(File::from(memfd), 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        client.serve(theirs.as_fd()).unwrap();
        drop(theirs);
        let mut machine = Self {
            server,
            client,
            folder,
            memory,
            frontend: None,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(0).unwrap(),
            sent: 0,
        };
        machine.set_up(Frontend::from_stream(ours, 9));
        machine
    }

    fn set_up(&mut self, mut frontend: Frontend) {
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_ne!(features & protocol, 0);
        let offered = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(offered.contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 9);
        frontend.set_features((1 << 32) | protocol).unwrap();
        let region = self.memory.iter().next().unwrap();
        let base = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap() as u64;
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[info]).unwrap();
        frontend.set_vring_num(1, QUEUE_SIZE).unwrap();
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: base + RING,
            used_ring_addr: base + USED,
            avail_ring_addr: base + AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_addr(1, &config).unwrap();
        frontend.set_vring_base(1, 0).unwrap();
        frontend.set_vring_call(1, &self.call).unwrap();
        frontend.set_vring_kick(1, &self.kick).unwrap();
        frontend.set_vring_enable(1, true).unwrap();
        self.frontend = Some(frontend);
    }

    fn grant(&self, id: &str, path: &Path) {
        let tree = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let id = GrantId::try_from(id.to_owned()).unwrap();
        let owners = Owners::Kept { uid: 0, gid: 0 };
        let grant = Grant { id, kind: GrantKind::Directory, read_only: false, owners };
        self.client.grant(grant, tree.as_fd()).unwrap();
    }

    /// Sends a FUSE message, and gives the error and what follows the header.
    fn ask(&mut self, operation: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let header = [
            &(40 + body.len() as u32).to_le_bytes()[..],
            &operation.to_le_bytes(),
            &7u64.to_le_bytes(),
            &node.to_le_bytes(),
            &[0; 16],
        ]
        .concat();
        let request = [header, body.to_vec()].concat();
        self.write(&request, REQUEST);
        self.write(&descriptor(REQUEST, request.len() as u32, 1, 1), RING);
        self.write(&descriptor(REPLY, 0x1_0000, 2, 0), RING + 16);
        self.offer(0);
        let len = self.answered();
        let mut reply = vec![0; len as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        assert_eq!(reply[8..16], 7u64.to_le_bytes());
        (i32::from_le_bytes(reply[4..8].try_into().unwrap()), reply[16..].to_vec())
    }

    fn write(&self, bytes: &[u8], at: u64) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        self.write(&head.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(self.sent % QUEUE_SIZE));
        self.sent = self.sent.wrapping_add(1);
        self.write(&self.sent.to_le_bytes(), AVAILABLE + 2);
        self.kick.write(1).unwrap();
    }

    /// Waits for an answer, and gives its length.
    fn answered(&self) -> u32 {
        self.call.read().unwrap();
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, self.sent);
        let slot = u64::from(self.sent.wrapping_sub(1) % QUEUE_SIZE);
        self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot + 4)).unwrap()
    }

    fn init(&mut self) {
        let body = [7u32, 38, 0x2_0000, 0].map(u32::to_le_bytes).concat();
        let (error, reply) = self.ask(26, 0, &body);
        assert_eq!((error, &reply[..4]), (0, &7u32.to_le_bytes()[..]));
    }

    fn look_up(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let (error, reply) = self.ask(1, parent, &[name.as_bytes(), b"\0"].concat());
        if error != 0 { Err(-error) } else { Ok(u64::from_le_bytes(reply[..8].try_into().unwrap())) }
    }

    /// The machine's end: the server ends by itself.
    fn end(mut self) {
        drop(self.frontend.take());
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            if let Some(status) = self.server.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the server goes on");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "{status}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

trait SpawnWith {
    fn spawn_with(&mut self, fd: &std::os::fd::OwnedFd) -> Child;
}

impl SpawnWith for Command {
    /// Starts the program with a descriptor that it inherits.
    fn spawn_with(&mut self, fd: &std::os::fd::OwnedFd) -> Child {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
        let child = self.spawn().unwrap();
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).unwrap();
        child
    }
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

#[test]
fn a_machine_reads_what_it_was_granted_until_that_is_taken_back() {
    let mut machine = Machine::start();
    machine.init();
    assert_eq!(machine.look_up(1, "tree"), Err(libc::ENOENT));
    let tree = machine.folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    machine.grant("tree", &tree);
    let grant = machine.look_up(1, "tree").unwrap();
    let file = machine.look_up(grant, "file").unwrap();
    let (error, opened) = machine.ask(14, file, &[0; 8]);
    assert_eq!(error, 0);
    let read = [&opened[..8], &0u64.to_le_bytes(), &4096u32.to_le_bytes(), &[0; 20]].concat();
    let (error, content) = machine.ask(15, file, &read);
    assert_eq!((error, content.as_slice()), (0, &b"content"[..]));
    // A request that another thread finishes.
    let (error, _) = machine.ask(20, file, &[&opened[..8], &[0; 8]].concat());
    assert_eq!(error, 0);
    let status = machine.client.status().unwrap();
    assert_eq!((status.serving, status.nodes, status.open), (true, 2, 1));
    assert!(status.namespaces);
    machine.client.revoke(GrantId::try_from("tree".to_owned()).unwrap()).unwrap();
    assert_eq!(machine.ask(15, file, &read).0, -libc::EBADF);
    assert_eq!(machine.look_up(grant, "file"), Err(libc::ESTALE));
    machine.end();
}

#[test]
fn a_daemon_that_comes_back_finds_the_grants() {
    let mut machine = Machine::start();
    machine.init();
    machine.grant("a", machine.folder.path());
    // A new client takes over; the machine goes on.
    machine.client = Client::connect(&machine.folder.path().join("control"), || ()).unwrap();
    let status = machine.client.status().unwrap();
    assert_eq!(status.grants.len(), 1);
    assert!(machine.look_up(1, "a").is_ok());
    machine.grant("b", machine.folder.path());
    assert!(machine.look_up(1, "b").is_ok());
    machine.end();
}

#[test]
fn what_a_broken_guest_asks_is_answered_or_left() {
    let mut machine = Machine::start();
    machine.init();
    // No room for an answer, no request, an unknown operation, a length that is a lie.
    for (request, reply) in [(40, 0), (40, 8), (0, 4096), (3, 4096)] {
        machine.write(&descriptor(REQUEST, request, 1, 1), RING);
        machine.write(&descriptor(REPLY, reply, 2, 0), RING + 16);
        machine.offer(0);
        machine.answered();
    }
    assert_eq!(machine.ask(9999, 1, &[]).0, -libc::ENOSYS);
    let mut lie = [0; 40];
    lie[..4].copy_from_slice(&0xffff_u32.to_le_bytes());
    lie[4] = 1;
    machine.write(&lie, REQUEST);
    machine.write(&descriptor(REQUEST, 40, 1, 1), RING);
    machine.write(&descriptor(REPLY, 4096, 2, 0), RING + 16);
    machine.offer(0);
    assert_eq!(machine.answered(), 16);
    assert_eq!(machine.look_up(1, "none"), Err(libc::ENOENT));
    // An index that makes no sense ends the ring, not the server.
    machine.write(&(machine.sent.wrapping_add(1000)).to_le_bytes(), AVAILABLE + 2);
    machine.kick.write(1).unwrap();
    assert!(machine.client.status().unwrap().serving);
    machine.end();
}

#[test]
fn a_server_that_nobody_needs_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let listener = control::listen(&path).unwrap();
    let mut server = Command::new("sh")
        .args(["-c", &format!("exec \"$0\" 3<&{}", listener.as_raw_fd()), env!("CARGO_BIN_EXE_coracle-fsd")])
        .spawn_with(&listener);
    drop(Client::connect(&path, || ()).unwrap());
    assert!(server.wait().unwrap().success());
}

#[test]
fn a_server_without_a_control_socket_says_so() {
    let output = Command::new("sh")
        .args(["-c", "exec \"$0\" 3<&-", env!("CARGO_BIN_EXE_coracle-fsd")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("started by the daemon, not by hand"), "{text}");
}
