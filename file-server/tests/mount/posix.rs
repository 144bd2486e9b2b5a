//! What POSIX and Linux say of files.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};

use rustix::fs::{AtFlags, CWD, FallocateFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

use crate::Case;
use crate::host::Mounted;

pub(crate) const CASES: &[Case] = &[
    ("files are written and read on both sides", both_sides),
    ("errors are those that Linux gives", errors),
    ("names are moved, exchanged and not replaced as asked", renames),
    ("unlinked files live while they are open", unlinked),
    ("hard links are one file", hard_links),
    ("symbolic links are text", symbolic_links),
    ("holes, allocation and truncation", holes),
    ("appends go to the end wherever it is", appends),
    ("a file that may only be read can be made for writing", read_only_create),
    ("names are bytes", names_are_bytes),
    ("users' attributes are kept, others are not", attributes),
    ("times are set and kept", times),
    ("shared mappings reach the file", mappings),
    ("locks hold between processes", locks),
    ("large directories are listed once and wholly while they change", large_directories),
    ("the file system has a size", size_of_file_system),
];

fn both_sides(m: &Mounted) {
    fs::write(m.inside.join("a"), "from inside").unwrap();
    assert_eq!(fs::read_to_string(m.outside.join("a")).unwrap(), "from inside");
    fs::write(m.outside.join("b"), "from outside").unwrap();
    assert_eq!(fs::read_to_string(m.inside.join("b")).unwrap(), "from outside");
    fs::create_dir_all(m.inside.join("d/e/f")).unwrap();
    let big: Vec<u8> = (0..5_000_000u32).map(|number| (number % 251) as u8).collect();
    fs::write(m.inside.join("d/e/f/big"), &big).unwrap();
    assert!(fs::read(m.outside.join("d/e/f/big")).unwrap() == big);
    assert!(fs::read(m.inside.join("d/e/f/big")).unwrap() == big);
    fs::remove_dir_all(m.inside.join("d")).unwrap();
    assert!(!m.outside.join("d").exists());
}

fn errors(m: &Mounted) {
    let at = |name: &str| m.inside.join(name);
    fs::write(at("f"), "").unwrap();
    fs::create_dir(at("d")).unwrap();
    fs::write(at("d/x"), "").unwrap();
    let code = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    assert_eq!(code(fs::create_dir(at("d"))), libc::EEXIST);
    assert_eq!(code(fs::remove_dir(at("d"))), libc::ENOTEMPTY);
    assert_eq!(code(fs::remove_dir(at("f"))), libc::ENOTDIR);
    assert_eq!(code(fs::remove_file(at("d"))), libc::EISDIR);
    assert_eq!(code(fs::remove_file(at("none"))), libc::ENOENT);
    assert_eq!(code(fs::rename(at("f"), at("d"))), libc::EISDIR);
    assert_eq!(code(fs::rename(at("d"), at("d/sub"))), libc::EINVAL);
    assert_eq!(code(fs::create_dir(at(&"n".repeat(256)))), libc::ENAMETOOLONG);
    assert_eq!(code(File::open(at("f/x")).map(drop)), libc::ENOTDIR);
    assert_eq!(code(File::create(at("d")).map(drop)), libc::EISDIR);
    assert_eq!(code(File::create_new(at("f")).map(drop)), libc::EEXIST);
    // The exported root is not for changing.
    assert!(fs::write(m.root.join("new"), "").is_err());
    assert!(fs::create_dir(m.root.join("new")).is_err());
    assert!(fs::remove_dir(m.root.join("g")).is_err());
    assert!(m.root.join("g").is_dir());
    assert_eq!(fs::read_dir(&m.root).unwrap().count(), 0);
}

fn renames(m: &Mounted) {
    let at = |name: &str| m.inside.join(name);
    fs::write(at("a"), "a").unwrap();
    fs::write(at("b"), "b").unwrap();
    let with = |flags| rustix::fs::renameat_with(CWD, at("a"), CWD, at("b"), flags);
    assert_eq!(with(RenameFlags::NOREPLACE), Err(Errno::EXIST));
    with(RenameFlags::EXCHANGE).unwrap();
    assert_eq!((fs::read(at("a")).unwrap(), fs::read(at("b")).unwrap()), (b"b".into(), b"a".into()));
    let mut open = File::open(at("b")).unwrap();
    fs::rename(at("a"), at("b")).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "a", "the file that was replaced stays open");
    assert_eq!(fs::read(at("b")).unwrap(), b"b");
    fs::create_dir_all(at("x/y")).unwrap();
    fs::write(at("x/y/z"), "deep").unwrap();
    fs::rename(at("x"), at("moved")).unwrap();
    assert_eq!(fs::read(at("moved/y/z")).unwrap(), b"deep");
    // The host moves a directory under the client's feet.
    fs::rename(m.outside.join("moved"), m.outside.join("again")).unwrap();
    assert_eq!(fs::read(at("again/y/z")).unwrap(), b"deep");
}

