//! Entry points for fuzzers: a hostile guest, driven by bytes alone. They panic where something must not be. The unit tests run them for a
//! moment, `file-server/fuzz` for as long as one likes.
//!
//! What is granted stands beside something secret; no answer may contain that, and nothing beside the grant may change.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::Server;
use rustix::fs::{CWD, Mode, OFlags};
use virtio_queue::QueueT;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::control::{FromClient, Grant, GrantId, GrantKind, Owners};
use crate::device::{Memory, Ring, requests_for};
use crate::fs::{Exported, Identity, Proc};

/// Guest memory, in bytes.
const MEMORY: usize = 0x20_0000;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x10_0000;
const REPLY_LEN: u32 = 0x8_0000;
const QUEUE_SIZE: u16 = 16;

const SECRET: &[u8] = b"not to be seen inside";

/// Names that a guest may send: some are there, some mean trouble.
const NAMES: [&[u8]; 16] = [
    b"file",
    b"directory",
    b"link",
    b"g",
    b"ro",
    b"new",
    b"deep",
    b"pipe",
    b"..",
    b".",
    b"",
    b"a/b",
    b"../secret",
    b"/",
    b"\xff\xfe",
    b"out",
];

struct Guest {
    folder: tempfile::TempDir,
    memory: Memory,
    ring: Ring,
    served: u16,
}

impl Guest {
    fn new(kept: bool) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("directory/deep")).expect("a tree");
        fs::write(folder.path().join("secret"), SECRET).expect("a secret");
        fs::write(tree.join("file"), "content").expect("a file");
        std::os::unix::fs::symlink("../secret", tree.join("link")).expect("a link");
        std::os::unix::fs::symlink(folder.path(), tree.join("out")).expect("a link");
        rustix::fs::mknodat(CWD, tree.join("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
            .expect("a pipe");
        let identity = Identity::of_process().expect("an identity");
        let files = Exported::new(Proc::ABSOLUTE, identity, 64);
        let owners = if kept || !identity.is_root() { Owners::Kept { uid: 0, gid: 0 } } else { Owners::Real };
        for (id, read_only) in [("g", false), ("ro", true)] {
            let fd = rustix::fs::openat(CWD, &tree, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .expect("a tree");
            let id = GrantId::try_from(id.to_owned()).expect("a name");
            files.grant(Grant { id, kind: GrantKind::Directory, read_only, owners }, fd).expect("a grant");
        }
        let mapped = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let memory = Memory::new(mapped);
        let requests = requests_for(Server::new(Arc::new(files))).expect("threads");
        let mut ring = Ring::new(memory.clone(), requests);
        ring.configure(|queue| {
            queue.set_size(QUEUE_SIZE);
            queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).expect("an address");
            queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).expect("an address");
            queue.try_set_used_ring_address(GuestAddress(USED)).expect("an address");
            queue.set_ready(true);
        });
        Self { folder, memory, ring, served: 0 }
    }

    fn write(&self, bytes: &[u8], at: u64) {
        use vm_memory::GuestAddressSpace;
        self.memory.memory().write_slice(bytes, GuestAddress(at)).expect("it fits");
    }

    /// Sends a message as a kernel would; what is answered.
    fn send(&mut self, message: &[u8]) -> Vec<u8> {
        use vm_memory::GuestAddressSpace;
        let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                .concat()
        };
        self.write(message, REQUEST);
        self.write(&[0; size_of::<OutHeader>()], REPLY);
        self.write(&descriptor(REQUEST, message.len() as u32, 1, 1), DESCRIPTORS);
        self.write(&descriptor(REPLY, REPLY_LEN, 2, 0), DESCRIPTORS + 16);
        self.write(&0u16.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(self.served % QUEUE_SIZE));
        self.served = self.served.wrapping_add(1);
        self.write(&self.served.to_le_bytes(), AVAILABLE + 2);
        self.ring.serve_now();
        let header: OutHeader = self.memory.memory().read_obj(GuestAddress(REPLY)).expect("a header");
        let mut reply = vec![0; (header.len as usize).min(REPLY_LEN as usize)];
        self.memory.memory().read_slice(&mut reply, GuestAddress(REPLY)).expect("a reply");
        reply
    }

    /// Nothing beside the grant has changed.
    fn check(&self, reply: &[u8]) {
        assert!(!reply.windows(SECRET.len()).any(|part| part == SECRET), "the secret is out");
    }

    fn check_outside(&self) {
        let names = |path: &Path| fs::read_dir(path).expect("a folder").count();
        assert_eq!(names(self.folder.path()), 2, "something was made beside the grant");
        assert_eq!(fs::read(self.folder.path().join("secret")).expect("a secret"), SECRET);
    }
}

