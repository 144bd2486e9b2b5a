//! Writes tar streams: ustar headers, with a pax header before those that ustar has no room for.

use std::io::{self, Read, Write};

use crate::{BLOCK, Entry, EntryKind, Mtime};

/// The largest number of an octal field of 8 and of 12 bytes.
const MAX_SHORT: u64 = 0o7_777_777;
const MAX_LONG: u64 = 0o77_777_777_777;
const NAME: usize = 100;

/// The writer. Entries may have any names; whoever reads them decides what they mean.
pub struct TarWriter<W> {
    inner: W,
}

impl<W: Write> TarWriter<W> {
    /// Writes from the beginning of a stream.
    pub fn new(inner: W) -> Self {
        Self { inner }
    }

    /// Writes an entry; `data` gives exactly `entry.size` bytes of a regular file and is not read otherwise. A file that
    /// becomes shorter while it is read is filled up with zeros, as GNU tar does it. Sparse files are written whole.
    ///
    /// # Errors
    /// If `data` cannot be read or the stream cannot be written.
    pub fn append(&mut self, entry: &Entry, data: impl Read) -> io::Result<()> {
        let size = if entry.kind == EntryKind::Regular { entry.size } else { 0 };
        let records = pax_records(entry, size);
        if !records.is_empty() {
            let mut header = Header::new(b'x');
            header.text(0, NAME, b"PaxHeaders.0/entry");
            header.number(100, 8, 0o644);
            header.number(124, 12, records.len() as u64);
            self.inner.write_all(&header.finish())?;
            self.inner.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        self.inner.write_all(&header(entry, size))?;
        let copied = io::copy(&mut data.take(size), &mut self.inner)?;
        io::copy(&mut io::repeat(0).take(size - copied), &mut self.inner)?;
        self.pad(size)
    }

    /// Writes the mark at the end, and gives the stream back.
    ///
    /// # Errors
    /// If the stream cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.inner.write_all(&[0; 2 * BLOCK])?;
        self.inner.flush()?;
        Ok(self.inner)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let padding = (size.wrapping_neg() % BLOCK as u64) as usize;
        self.inner.write_all(&[0; BLOCK][..padding])
    }
}

struct Header([u8; BLOCK]);

impl Header {
    fn new(kind: u8) -> Self {
        let mut block = [0; BLOCK];
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        Self(block)
    }

    fn text(&mut self, at: usize, len: usize, text: &[u8]) {
        let text = &text[..text.len().min(len)];
        self.0[at..at + text.len()].copy_from_slice(text);
    }

    /// Octal digits with a NUL after them; what is too large is in the pax header, and its field 0.
    fn number(&mut self, at: usize, len: usize, value: u64) {
        let largest = if len == 8 { MAX_SHORT } else { MAX_LONG };
        let value = if value > largest { 0 } else { value };
        let digits = format!("{value:0width$o}", width = len - 1);
        self.text(at, len - 1, digits.as_bytes());
    }