fn unlinked(m: &Mounted) {
    let path = m.inside.join("f");
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.write_all(b"one").unwrap();
    fs::remove_file(&path).unwrap();
    file.write_all(b"two").unwrap();
    file.set_len(5).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 5);
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "onetw");
    fs::write(&path, "new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

fn hard_links(m: &Mounted) {
    let at = |name: &str| m.inside.join(name);
    fs::write(at("a"), "x").unwrap();
    fs::create_dir(at("d")).unwrap();
    fs::hard_link(at("a"), at("d/b")).unwrap();
    let (a, b) = (fs::metadata(at("a")).unwrap(), fs::metadata(at("d/b")).unwrap());
    assert_eq!((a.ino(), a.nlink()), (b.ino(), 2));
    fs::write(at("d/b"), "longer").unwrap();
    assert_eq!(fs::read(at("a")).unwrap(), b"longer");
    fs::remove_file(at("a")).unwrap();
    assert_eq!(fs::read(at("d/b")).unwrap(), b"longer");
}

fn symbolic_links(m: &Mounted) {
    let at = |name: &str| m.inside.join(name);
    symlink("target/../elsewhere", at("l")).unwrap();
    assert_eq!(fs::read_link(at("l")).unwrap().as_os_str(), "target/../elsewhere");
    assert_eq!(fs::read_link(m.outside.join("l")).unwrap().as_os_str(), "target/../elsewhere");
    assert!(fs::symlink_metadata(at("l")).unwrap().is_symlink());
    fs::hard_link(at("l"), at("l2")).unwrap();
    assert!(fs::symlink_metadata(m.outside.join("l2")).unwrap().is_symlink());
    fs::write(at("elsewhere"), "x").unwrap();
    symlink("elsewhere", at("good")).unwrap();
    assert_eq!(fs::read(at("good")).unwrap(), b"x");
    let long = "x/".repeat(2000);
    symlink(&long, at("long")).unwrap();
    assert_eq!(fs::read_link(at("long")).unwrap().as_os_str(), long.as_str());
}

fn holes(m: &Mounted) {
    let path = m.inside.join("sparse");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(10 << 20).unwrap();
    file.write_all_at(b"data", 5 << 20).unwrap();
    assert!(fs::metadata(m.outside.join("sparse")).unwrap().blocks() < 100);
    let seek = |to| rustix::fs::seek(&file, to);
    assert_eq!(seek(rustix::fs::SeekFrom::Data(0)), Ok(5 << 20));
    assert!(seek(rustix::fs::SeekFrom::Hole(5 << 20)).unwrap() <= (5 << 20) + 65536);
    assert_eq!(seek(rustix::fs::SeekFrom::Data(6 << 20)), Err(Errno::NXIO));
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert!(fs::metadata(m.outside.join("sparse")).unwrap().blocks() >= 2048);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 5 << 20, 4096).unwrap();
    let mut four = [1; 4];
    file.read_exact_at(&mut four, 5 << 20).unwrap();
    assert_eq!(four, [0; 4]);
    rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 10 << 20, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 10 << 20);
    file.set_len(3).unwrap();
    assert_eq!(fs::metadata(m.outside.join("sparse")).unwrap().len(), 3);
    assert_eq!(rustix::fs::fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096), Err(Errno::OPNOTSUPP));
    fs::write(&path, "").unwrap();
    assert_eq!(fs::metadata(m.outside.join("sparse")).unwrap().len(), 0);
}

fn appends(m: &Mounted) {
    const LINES: usize = 500;
    let write = |path: std::path::PathBuf, word: &'static str| {
        std::thread::spawn(move || {
            let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
            for number in 0..LINES {
                file.write_all(format!("{word} {number}\n").as_bytes()).unwrap();
            }
        })
    };
    fs::write(m.inside.join("log"), "").unwrap();
    let writers = [
        write(m.inside.join("log"), "inside"),
        write(m.outside.join("log"), "outside"),
        write(m.inside.join("log"), "another"),
    ];
    for writer in writers {
        writer.join().unwrap();
    }
    let text = fs::read_to_string(m.outside.join("log")).unwrap();
    for word in ["inside", "outside", "another"] {
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with(word)).collect();
        let expected: Vec<String> = (0..LINES).map(|number| format!("{word} {number}")).collect();
        assert_eq!(lines, expected);
    }
    // A mapping of a file that is open for appending writes to its place.
    assert_eq!(text.lines().count(), 3 * LINES);
}

fn read_only_create(m: &Mounted) {
    let path = m.inside.join("object");
    let mut file = File::options().read(true).write(true).create_new(true).mode(0o444).open(&path).unwrap();
    file.write_all(b"git does this").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "git does this");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o444);
}

fn names_are_bytes(m: &Mounted) {
    for name in [&b"\xff\xfe\x80"[..], b" ", b"a\nb", b"-", b"...", &[b'x'; 255], "ü".as_bytes()] {
        let name = OsStr::from_bytes(name);
        fs::write(m.inside.join(name), "x").unwrap();
        assert!(m.outside.join(name).exists());
        let listed = fs::read_dir(&m.inside).unwrap().any(|entry| entry.unwrap().file_name() == name);
        assert!(listed, "{name:?}");
        fs::remove_file(m.inside.join(name)).unwrap();
    }
}

