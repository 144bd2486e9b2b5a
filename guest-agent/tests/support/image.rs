//! EROFS images made by mkfs.erofs from directories of this machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_agent_api::{DiffId, Layer, LayerSource};
use rustix::fs::{CWD, FileType, Mode};

/// An image file, deleted when this is dropped.
pub struct Image {
    file: PathBuf,
    diff_id: DiffId,
    _dir: tempfile::TempDir,
}

impl Image {
    /// An image of what `fill` puts into an empty directory.
    pub fn new(fill: impl FnOnce(&Path)) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        fill(&root);
        let file = dir.path().join("layer.erofs");
        let made =
            Command::new("mkfs.erofs").arg("--quiet").arg(&file).arg(&root).stdout(Stdio::null()).status();
        assert!(made.expect("mkfs.erofs is there (package erofs-utils)").success());
        let number = (u64::from(std::process::id()) << 32) + NEXT.fetch_add(1, Ordering::Relaxed);
        Self { file, diff_id: format!("{number:064x}").parse().unwrap(), _dir: dir }
    }

    /// Busybox with its commands, root and an unprivileged user.
    pub fn busybox() -> &'static Self {
        static IMAGE: OnceLock<Image> = OnceLock::new();
        IMAGE.get_or_init(|| Self::new(fill_busybox))
    }

    /// What the daemon would say about the layer.
    pub fn layer(&self) -> Layer {
        let path = self.file.to_str().unwrap().to_owned();
        Layer { diff_id: self.diff_id.clone(), source: LayerSource::File { path } }
    }
}

/// Fills a directory with a small system.
pub fn fill_busybox(root: &Path) {
    for name in ["bin", "etc", "root", "tmp", "proc", "sys", "dev"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    let busybox = root.join("bin/busybox");
    std::fs::copy("/bin/busybox", &busybox).expect("busybox is there (package busybox-static)");
    let list = Command::new("/bin/busybox").arg("--list").output().unwrap().stdout;
    for name in String::from_utf8(list).unwrap().lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:/bin/sh\n")
        .unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\nwheel:x:10:root,web\nweb:x:33:\n").unwrap();
}

/// A whiteout, as overlay wants it.
pub fn whiteout(path: &Path) {
    device(path, FileType::CharacterDevice, 0, 0);
}

/// A device node.
pub fn device(path: &Path, kind: FileType, major: u32, minor: u32) {
    let mode = Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(CWD, path, kind, mode, rustix::fs::makedev(major, minor)).unwrap();
}
