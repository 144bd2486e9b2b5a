//! An initramfs with this very program as `/init`, and the shared libraries that it is running with.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A newc archive.
pub(crate) fn build() -> Vec<u8> {
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    let mut archive = Archive::default();
    for folder in ["/dev", "/mnt", "/proc", "/tmp"] {
        archive.folder(Path::new(folder));
    }
    // Without a console, Rust's runtime wants this one before anything else.
    archive.entry("dev/null", 0o20666, (1, 3), &[]);
    for library in libraries() {
        let path = Path::new(&library);
        let content = fs::read(path).unwrap();
        if library.contains("/ld-") {
            archive.file(Path::new("/lib64/ld-linux-x86-64.so.2"), &content);
        }
        archive.file(path, &content);
    }
    archive.file(Path::new("/init"), &program);
    archive.finish()
}

fn libraries() -> BTreeSet<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.starts_with('/') && path.contains(".so"))
        .map(str::to_owned)
        .collect()
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    seen: BTreeSet<String>,
}

impl Archive {
    fn folder(&mut self, path: &Path) {
        for parent in path.ancestors().collect::<Vec<_>>().into_iter().rev() {
            let name = parent.to_str().unwrap().trim_start_matches('/').to_owned();
            if !name.is_empty() && self.seen.insert(name.clone()) {
                self.entry(&name, 0o40755, (0, 0), &[]);
            }
        }
    }

    fn file(&mut self, path: &Path, content: &[u8]) {
        self.folder(path.parent().unwrap());
        let name = path.to_str().unwrap().trim_start_matches('/').to_owned();
        if self.seen.insert(name.clone()) {
            self.entry(&name, 0o100755, (0, 0), content);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let (major, minor) = device;
        let inode = self.seen.len() as u32;
        let fields =
            [inode, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, major, minor, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}