fn attributes(m: &Mounted) {
    let path = m.inside.join("f");
    fs::write(&path, "").unwrap();
    let set = |name: &str, flags| rustix::fs::setxattr(&path, name, b"value", flags);
    let get = |name: &str| {
        let mut value = [0; 64];
        rustix::fs::getxattr(&path, name, &mut value).map(|len| value[..len].to_vec())
    };
    set("user.a", XattrFlags::CREATE).unwrap();
    assert_eq!(set("user.a", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(set("user.b", XattrFlags::REPLACE), Err(Errno::NODATA));
    assert_eq!(get("user.a").unwrap(), b"value");
    assert_eq!(get("user.b"), Err(Errno::NODATA));
    for name in ["security.capability", "trusted.a", "user.coracle.stat", "user.coracle.new"] {
        assert!(set(name, XattrFlags::empty()).is_err(), "{name}");
    }
    // What the server keeps for itself is not shown.
    rustix::fs::chownat(CWD, &path, Some(rustix::fs::Uid::from_raw(7)), None, AtFlags::empty()).unwrap();
    let mut names = [0; 256];
    let len = rustix::fs::listxattr(&path, &mut names).unwrap();
    assert_eq!(&names[..len], b"user.a\0");
    assert_eq!(rustix::fs::getxattr(m.outside.join("f"), "user.a", &mut names), Ok(5));
    rustix::fs::removexattr(&path, "user.a").unwrap();
    assert_eq!(get("user.a"), Err(Errno::NODATA));
    assert!(rustix::fs::removexattr(&path, "user.coracle.stat").is_err());
}

fn times(m: &Mounted) {
    let path = m.inside.join("f");
    let file = File::create(&path).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_times(fs::FileTimes::new().set_modified(time).set_accessed(time)).unwrap();
    assert_eq!(fs::metadata(m.outside.join("f")).unwrap().modified().unwrap(), time);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), time);
    symlink("x", m.inside.join("l")).unwrap();
    let stamp = rustix::fs::Timespec { tv_sec: 99, tv_nsec: 5 };
    let stamps = rustix::fs::Timestamps { last_access: stamp, last_modification: stamp };
    rustix::fs::utimensat(CWD, m.inside.join("l"), &stamps, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    assert_eq!(fs::symlink_metadata(m.outside.join("l")).unwrap().mtime(), 99);
}

fn mappings(m: &Mounted) {
    let path = m.inside.join("mapped");
    fs::write(&path, vec![b'.'; 8192]).unwrap();
    for append in [false, true] {
        let file = File::options().read(true).write(!append).append(append).open(&path).unwrap();
        use std::os::fd::AsRawFd;
        // SAFETY: a new mapping of two pages of an open file, used within its length, and unmapped at once.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let at =
                libc::mmap(std::ptr::null_mut(), 8192, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert_ne!(at, libc::MAP_FAILED);
            at.cast::<u8>().add(5000).write(b'0' + u8::from(append));
            assert_eq!(libc::msync(at, 8192, libc::MS_SYNC), 0);
            libc::munmap(at, 8192);
        }
        let content = fs::read(m.outside.join("mapped")).unwrap();
        assert_eq!((content.len(), content[5000]), (8192, b'0' + u8::from(append)));
    }
}

fn locks(m: &Mounted) {
    let path = m.inside.join("lock");
    fs::write(&path, "").unwrap();
    let (first, second) = (File::open(&path).unwrap(), File::open(&path).unwrap());
    first.lock().unwrap();
    assert!(matches!(second.try_lock(), Err(fs::TryLockError::WouldBlock)));
    first.unlock().unwrap();
    second.try_lock().unwrap();
}

fn large_directories(m: &Mounted) {
    let directory = m.inside.join("many");
    fs::create_dir(&directory).unwrap();
    for number in 0..10_000 {
        File::create(m.outside.join(format!("many/{number}"))).unwrap();
    }
    let mut seen = std::collections::HashSet::new();
    for (index, entry) in fs::read_dir(&directory).unwrap().enumerate() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(seen.insert(name.clone()), "{name} comes twice");
        // What is listed already goes, and others come, while the list is read.
        if index % 3 == 0 {
            fs::remove_file(directory.join(name)).unwrap();
            File::create(m.outside.join(format!("many/new-{index}"))).unwrap();
        }
    }
    let old = (0..10_000).filter(|number| seen.contains(&number.to_string())).count();
    assert_eq!(old, 10_000);
    let left = fs::read_dir(&directory).unwrap().count();
    assert_eq!(left, fs::read_dir(m.outside.join("many")).unwrap().count());
    fs::remove_dir_all(&directory).unwrap();
    assert!(matches!(fs::read_dir(&directory), Err(error) if error.kind() == ErrorKind::NotFound));
}

fn size_of_file_system(m: &Mounted) {
    let (inside, outside) =
        (rustix::fs::statvfs(&m.inside).unwrap(), rustix::fs::statvfs(&m.outside).unwrap());
    assert_eq!((inside.f_blocks, inside.f_namemax), (outside.f_blocks, outside.f_namemax));
}
