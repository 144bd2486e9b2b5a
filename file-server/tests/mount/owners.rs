//! Whom files belong to, inside and outside.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode};

use crate::Case;
use crate::host::{Mounted, USER, Who, as_user};

pub(crate) const CASES: &[Case] = &[
    ("who makes a file owns it inside, and the server's user outside", made_by),
    ("chown and chmod stick inside", stick),
    ("nobody on the host gets more rights than there were", no_wider),
    ("the host's own changes are seen", host_changes),
    ("privileges are decided by the mode that is shown", decided_inside),
    ("set-group-id directories give their group", set_group_id),
    ("writing takes the set-user-id bit", set_user_id_goes),
    ("pipes, sockets and devices work inside and are no devices outside", special_files),
    ("a file that its owner may not write is written by root inside", unwritable),
    ("links may be given away", links),
];

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

/// What outside belongs to whom, if inside it belongs to `inside`.
fn outside_owner(m: &Mounted, inside: u32) -> (u32, u32) {
    match m.who {
        Who::Root => (inside, inside),
        Who::User => (USER, USER),
    }
}

fn made_by(m: &Mounted) {
    fs::set_permissions(&m.inside, Permissions::from_mode(0o1777)).unwrap();
    for uid in [0, 33, 1000] {
        let name = |what: &str| format!("{what}-{uid}");
        let inside = m.inside.clone();
        let code = as_user(uid, || {
            fs::write(inside.join(name("file")), "x").unwrap();
            fs::create_dir(inside.join(name("dir"))).unwrap();
            fs::write(inside.join(name("dir")).join("sub"), "x").unwrap();
            0
        });
        assert_eq!(code, 0);
        for path in [name("file"), name("dir"), name("dir") + "/sub"] {
            assert_eq!(owner(&m.inside.join(&path)), (uid, uid), "{path}");
            assert_eq!(owner(&m.outside.join(&path)), outside_owner(m, uid), "{path}");
        }
        assert_eq!(mode(&m.inside.join(name("file"))), 0o644);
        assert_eq!(mode(&m.outside.join(name("file"))), 0o644);
        assert_eq!(mode(&m.outside.join(name("dir"))), 0o755);
    }
}

fn stick(m: &Mounted) {
    let path = m.inside.join("f");
    fs::write(&path, "").unwrap();
    chown(&path, Some(999), Some(998)).unwrap();
    for bits in [0o600, 0o444, 0o000, 0o4755, 0o6711, 0o644] {
        fs::set_permissions(&path, Permissions::from_mode(bits)).unwrap();
        assert_eq!((mode(&path), owner(&path)), (bits, (999, 998)), "{bits:o}");
    }
    // It is still so for a client that has never seen it.
    m.grant("again", &m.outside, false);
    let again = m.root.join("again/f");
    assert_eq!((mode(&again), owner(&again)), (0o644, (999, 998)));
    fs::set_permissions(&m.inside, Permissions::from_mode(0o2750)).unwrap();
    chown(&m.inside, Some(5), Some(6)).unwrap();
    assert_eq!((mode(&m.inside), owner(&m.inside)), (0o2750, (5, 6)));
    chown(&m.inside, Some(0), Some(0)).unwrap();
}

fn no_wider(m: &Mounted) {
    if m.who == Who::Root {
        return;
    }
    let secret = m.outside.join("secret");
    fs::write(&secret, "x").unwrap();
    chown(&secret, Some(USER), Some(USER)).unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    let inside = m.inside.join("secret");
    fs::set_permissions(&inside, Permissions::from_mode(0o4777)).unwrap();
    assert_eq!((mode(&inside), mode(&secret)), (0o4777, 0o700));
    fs::set_permissions(&inside, Permissions::from_mode(0o644)).unwrap();
    assert_eq!((mode(&inside), mode(&secret)), (0o644, 0o600));
    // What was made inside may get what the server's umask (022) leaves.
    let made = m.inside.join("made");
    File::options().write(true).create_new(true).mode(0o600).open(&made).unwrap();
    assert_eq!(mode(&m.outside.join("made")), 0o600);
    fs::set_permissions(&made, Permissions::from_mode(0o6777)).unwrap();
    assert_eq!((mode(&made), mode(&m.outside.join("made"))), (0o6777, 0o755));
    fs::set_permissions(&made, Permissions::from_mode(0o000)).unwrap();
    assert_eq!((mode(&made), mode(&m.outside.join("made"))), (0, 0o600));
    // Files of other people on the host stay theirs.
    let other = m.outside.join("other");
    fs::write(&other, "x").unwrap();
    assert_eq!(owner(&m.inside.join("other")), (65534, 65534));
    assert!(fs::set_permissions(m.inside.join("other"), Permissions::from_mode(0o777)).is_err());
    assert!(chown(m.inside.join("other"), Some(0), Some(0)).is_err());
    assert!(fs::write(m.inside.join("other"), "y").is_err());
}

