//! Nothing but what is granted can be reached, as long as it is granted.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coracle_file_server::control::{ClientError, Grant, GrantKind};
use coracle_file_server::fs::VALID;
use rustix::fs::{CWD, Mode, OFlags};

use crate::Case;
use crate::host::{Mounted, name};

pub(crate) const CASES: &[Case] = &[
    ("what is not granted is not there", not_granted),
    ("a grant that is read-only refuses every change", read_only),
    ("a single file is granted alone", single_file),
    ("one file is one file through several grants", several_grants),
    ("a grant that is taken back is closed", revoked),
    ("a grant that is taken back leaves others of the same files alone", revoked_beside),
    ("grants that make no sense are refused", bad_grants),
    ("links that the host swaps in are never followed", swapped_links),
    ("between grants nothing is moved or linked", between_grants),
    ("changes of the host are seen within the bound", coherent),
    ("other devices beneath are shown, and their files are others", other_devices),
];

fn not_granted(m: &Mounted) {
    fs::write(m.folder.path().join("secret"), "secret").unwrap();
    assert!(fs::read(m.root.join("secret")).is_err());
    assert!(fs::read(m.root.join("other/secret")).is_err());
    // `..` and links are the client's own affair: it never asks the server to go there.
    symlink(m.folder.path().join("secret"), m.outside.join("absolute")).unwrap();
    symlink("../secret", m.outside.join("relative")).unwrap();
    assert!(fs::read(m.inside.join("relative")).is_err());
    assert!(fs::read(m.inside.join("../secret")).is_err());
    assert_eq!(fs::read_link(m.inside.join("relative")).unwrap().as_os_str(), "../secret");
}

fn read_only(m: &Mounted) {
    let tree = m.folder.path().join("ro");
    fs::create_dir_all(tree.join("d")).unwrap();
    fs::write(tree.join("f"), "content").unwrap();
    m.grant("ro", &tree, true);
    let at = |name: &str| m.root.join("ro").join(name);
    assert_eq!(fs::read(at("f")).unwrap(), b"content");
    let refused = |result: std::io::Result<()>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS));
    };
    refused(fs::write(at("f"), "x"));
    refused(File::options().append(true).open(at("f")).map(drop));
    refused(fs::write(at("new"), "x"));
    refused(fs::create_dir(at("new")));
    refused(fs::remove_file(at("f")));
    refused(fs::remove_dir(at("d")));
    refused(fs::rename(at("f"), at("g")));
    refused(fs::hard_link(at("f"), at("g")));
    refused(symlink("x", at("l")));
    refused(fs::set_permissions(at("f"), std::os::unix::fs::PermissionsExt::from_mode(0o600)));
    refused(std::os::unix::fs::chown(at("f"), Some(1), Some(1)));
    refused(
        rustix::fs::setxattr(at("f"), "user.a", b"", rustix::fs::XattrFlags::empty()).map_err(Into::into),
    );
    assert_eq!(fs::read_dir(&tree).unwrap().count(), 2);
}

fn single_file(m: &Mounted) {
    let file = m.folder.path().join("config");
    fs::write(&file, "one").unwrap();
    let owner = fs::metadata(&m.outside).unwrap();
    std::os::unix::fs::MetadataExt::uid(&owner);
    std::os::unix::fs::chown(&file, Some(std::os::unix::fs::MetadataExt::uid(&owner)), None).unwrap();
    m.grant("file", &file, false);
    let inside = m.root.join("file");
    assert_eq!(fs::read(&inside).unwrap(), b"one");
    fs::write(&inside, "two").unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"two");
    assert!(fs::remove_file(&inside).is_err() && fs::rename(&inside, m.root.join("x")).is_err());
    // As with any bind mount of a file: it is this one, also when another takes its name.
    fs::write(m.folder.path().join("new"), "three").unwrap();
    fs::rename(m.folder.path().join("new"), &file).unwrap();
    assert_eq!(fs::read(&inside).unwrap(), b"two");
}

fn several_grants(m: &Mounted) {
    fs::create_dir(m.inside.join("sub")).unwrap();
    fs::write(m.inside.join("sub/f"), "x").unwrap();
    m.grant("sub", &m.outside.join("sub"), true);
    let (whole, part) = (m.inside.join("sub/f"), m.root.join("sub/f"));
    let first = File::options().read(true).write(true).open(&whole).unwrap();
    let second = File::open(&part).unwrap();
    first.lock().unwrap();
    assert!(second.try_lock().is_err(), "locks are shared");
    first.write_all_at(b"new", 0).unwrap();
    let mut text = [0; 3];
    second.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"new", "and pages");
    m.client.revoke(name("sub")).unwrap();
    assert_eq!(fs::read(&whole).unwrap(), b"new");
    first.write_all_at(b"two", 0).unwrap();
}

