//! The kernel's opinion: images are mounted by this machine's EROFS driver and compared, entry by entry, with what GNU
//! tar extracts from the same stream; overlay is laid over them to see that whiteouts hide. Needs Linux with EROFS,
//! overlay and loop-free (file-backed) mounts, root, and GNU tar, and fails loudly where it cannot run. A full disk is
//! tried here as well, since a small file system has to be mounted for that.
#![cfg(target_os = "linux")]
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{MAX, Tar};
use coracle_image_store::{ErrorKind, ImageStore, convert_layer};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

/// A mount that ends with its scope.
struct Mounted(PathBuf);

impl Mounted {
    fn new(source: &Path, target: &Path, kind: &str, options: &str) -> Self {
        Self::with_flags(source, target, kind, MountFlags::RDONLY, options)
    }

    fn with_flags(source: &Path, target: &Path, kind: &str, flags: MountFlags, options: &str) -> Self {
        fs::create_dir_all(target).unwrap();
        let options = CString::new(options).unwrap();
        let mounted = rustix::mount::mount(source, target, kind, flags, options.as_c_str());
        mounted.unwrap_or_else(|error| {
            panic!(
                "this test needs root and a kernel that mounts {kind} images from files (Linux 6.12): {error}"
            )
        });
        Self(target.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Everything that can be asked about a tree, by path.
fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut described = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let full = root.join(&path);
        let metadata = full.symlink_metadata().unwrap();
        if metadata.is_dir() {
            let mut names: Vec<_> =
                fs::read_dir(&full).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            pending.extend(names.iter().rev().map(|name| path.join(name)));
        }
        let content = match metadata.file_type() {
            kind if kind.is_file() => coracle_image_store::Digest::of(&fs::read(&full).unwrap()).to_string(),
            kind if kind.is_symlink() => format!("{:?}", fs::read_link(&full).unwrap()),
            _ => String::new(),
        };
        let size = if metadata.is_dir() { 0 } else { metadata.size() };
        let count = inodes.len();
        let inode = *inodes.entry(metadata.ino()).or_insert(count);
        let text = format!(
            "mode {:o} owner {}:{} size {size} links {} device {:x} mtime {}.{:09} inode #{inode} xattrs {:?} {content}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.nlink(),
            metadata.rdev(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            xattrs(&full),
        );
        described.insert(path, text);
    }
    described
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0u8; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0u8; 65_536];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
            value.truncate(length);
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect()
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn write(path: PathBuf, content: &[u8]) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn node(path: PathBuf, kind: FileType, major: u32, minor: u32) {
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(CWD, &path, kind, Mode::from_raw_mode(0o640), device).unwrap();
}

/// A tree with something of everything.
fn make_tree(root: &Path) {
    write(root.join("bin/tool"), &vec![0x7f; 123_457]);
    fs::set_permissions(root.join("bin/tool"), fs::Permissions::from_mode(0o6755)).unwrap();
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    set_xattr(&root.join("bin/tool"), "security.capability", capability);
    fs::hard_link(root.join("bin/tool"), root.join("bin/tool2")).unwrap();
    fs::create_dir(root.join("tmp")).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    std::os::unix::fs::chown(root.join("tmp"), Some(3_000_000_000), Some(70_000)).unwrap();
    set_xattr(&root.join("tmp"), "user.note", b"with\0binary\xff");
    set_xattr(&root.join("tmp"), "trusted.mine", b"1");
    let acl = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x07\0\xe8\x03\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x07\0\xff\xff\xff\xff\x20\0\x05\0\xff\xff\xff\xff";
    set_xattr(&root.join("tmp"), "system.posix_acl_default", acl);
    node(root.join("null"), FileType::CharacterDevice, 1, 3);
    node(root.join("disk"), FileType::BlockDevice, 259, 70_000);
    node(root.join("pipe"), FileType::Fifo, 0, 0);
    symlink("bin/tool", root.join("short")).unwrap();
    symlink("x".repeat(4000), root.join("long")).unwrap();
    symlink("x".repeat(4095), root.join("longest")).unwrap();
    std::os::unix::fs::lchown(root.join("short"), Some(12), Some(34)).unwrap();
    write(root.join("empty"), b"");
    for size in [1, 4095, 4096, 4097, 8192] {
        write(root.join(format!("size-{size}")), &vec![size as u8; size]);
    }
    write(root.join("a".repeat(200)).join("b".repeat(255)).join("deep"), b"deep");
    for n in 0..700 {
        write(root.join(format!("many/-{n}{}", "n".repeat(n % 90))), n.to_string().as_bytes());
    }
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(6_000_000).unwrap();
    for n in 0..40u64 {
        std::os::unix::fs::FileExt::write_at(&sparse, b"data", n * 140_000 + 5).unwrap();
    }
    let old = Timespec { tv_sec: -86_400, tv_nsec: 987_654_321 };
    let times = Timestamps { last_access: old, last_modification: old };
    rustix::fs::utimensat(CWD, root.join("empty"), &times, AtFlags::empty()).unwrap();
}

fn image_of(tar: &[u8], path: &Path) {
    let image = File::create_new(path).unwrap();
    convert_layer(tar, &image, std::io::sink(), &std::env::temp_dir(), MAX).unwrap();
    // Debian's erofs-utils check it too; `cargo xtask test` installs them.
    run(Command::new("fsck.erofs").arg(path));
}

#[test]
fn the_kernel_sees_what_gnu_tar_extracts() {
    let work = TempDir::new().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    make_tree(&tree);
    for (number, options) in [
        &["--format=pax", "--xattrs", "--xattrs-include=*", "--acls"][..],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=gnu", "--sparse"],
    ]
    .into_iter()
    .enumerate()
    {
        let tar =
            run(Command::new("tar").args(options).args(["--sort=name", "-C"]).arg(&tree).args(["-c", "."]));
        let image = work.path().join(format!("{number}.erofs"));
        let archive = write(work.path().join(format!("{number}.tar")), &tar);
        image_of(&tar, &image);
        let mounted = Mounted::new(&image, &work.path().join(format!("mounted-{number}")), "erofs", "");
        let extracted = work.path().join(format!("extracted-{number}"));
        fs::create_dir(&extracted).unwrap();
        let attributes =
            ["--xattrs", "--xattrs-include=*", "--acls", "--same-owner", "-p", "--numeric-owner"];
        run(Command::new("tar").args(attributes).arg("-C").arg(&extracted).arg("-xf").arg(&archive));
        let (ours, theirs) = (describe(&mounted.0), describe(&extracted));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{options:?}");
        for (path, text) in &theirs {
            assert_eq!(&ours[path], text, "{} by {options:?}", path.display());
        }
    }
}

#[test]
fn overlay_hides_what_a_layer_deletes() {
    let work = TempDir::new().unwrap();
    let lower = Tar::new()
        .file("etc/passwd", b"1")
        .file("etc/hosts", b"2")
        .file("srv/old", b"3")
        .file("srv/deep/old", b"4")
        .file("again/old", b"5")
        .file("gone/old", b"6");
    let upper = Tar::new()
        .file("etc/.wh.passwd", b"")
        .file("srv/.wh..wh..opq", b"")
        .file("srv/new", b"7")
        .file(".wh.again", b"")
        .file("again/new", b"8")
        .file(".wh.gone", b"")
        .file("only-here/.wh.nothing", b"");
    let mounts: Vec<_> = [("lower", lower), ("upper", upper)]
        .into_iter()
        .map(|(name, tar)| {
            let image = work.path().join(format!("{name}.erofs"));
            image_of(&tar.finish(), &image);
            Mounted::new(&image, &work.path().join(name), "erofs", "")
        })
        .collect();
    let options = format!("lowerdir={}:{}", mounts[1].0.display(), mounts[0].0.display());
    let merged = Mounted::new(Path::new("overlay"), &work.path().join("merged"), "overlay", &options);
    let paths: Vec<_> =
        describe(&merged.0).into_keys().filter_map(|path| path.to_str().map(str::to_owned)).collect();
    assert_eq!(paths, ["", "again", "again/new", "etc", "etc/hosts", "only-here", "srv", "srv/new"]);
}

#[test]
fn a_full_disk_is_a_clear_error_and_leaves_nothing() {
    let work = TempDir::new().unwrap();
    let small = work.path().join("small");
    let disk = Mounted::with_flags(Path::new("tmpfs"), &small, "tmpfs", MountFlags::empty(), "size=4m");
    let store = ImageStore::open(&disk.0).unwrap();
    let layer = Tar::new().file("big", &vec![1; 6 << 20]).finish();
    let archive = common::docker_archive(&["big"], &common::config_for(&[&layer], ""), &[&layer]);
    let error = store.load(archive.as_slice(), &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    assert!(error.to_string().contains("no space left"), "{error}");
    for directory in ["tmp", "layers", "blobs/sha256"] {
        assert_eq!(fs::read_dir(disk.0.join(directory)).unwrap().count(), 0);
    }
    let layer = Tar::new().file("small", b"1").finish();
    let archive = common::docker_archive(&["small"], &common::config_for(&[&layer], ""), &[&layer]);
    store.load(archive.as_slice(), &mut |_| {}).unwrap();
}