fn host_changes(m: &Mounted) {
    let (inside, outside) = (m.inside.join("f"), m.outside.join("f"));
    fs::write(&inside, "").unwrap();
    chown(&inside, Some(33), Some(33)).unwrap();
    fs::set_permissions(&outside, Permissions::from_mode(0o755)).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!((mode(&inside), owner(&inside)), (0o755, (33, 33)));
    // A record that somebody broke is none.
    if m.who == Who::User {
        rustix::fs::setxattr(&outside, "user.coracle.stat", b"1 0 x", rustix::fs::XattrFlags::empty())
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!((mode(&inside), owner(&inside)), (0o755, (0, 0)));
    }
}

fn decided_inside(m: &Mounted) {
    let path = m.inside.join("private");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    chown(&path, Some(33), Some(33)).unwrap();
    let read = |uid| as_user(uid, || i32::from(fs::read(&path).is_err()));
    assert_eq!([read(33), read(34), read(0)], [0, 1, 0]);
    let inside = m.inside.clone();
    assert_eq!(as_user(34, || i32::from(fs::write(inside.join("new"), "").is_err())), 1);
}

fn set_group_id(m: &Mounted) {
    let directory = m.inside.join("shared");
    fs::create_dir(&directory).unwrap();
    chown(&directory, Some(0), Some(77)).unwrap();
    fs::set_permissions(&directory, Permissions::from_mode(0o2777)).unwrap();
    let inside = directory.clone();
    let code = as_user(1000, || {
        fs::write(inside.join("f"), "").unwrap();
        fs::create_dir(inside.join("d")).unwrap();
        0
    });
    assert_eq!(code, 0);
    assert_eq!(owner(&directory.join("f")), (1000, 77));
    assert_eq!((owner(&directory.join("d")), mode(&directory.join("d")) & 0o2000), ((1000, 77), 0o2000));
}

fn set_user_id_goes(m: &Mounted) {
    let path = m.inside.join("program");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o6777)).unwrap();
    assert_eq!(mode(&path), 0o6777);
    let inside = path.clone();
    let code = as_user(1000, || {
        use std::io::Write;
        let mut file = File::options().append(true).open(&inside).unwrap();
        file.write_all(b"new").unwrap();
        0
    });
    assert_eq!(code, 0);
    assert_eq!(mode(&path), 0o777);
    fs::set_permissions(&path, Permissions::from_mode(0o4755)).unwrap();
    chown(&path, Some(5), Some(5)).unwrap();
    assert_eq!(mode(&path), 0o755);
}

fn special_files(m: &Mounted) {
    let at = |name: &str| m.inside.join(name);
    let make = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, at(name), kind, Mode::from_raw_mode(0o640), device)
    };
    make("pipe", FileType::Fifo, 0).unwrap();
    assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
    let writer = std::thread::spawn({
        let path = at("pipe");
        move || fs::write(path, "through the pipe").unwrap()
    });
    assert_eq!(fs::read_to_string(at("pipe")).unwrap(), "through the pipe");
    writer.join().unwrap();
    let listener = UnixListener::bind(at("socket")).unwrap();
    std::os::unix::net::UnixStream::connect(at("socket")).unwrap();
    listener.accept().unwrap();
    let device = rustix::fs::makedev(1, 7);
    match m.who {
        // A device that root of the host made is one.
        Who::Root => assert!(make("device", FileType::CharacterDevice, device).is_err()),
        Who::User => {
            make("device", FileType::CharacterDevice, device).unwrap();
            let metadata = fs::metadata(at("device")).unwrap();
            assert!(metadata.file_type().is_char_device());
            assert_eq!((metadata.rdev(), mode(&at("device"))), (device, 0o640));
            for name in ["device", "pipe", "socket"] {
                assert!(fs::metadata(m.outside.join(name)).unwrap().is_file(), "{name}");
                assert_eq!(mode(&m.outside.join(name)), 0o600);
            }
        }
    }
    // The host's own are shown, and nobody gets through to them.
    rustix::fs::mknodat(
        CWD,
        m.outside.join("zero"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 5),
    )
    .unwrap();
    assert!(fs::metadata(at("zero")).unwrap().file_type().is_char_device());
    for name in ["pipe", "socket"] {
        fs::remove_file(at(name)).unwrap();
    }
}

fn unwritable(m: &Mounted) {
    let outside = m.outside.join("f");
    fs::write(&outside, "old").unwrap();
    fs::set_permissions(&outside, Permissions::from_mode(0o400)).unwrap();
    if m.who == Who::User {
        chown(&outside, Some(USER), Some(USER)).unwrap();
    }
    fs::write(m.inside.join("f"), "new").unwrap();
    assert_eq!(fs::read_to_string(&outside).unwrap(), "new");
    assert_eq!(mode(&m.inside.join("f")), 0o400);
}

fn links(m: &Mounted) {
    symlink("x", m.inside.join("l")).unwrap();
    lchown(m.inside.join("l"), Some(33), Some(33)).unwrap();
    let expected = if m.who == Who::Root { (33, 33) } else { (USER, USER) };
    assert_eq!(owner(&m.outside.join("l")), expected);
}