fn revoked(m: &Mounted) {
    let tree = m.folder.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/f"), "x").unwrap();
    let before = m.server_descriptors();
    m.grant("tree", &tree, false);
    let inside = m.root.join("tree");
    let mut open = File::open(inside.join("a/b/f")).unwrap();
    let directory = fs::read_dir(inside.join("a")).unwrap();
    assert!(m.server_descriptors() > before);
    m.client.revoke(name("tree")).unwrap();
    assert_eq!(m.server_descriptors(), before, "all of its descriptors are closed");
    let mut text = String::new();
    assert!(open.read_to_string(&mut text).is_err());
    assert!(File::open(inside.join("a/b/f")).is_err());
    assert!(fs::write(inside.join("new"), "").is_err());
    assert!(!tree.join("new").exists());
    std::thread::sleep(VALID + Duration::from_millis(100));
    assert_eq!(fs::metadata(&inside).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    drop((open, directory));
    // The same name can be granted again.
    m.grant("tree", &tree, false);
    assert_eq!(fs::read(inside.join("a/b/f")).unwrap(), b"x");
}

fn revoked_beside(m: &Mounted) {
    fs::create_dir_all(m.outside.join("sub/deep")).unwrap();
    for owned in ["sub", "sub/deep"] {
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&m.outside).unwrap());
        std::os::unix::fs::chown(m.outside.join(owned), Some(owner), None).unwrap();
    }
    let open = |path: std::path::PathBuf| {
        rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    };
    let held = [m.inside.clone(), m.inside.join("sub"), m.inside.join("sub/deep")].map(open);
    // The same directory, and one beneath it, each found through its second grant last.
    for (id, tree) in [("again", m.outside.clone()), ("sub", m.outside.join("sub"))] {
        m.grant(id, &tree, false);
        assert!(fs::read_dir(m.root.join(id)).unwrap().count() > 0);
        m.client.revoke(name(id)).unwrap();
        for directory in &held {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(directory, format!("made-after-{id}"), flags, Mode::from_raw_mode(0o600))
                .unwrap();
            rustix::fs::fstat(directory).unwrap();
        }
    }
    for made in ["made-after-again", "sub/made-after-sub", "sub/deep/made-after-sub"] {
        assert!(m.outside.join(made).exists(), "{made}");
    }
}

fn bad_grants(m: &Mounted) {
    let open = |path: &std::path::Path, flags| {
        rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    };
    let grant = |id: &str, kind| Grant { id: name(id), kind, read_only: false, owners: m.owners() };
    let refused = |result: Result<(), ClientError>, words: &str| {
        assert!(
            matches!(&result, Err(ClientError::Refused { reason, .. }) if reason.contains(words)),
            "{result:?}"
        );
    };
    use std::os::fd::AsFd;
    let tree = open(&m.outside, OFlags::PATH);
    m.client.grant(grant("g", GrantKind::Directory), tree.as_fd()).unwrap();
    let otherwise = Grant { read_only: true, ..grant("g", GrantKind::Directory) };
    refused(m.client.grant(otherwise, tree.as_fd()), "granted already");
    let other = open(m.folder.path(), OFlags::PATH);
    refused(m.client.grant(grant("g", GrantKind::Directory), other.as_fd()), "granted already");
    refused(m.client.grant(grant("x", GrantKind::File), tree.as_fd()), "not a regular file");
    let readable = open(&m.outside, OFlags::RDONLY);
    refused(
        m.client.grant(grant("x", GrantKind::Directory), readable.as_fd()),
        "not a directory, opened with O_PATH",
    );
    let device = open(std::path::Path::new("/dev/null"), OFlags::PATH);
    refused(m.client.grant(grant("x", GrantKind::File), device.as_fd()), "not a regular file");
    refused(m.client.revoke(name("x")), "not granted");
    if m.who == crate::host::Who::User {
        let real =
            Grant { owners: coracle_file_server::control::Owners::Real, ..grant("x", GrantKind::Directory) };
        refused(m.client.grant(real, tree.as_fd()), "does not run as root");
    }
    let others = coracle_file_server::control::Owners::Kept { uid: 7, gid: 7 };
    let others = Grant { owners: others, ..grant("x", GrantKind::Directory) };
    refused(m.client.grant(others, tree.as_fd()), "cannot have other owners than g");
    let status = m.client.status().unwrap();
    assert_eq!(status.grants.len(), 1);
    assert!(!status.serving);
}