    fn finish(mut self) -> [u8; BLOCK] {
        self.0[148..156].fill(b' ');
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        self.0[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
        self.0[154] = 0;
        self.0
    }
}

fn header(entry: &Entry, size: u64) -> [u8; BLOCK] {
    let kind = match entry.kind {
        EntryKind::Regular => b'0',
        EntryKind::HardLink => b'1',
        EntryKind::Symlink => b'2',
        EntryKind::CharDevice => b'3',
        EntryKind::BlockDevice => b'4',
        EntryKind::Directory => b'5',
        EntryKind::Fifo => b'6',
        EntryKind::Other(flag) => flag,
    };
    let mut header = Header::new(kind);
    header.text(0, NAME, &entry.path);
    header.number(100, 8, entry.mode.into());
    header.number(108, 8, entry.uid.into());
    header.number(116, 8, entry.gid.into());
    header.number(124, 12, size);
    header.number(136, 12, u64::try_from(entry.mtime.seconds).unwrap_or(0));
    header.text(157, NAME, &entry.link);
    header.number(329, 8, entry.device.0.into());
    header.number(337, 8, entry.device.1.into());
    header.finish()
}

fn pax_records(entry: &Entry, size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    if entry.path.len() > NAME {
        record(&mut out, b"path", &entry.path);
    }
    if entry.link.len() > NAME {
        record(&mut out, b"linkpath", &entry.link);
    }
    for (name, value, largest) in
        [("size", size, MAX_LONG), ("uid", entry.uid.into(), MAX_SHORT), ("gid", entry.gid.into(), MAX_SHORT)]
    {
        if value > largest {
            record(&mut out, name.as_bytes(), value.to_string().as_bytes());
        }
    }
    let Mtime { seconds, nanoseconds } = entry.mtime;
    if nanoseconds != 0 || u64::try_from(seconds).map_or(true, |seconds| seconds > MAX_LONG) {
        record(&mut out, b"mtime", pax_time(seconds, nanoseconds).as_bytes());
    }
    for (name, value) in &entry.xattrs {
        record(&mut out, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    out
}

/// Decimal, with the nanoseconds counted away from zero.
fn pax_time(seconds: i64, nanoseconds: u32) -> String {
    if seconds < 0 && nanoseconds > 0 {
        let (whole, rest) = (seconds + 1, 1_000_000_000 - nanoseconds);
        let sign = if whole == 0 { "-" } else { "" };
        return format!("{sign}{whole}.{rest:09}");
    }
    if nanoseconds == 0 { seconds.to_string() } else { format!("{seconds}.{nanoseconds:09}") }
}

/// `LENGTH NAME=VALUE\n`, where the length counts itself.
fn record(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let rest = name.len() + value.len() + 3;
    let mut len = rest + rest.to_string().len();
    if len.to_string().len() != rest.to_string().len() {
        len += 1;
    }
    out.extend_from_slice(len.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(name);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::TarStream;

    fn name(longest: usize) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(1u8..=255, 1..longest)
    }

    fn entries() -> impl Strategy<Value = Entry> {
        let kind = prop_oneof![
            Just(EntryKind::Regular),
            Just(EntryKind::HardLink),
            Just(EntryKind::Symlink),
            Just(EntryKind::CharDevice),
            Just(EntryKind::Directory),
            Just(EntryKind::Fifo),
        ];
        let numbers = (
            0u16..0o10000,
            any::<u32>(),
            any::<u32>(),
            -5_000_000_000i64..90_000_000_000,
            0u32..1_000_000_000,
        );
        let xattrs =
            proptest::collection::vec(("[a-z]{1,9}", proptest::collection::vec(any::<u8>(), 0..99)), 0..3);
        (name(300), name(300), kind, numbers, (any::<u16>(), any::<u16>()), 0u64..2000, xattrs).prop_map(
            |(path, link, kind, (mode, uid, gid, seconds, nanoseconds), device, size, xattrs)| {
                let is_link = matches!(kind, EntryKind::HardLink | EntryKind::Symlink);
                let is_device = kind == EntryKind::CharDevice;
                Entry {
                    path,
                    link: if is_link { link } else { Vec::new() },
                    kind,
                    mode,
                    uid,
                    gid,
                    mtime: Mtime { seconds, nanoseconds },
                    device: if is_device { (device.0.into(), device.1.into()) } else { (0, 0) },
                    size: if kind == EntryKind::Regular { size } else { 0 },
                    xattrs: xattrs
                        .into_iter()
                        .map(|(name, value)| (format!("user.{name}").into_bytes(), value))
                        .collect(),
                    sparse: None,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_again(entries in proptest::collection::vec(entries(), 0..5)) {
            let mut writer = TarWriter::new(Vec::new());
            for entry in &entries {
                writer.append(entry, io::repeat(7)).unwrap();
            }
            let bytes = writer.finish().unwrap();
            let mut stream = TarStream::new(bytes.as_slice());
            for entry in &entries {
                let read = stream.next_entry().unwrap().unwrap();
                prop_assert_eq!(&read, entry);
                let mut data = Vec::new();
                stream.read_to_end(&mut data).unwrap();
                prop_assert_eq!(data, vec![7; entry.size as usize]);
            }
            prop_assert!(stream.next_entry().unwrap().is_none());
        }
    }

    #[test]
    fn a_file_that_shrinks_is_filled_up() {
        let entry = Entry { size: 600, ..file(b"a") };
        let mut writer = TarWriter::new(Vec::new());
        writer.append(&entry, &b"short"[..]).unwrap();
        writer.append(&file(b"next"), io::empty()).unwrap();
        let bytes = writer.finish().unwrap();
        assert_eq!(bytes.len(), 512 + 1024 + 512 + 1024);
        let mut stream = TarStream::new(bytes.as_slice());
        stream.next_entry().unwrap();
        assert_eq!(stream.next_entry().unwrap().unwrap().path, b"next");
    }

    #[test]
    fn other_readers_understand_it() {
        let long = [b'd'; 150];
        let mut entry = file(&long);
        entry.size = 5;
        entry.uid = 3_000_000;
        let mut writer = TarWriter::new(Vec::new());
        writer.append(&entry, &b"hello"[..]).unwrap();
        let bytes = writer.finish().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut read = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(read.path_bytes().as_ref(), &long);
        assert_eq!(read.header().uid().unwrap(), 3_000_000);
        let mut data = String::new();
        read.read_to_string(&mut data).unwrap();
        assert_eq!(data, "hello");
    }

    fn file(path: &[u8]) -> Entry {
        Entry {
            path: path.to_vec(),
            link: Vec::new(),
            kind: EntryKind::Regular,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Mtime::default(),
            device: (0, 0),
            size: 0,
            xattrs: Vec::new(),
            sparse: None,
        }
    }
}