/// What a guest knows: the ids and handles that it was given.
struct Known {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

/// A stream of choices.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        // Small numbers, which make sense, and enormous ones.
        match self.byte() {
            small @ 0..=199 => u64::from(small),
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    fn pick(&mut self, known: &[u64]) -> u64 {
        match self.byte() {
            255 => self.number(),
            index => known[usize::from(index) % known.len()],
        }
    }

    fn name(&mut self) -> Vec<u8> {
        let choice = self.byte();
        let mut name = NAMES[usize::from(choice) % NAMES.len()].to_vec();
        match choice / 64 {
            // Without its end, or with one within.
            2 => name.insert(0, 0),
            3 if choice.is_multiple_of(8) => return name,
            _ => {}
        }
        name.push(0);
        name
    }
}

/// A guest's kernel that sends any messages, with ids and handles that it was given or that it makes up.
pub fn messages(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let mut guest = Guest::new(choices.byte() & 1 != 0);
    let mut known = Known { nodes: vec![1], handles: vec![0] };
    let mut unique = 0;
    while !choices.0.is_empty() {
        unique += 2;
        let message = message(&mut choices, &known, unique);
        let operation = u32::from_le_bytes([message[4], message[5], message[6], message[7]]);
        let reply = guest.send(&message);
        guest.check(&reply);
        learn(&mut known, operation, &reply);
    }
    guest.check_outside();
}

/// The parts of a request: how many numbers, and how many names.
fn shape(operation: u32) -> (usize, usize) {
    let is = |which: &[Opcode]| which.iter().any(|opcode| *opcode as u32 == operation);
    if is(&[Opcode::Lookup, Opcode::Unlink, Opcode::Rmdir, Opcode::Removexattr]) {
        (0, 1)
    } else if is(&[Opcode::Symlink]) {
        (0, 2)
    } else if is(&[Opcode::Mkdir, Opcode::Link, Opcode::Getxattr, Opcode::Setxattr]) {
        (1, 1)
    } else if is(&[Opcode::Mknod, Opcode::Create]) {
        (2, 1)
    } else if is(&[Opcode::Rename]) {
        (1, 2)
    } else if is(&[Opcode::Rename2]) {
        (2, 2)
    } else {
        (11, 0)
    }
}

fn message(choices: &mut Choices<'_>, known: &Known, unique: u64) -> Vec<u8> {
    let operation = u32::from(choices.byte() % 54);
    let nodeid = choices.pick(&known.nodes);
    let (numbers, names) = shape(operation);
    let mut body = Vec::new();
    for index in 0..numbers {
        let number = match index {
            0 if names == 0 => choices.pick(&known.handles),
            0 => choices.pick(&known.nodes),
            // Nobody's disk shall be filled.
            _ if operation == Opcode::Fallocate as u32 => choices.number() & 0xf_ffff,
            _ => choices.number(),
        };
        body.extend(number.to_le_bytes());
    }
    for _ in 0..names {
        body.extend(choices.name());
    }
    let mut len = (size_of::<InHeader>() + body.len()) as u32;
    if choices.byte() == 255 {
        len = choices.number() as u32;
    }
    let header = InHeader { len, opcode: operation, unique, nodeid, uid: 0, gid: 0, pid: 1, padding: 0 };
    let mut message = header.as_slice().to_vec();
    message.extend(body);
    message
}

fn learn(known: &mut Known, operation: u32, reply: &[u8]) {
    let header = size_of::<OutHeader>();
    let number = |at: usize| Some(u64::from_le_bytes(reply.get(at..at + 8)?.try_into().ok()?));
    if reply.len() <= header || known.nodes.len() > 200 {
        return;
    }
    let is = |which: &[Opcode]| which.iter().any(|opcode| *opcode as u32 == operation);
    if is(&[Opcode::Lookup, Opcode::Mkdir, Opcode::Mknod, Opcode::Symlink, Opcode::Link, Opcode::Create]) {
        known.nodes.extend(number(header));
    }
    if is(&[Opcode::Open, Opcode::Opendir]) {
        known.handles.extend(number(header));
    }
    if is(&[Opcode::Create]) {
        known.handles.extend(number(header + 128));
    }
}

/// Serves a ring, tables and buffers that consist of these bytes.
pub fn ring(bytes: &[u8]) {
    let mut guest = Guest::new(false);
    guest.write(&bytes[..bytes.len().min(MEMORY)], 0);
    guest.ring.serve_now();
    guest.ring.serve_now();
    guest.check_outside();
}

/// Any bytes as a control message: it is refused, or survives being written and read again.
pub fn control_message(bytes: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<FromClient>(bytes) {
        let text = serde_json::to_vec(&message).expect("it can be written");
        assert_eq!(serde_json::from_slice::<FromClient>(&text).expect("it can be read"), message);
    }
}

/// Any bytes as the kept owner of a file.
pub fn record(bytes: &[u8]) {
    crate::fs::fuzz_record(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::ffi::CString;

    fn lookup(guest: &mut Guest, parent: u64, name: &[u8]) -> (i32, u64) {
        let mut body = name.to_vec();
        body.push(0);
        let len = (size_of::<InHeader>() + body.len()) as u32;
        let header =
            InHeader { len, opcode: Opcode::Lookup as u32, unique: 2, nodeid: parent, ..InHeader::default() };
        let reply = guest.send(&[header.as_slice(), &body].concat());
        let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
        let node = reply.get(16..24).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
        (error, node)
    }

    #[test]
    fn a_hostile_kernel_gets_errors_for_names_that_are_none_and_ids_it_was_not_given() {
        let mut guest = Guest::new(true);
        let (error, grant) = lookup(&mut guest, 1, b"g");
        assert_eq!(error, 0);
        assert!(lookup(&mut guest, grant, b"file").1 > 1);
        for name in NAMES.iter().filter(|name| name.contains(&b'/') || matches!(**name, b"" | b"." | b"..")) {
            for parent in [1, grant] {
                assert_eq!(lookup(&mut guest, parent, name).0, -libc::EINVAL, "{name:?}");
            }
        }
        let (_, link) = lookup(&mut guest, grant, b"out");
        assert_eq!(lookup(&mut guest, link, b"secret").0, -libc::ENOTDIR);
        let (_, file) = lookup(&mut guest, grant, b"file");
        assert_eq!(lookup(&mut guest, file, b"x").0, -libc::ENOTDIR);
        for unknown in [0, 99, u64::MAX] {
            assert_eq!(lookup(&mut guest, unknown, b"file").0, -libc::ESTALE);
        }
        let long = CString::new(vec![b'x'; 300]).unwrap();
        assert_eq!(lookup(&mut guest, grant, long.as_bytes()).0, -libc::ENAMETOOLONG);
        guest.check_outside();
    }

    proptest! {
        #[test]
        fn no_sequence_of_messages_leaves_the_grant(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            messages(&bytes);
        }

        #[test]
        fn no_ring_does_harm(bytes in proptest::collection::vec(any::<u8>(), 0..0x4000)) {
            ring(&bytes);
        }
    }
}