fn swapped_links(m: &Mounted) {
    let secret = m.folder.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("f"), "secret").unwrap();
    fs::create_dir(m.outside.join("d")).unwrap();
    fs::write(m.outside.join("d/f"), "public").unwrap();
    symlink(&secret, m.outside.join("link")).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let (d, link) = (m.outside.join("d"), m.outside.join("link"));
                for _ in 0..2 {
                    rustix::fs::renameat_with(CWD, &d, CWD, &link, rustix::fs::RenameFlags::EXCHANGE)
                        .unwrap();
                }
                // Most of the time it is the directory, so that the client gets somewhere.
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let until = Instant::now() + Duration::from_secs(2);
        let mut read = 0;
        while Instant::now() < until {
            // A client that looks `d` up as a directory and goes on from there, as the kernel does; the link itself it would follow.
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let Ok(directory) = rustix::fs::openat(CWD, m.inside.join("d"), flags, Mode::empty()) else {
                continue;
            };
            let Ok(file) = rustix::fs::openat(&directory, "f", OFlags::CLOEXEC, Mode::empty()) else {
                continue;
            };
            let mut text = String::new();
            if File::from(file).read_to_string(&mut text).is_ok() {
                assert_eq!(text, "public");
                read += 1;
            }
        }
        over.store(true, Ordering::Relaxed);
        assert!(read > 0);
    });
}

fn between_grants(m: &Mounted) {
    let other = m.folder.path().join("other");
    fs::create_dir(&other).unwrap();
    std::os::unix::fs::chown(
        &other,
        Some(std::os::unix::fs::MetadataExt::uid(&fs::metadata(&m.outside).unwrap())),
        None,
    )
    .unwrap();
    m.grant("other", &other, false);
    fs::write(m.inside.join("f"), "x").unwrap();
    let code = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    assert_eq!(code(fs::rename(m.inside.join("f"), m.root.join("other/f"))), Some(libc::EXDEV));
    assert_eq!(code(fs::hard_link(m.inside.join("f"), m.root.join("other/f"))), Some(libc::EXDEV));
}

/// What the test machine may be late by.
const LATE: Duration = Duration::from_millis(500);

fn coherent(m: &Mounted) {
    let (inside, outside) = (m.inside.join("f"), m.outside.join("f"));
    // What was not there is seen at once.
    assert!(!inside.exists());
    fs::write(&outside, "one").unwrap();
    assert_eq!(fs::read(&inside).unwrap(), b"one");
    let mut open = File::open(&inside).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    // Content of the same length is seen by who opens the file, at once.
    std::thread::sleep(Duration::from_millis(50));
    fs::write(&outside, "two").unwrap();
    assert_eq!(fs::read(&inside).unwrap(), b"two");
    // Everything else within the bound, and by who has it open, too.
    fs::write(&outside, "three and more").unwrap();
    let started = Instant::now();
    while fs::read(&inside).unwrap() != b"three and more" {
        assert!(started.elapsed() < VALID + LATE);
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut all = vec![0; 14];
    open.read_exact_at(&mut all, 0).unwrap();
    assert_eq!(all, b"three and more");
    fs::remove_file(&outside).unwrap();
    fs::create_dir(&outside).unwrap();
    let started = Instant::now();
    while !fs::metadata(&inside).is_ok_and(|metadata| metadata.is_dir()) {
        assert!(started.elapsed() < VALID + LATE);
        std::thread::sleep(Duration::from_millis(10));
    }
    // What is written inside is there at once.
    let mut file = File::create(m.inside.join("g")).unwrap();
    file.write_all(b"now").unwrap();
    assert_eq!(fs::read(m.outside.join("g")).unwrap(), b"now");
    // Pages of a file that has not changed are read again without asking the server.
    let started = Instant::now();
    fs::write(m.inside.join("cached"), vec![b'x'; 1 << 20]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    fs::read(m.inside.join("cached")).unwrap();
    let server = m.server.lock().unwrap().id();
    let io = || {
        let text = fs::read_to_string(format!("/proc/{server}/io")).unwrap();
        text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok()).unwrap()
    };
    let before = io();
    for _ in 0..10 {
        fs::read(m.inside.join("cached")).unwrap();
    }
    let read = io() - before;
    assert!(read < 1 << 20, "{read} bytes were read in {:?}", started.elapsed());
}

fn other_devices(m: &Mounted) {
    use std::os::unix::fs::MetadataExt;
    // Two file systems with the same inode numbers. They are mounted in the test's namespace, where the grant's directory is.
    let mut numbers = Vec::new();
    for name in ["one", "two"] {
        let place = m.outside.join(name);
        fs::create_dir(&place).unwrap();
        let flags = rustix::mount::MountFlags::NOSUID;
        rustix::mount::mount("t", &place, "tmpfs", flags, Some(c"mode=777")).unwrap();
        fs::write(place.join("f"), name).unwrap();
        assert_eq!(fs::read_to_string(m.inside.join(name).join("f")).unwrap(), name);
        numbers.push(fs::metadata(m.inside.join(name).join("f")).unwrap().ino());
    }
    assert_ne!(numbers[0], numbers[1]);
    for name in ["one", "two"] {
        rustix::mount::unmount(m.outside.join(name), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}
