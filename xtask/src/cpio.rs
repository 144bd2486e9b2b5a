//! Writes initramfs archives in the kernel's `newc` format, the same bytes for the same input.
//! Owners are root and times are zero; names are ours and therefore trusted.

use std::io::Write as _;

/// An archive being written.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const DEVICE: u32 = 0o020_000;

impl Archive {
    /// Adds a folder.
    pub(crate) fn folder(&mut self, name: &str, mode: u32) {
        self.entry(name, FOLDER | mode, (0, 0), &[]);
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.entry(name, FILE | mode, (0, 0), contents);
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.entry(name, DEVICE | mode, (major, minor), &[]);
    }

    /// Ends the archive and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        let links = if mode & FOLDER != 0 { 2 } else { 1 };
        let size = u32::try_from(contents.len()).expect("a file of an initramfs is smaller than 4 GiB");
        let fields =
            [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        self.inode += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            write!(self.bytes, "{field:08x}").expect("writing to memory does not fail");
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_starts_at_a_multiple_of_four() {
        let mut archive = Archive::default();
        archive.folder("dev", 0o755);
        archive.device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<usize> = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, window)| window == b"070701")
            .map(|(at, _)| at)
            .collect();
        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|at| at % 4 == 0));
        assert_eq!(&bytes[starts[0] + 14..starts[0] + 22], b"000041ed");
    }
}
