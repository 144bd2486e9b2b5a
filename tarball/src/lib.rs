//! A streaming tar reader: ustar, pax and GNU headers (long names, sparse files), one pass, no seeking. The stream is
//! untrusted: every number is range-checked, extended headers are bounded in size, and a stream that ends early is an
//! error, never a short file. (The `tar` crate reads extended headers of any size into memory, and writes relative names
//! only, so it only makes the fixtures of our tests.) And [`TarWriter`], whose entries can have any names.

mod acl;
mod header;
mod pax;
mod sparse;
mod writer;

use std::io::{self, Read};

use header::Header;
use pax::PaxRecords;
pub use sparse::SparseMap;
pub use writer::TarWriter;

/// Size of a tar block.
pub const BLOCK: usize = 512;
/// Extended headers and long names beyond this are refused, as Go's reader (and so Docker) does.
const MAX_EXTENSION: u64 = 1 << 20;

/// Why a tar stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The very first block is no tar header.
    #[error("it is not a tar stream")]
    NotATar,
    /// The stream ended inside an entry.
    #[error("the tar stream is truncated: it ends at byte {0}, inside an entry")]
    Truncated(u64),
    /// A header makes no sense.
    #[error("the tar stream is malformed at byte {offset}: {reason}")]
    Malformed {
        /// Where the header starts.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The reader beneath failed.
    #[error("the stream cannot be read")]
    Read(#[source] io::Error),
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A file with data.
    Regular,
    /// Another name of an entry before it.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A type flag that Docker refuses too.
    Other(u8),
}

/// Seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mtime {
    /// Seconds, negative before 1970.
    pub seconds: i64,
    /// Nanoseconds forward from `seconds`.
    pub nanoseconds: u32,
}

/// One entry's metadata. The paths are raw bytes, exactly as in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub path: Vec<u8>,
    /// What a link refers to.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permissions, with the set-id and sticky bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change.
    pub mtime: Mtime,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// The file's size, holes included.
    pub size: u64,
    /// Full names (`user.x`) and values, in the order of the stream.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the stored bytes go, if the file has holes.
    pub sparse: Option<SparseMap>,
}

/// Sees the bytes of a tar stream that are not entries' data: headers, padding, what was skipped.
pub trait Witness {
    /// Some such bytes, in order.
    fn passed(&mut self, bytes: &[u8]);
}

/// Nobody looks.
impl Witness for () {
    fn passed(&mut self, _: &[u8]) {}
}

/// The reader. Call [`TarStream::next_entry`], read the entry's data through [`Read`], and so on; what was not read is
/// skipped.
pub struct TarStream<R, W = ()> {
    inner: R,
    witness: W,
    offset: u64,
    /// Bytes of the current entry that were not yet read.
    remaining: u64,
    /// Bytes after them up to the next block.
    padding: u64,
    finished: bool,
    /// What global headers said so far.
    global: PaxRecords,
}

impl<R: Read> TarStream<R> {
    /// Reads from the beginning of a stream.
    pub fn new(inner: R) -> Self {
        Self::with_witness(inner, ())
    }
}

impl<R: Read, W: Witness> TarStream<R, W> {
    /// All that is not read by [`TarStream::read_data`] passes before the witness.
    pub fn with_witness(inner: R, witness: W) -> Self {
        Self {
            inner,
            witness,
            offset: 0,
            remaining: 0,
            padding: 0,
            finished: false,
            global: PaxRecords::default(),
        }
    }

    /// The witness.
    pub fn witness(&mut self) -> &mut W {
        &mut self.witness
    }

    /// The witness, at the end.
    pub fn into_witness(self) -> W {
        self.witness
    }

    /// Reads what follows the end-of-archive mark, to the stream's end.
    pub fn drain(&mut self) -> Result<(), TarError> {
        let mut scratch = [0; 16 * 1024];
        loop {
            match self.inner.read(&mut scratch) {
                Ok(0) => return Ok(()),
                Ok(read) => self.witness.passed(&scratch[..read]),
                Err(error) => self.retry_or_fail(error)?,
            }
        }
    }

    /// The next entry; `None` at the end-of-archive mark or where the stream ends between entries.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut long_path = None;
        let mut long_link = None;
        let mut pax: Option<PaxRecords> = None;
        loop {
            let Some((offset, header)) = self.next_header()? else {
                return match long_path.is_some() || long_link.is_some() || pax.is_some() {
                    true => Err(TarError::Truncated(self.offset)),
                    false => Ok(None),
                };
            };
            let malformed = |reason: &str| TarError::Malformed { offset, reason: reason.to_owned() };
            let stored = header.size().ok_or_else(|| malformed("bad size field"))?;
            match header.type_flag() {
                b'g' => {
                    let records = PaxRecords::parse(&self.extension(offset, stored)?).map_err(malformed)?;
                    self.global.add_global(records);
                }
                b'x' => pax = Some(PaxRecords::parse(&self.extension(offset, stored)?).map_err(malformed)?),
                b'L' => long_path = Some(until_nul(self.extension(offset, stored)?)),
                b'K' => long_link = Some(until_nul(self.extension(offset, stored)?)),
                _ => {
                    let pax = pax.unwrap_or_default().or_global(&self.global);
                    return self.entry(offset, &header, stored, pax, long_path, long_link).map(Some);
                }
            }
        }
    }

    fn entry(
        &mut self,
        offset: u64,
        header: &Header,
        stored: u64,
        pax: PaxRecords,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let malformed = |reason: &str| TarError::Malformed { offset, reason: reason.to_owned() };
        let stored = pax.size.unwrap_or(stored);
        let path = pax.sparse.name.clone().or(long_path).or(pax.path).unwrap_or_else(|| header.path());
        let kind = match header.type_flag() {
            0 if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' | b'S' => EntryKind::Regular,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => EntryKind::Other(other),
        };
        // Entries that are only a header have no payload whatever their size field says, as in Go's reader.
        let has_payload = matches!(kind, EntryKind::Regular | EntryKind::Other(_));
        let gnu_sparse = match header.type_flag() {
            b'S' => Some(self.gnu_sparse(offset, header)?),
            _ => None,
        };
        self.start_payload(if has_payload { stored } else { 0 });
        let sparse = match gnu_sparse {
            Some(map) => Some(map),
            None if kind == EntryKind::Regular && pax.sparse.is_used() => {
                Some(self.pax_sparse(offset, &pax.sparse)?)
            }
            None => None,
        };
        if let Some(map) = &sparse {
            map.check(self.remaining).map_err(malformed)?;
        }
        let number = |from_pax: Option<u32>, from_header: Option<i64>, reason| {
            from_pax
                .or_else(|| from_header.and_then(|number| u32::try_from(number).ok()))
                .ok_or_else(|| malformed(reason))
        };
        let is_device = matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice);
        Ok(Entry {
            link: long_link.or(pax.linkpath).unwrap_or_else(|| header.link()),
            kind,
            mode: (number(None, header.mode(), "bad mode field")? & 0o7777) as u16,
            uid: number(pax.uid, header.uid(), "user id is not a 32-bit number")?,
            gid: number(pax.gid, header.gid(), "group id is not a 32-bit number")?,
            mtime: match pax.mtime {
                Some(mtime) => mtime,
                None => Mtime {
                    seconds: header.mtime().ok_or_else(|| malformed("bad mtime field"))?,
                    nanoseconds: 0,
                },
            },
            device: match is_device {
                true => (
                    number(None, header.device_major(), "bad device major number")?,
                    number(None, header.device_minor(), "bad device minor number")?,
                ),
                false => (0, 0),
            },
            size: sparse.as_ref().map_or(self.remaining, |map| map.real_size),
            xattrs: pax.xattrs,
            sparse,
            path,
        })
    }

    /// Skips to the next header. `None` at the end.
    fn next_header(&mut self) -> Result<Option<(u64, Header)>, TarError> {
        if self.finished {
            return Ok(None);
        }
        self.skip_payload()?;
        let offset = self.offset;
        let Some(header) = self.read_header()? else { return Ok(None) };
        if header.is_zero() {
            self.finished = true;
            return match self.read_header()? {
                Some(second) if !second.is_zero() => Err(TarError::Malformed {
                    offset,
                    reason: "a single block of zeros between entries".to_owned(),
                }),
                _ => Ok(None),
            };
        }
        if header.checksum_matches() {
            return Ok(Some((offset, header)));
        }
        match offset {
            0 => Err(TarError::NotATar),
            _ => Err(TarError::Malformed { offset, reason: "bad header checksum".to_owned() }),
        }
    }

    /// Reads one block; `None` if the stream ends exactly before it.
    fn read_header(&mut self) -> Result<Option<Header>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => {
                    self.finished = true;
                    return Ok(None);
                }
                Ok(0) if self.offset == 0 => return Err(TarError::NotATar),
                Ok(0) => return Err(TarError::Truncated(self.offset + filled as u64)),
                Ok(read) => filled += read,
                Err(error) => self.retry_or_fail(error)?,
            }
        }
        self.witness.passed(&block);
        self.offset += BLOCK as u64;
        Ok(Some(Header::new(block)))
    }

    fn start_payload(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_payload(&mut self) -> Result<(), TarError> {
        let mut scratch = [0; 16 * 1024];
        while self.remaining > 0 || self.padding > 0 {
            let left = self.remaining.saturating_add(self.padding);
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(scratch.len());
            match self.inner.read(&mut scratch[..want]) {
                // The last entry need not be padded: umoci's layers are not, and Go's reader (that is, Docker) takes them.
                Ok(0) if self.remaining == 0 => self.padding = 0,
                Ok(0) => return Err(TarError::Truncated(self.offset)),
                Ok(read) => {
                    self.witness.passed(&scratch[..read]);
                    self.consumed(read as u64);
                }
                Err(error) => self.retry_or_fail(error)?,
            }
        }
        Ok(())
    }

    fn consumed(&mut self, read: u64) {
        self.offset = self.offset.saturating_add(read);
        let from_payload = read.min(self.remaining);
        self.remaining -= from_payload;
        self.padding -= read - from_payload;
    }

    fn retry_or_fail(&self, error: io::Error) -> Result<(), TarError> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::UnexpectedEof => Err(TarError::Truncated(self.offset)),
            _ => Err(TarError::Read(error)),
        }
    }

    /// Reads data of the current entry; 0 at its end.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        if self.remaining == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let want = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        loop {
            match self.inner.read(&mut buffer[..want]) {
                Ok(0) => return Err(TarError::Truncated(self.offset)),
                Ok(read) => {
                    self.consumed(read as u64);
                    return Ok(read);
                }
                Err(error) => self.retry_or_fail(error)?,
            }
        }
    }

    /// Like [`TarStream::read_data`], for data that says something about the stream itself.
    fn read_described(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let read = self.read_data(buffer)?;
        self.witness.passed(&buffer[..read]);
        Ok(read)
    }

    /// The whole payload of an extension header.
    fn extension(&mut self, offset: u64, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION {
            let reason = format!("an extended header of {size} bytes (at most {MAX_EXTENSION} are allowed)");
            return Err(TarError::Malformed { offset, reason });
        }
        self.start_payload(size);
        let mut bytes = vec![0; size as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read_described(&mut bytes[filled..])?;
        }
        Ok(bytes)
    }

    fn gnu_sparse(&mut self, offset: u64, header: &Header) -> Result<SparseMap, TarError> {
        let malformed = |reason: &str| TarError::Malformed { offset, reason: reason.to_owned() };
        let (mut map, mut extended) = SparseMap::from_gnu_header(header.block()).map_err(malformed)?;
        while extended {
            let block = self.read_header()?.ok_or(TarError::Truncated(self.offset))?;
            extended = map.extend_from_gnu_block(block.block()).map_err(malformed)?;
        }
        Ok(map)
    }

    fn pax_sparse(&mut self, offset: u64, keys: &pax::SparseKeys) -> Result<SparseMap, TarError> {
        let malformed = |reason: &str| TarError::Malformed { offset, reason: reason.to_owned() };
        let real_size = keys.real_size.ok_or_else(|| malformed("a sparse file without its real size"))?;
        if keys.version != (1, 0) {
            return SparseMap::from_pairs(real_size, &keys.pairs).map_err(malformed);
        }
        let mut parser = sparse::PayloadMapParser::new(real_size);
        loop {
            let mut block = [0; BLOCK];
            let mut filled = 0;
            while filled < BLOCK {
                match self.read_described(&mut block[filled..])? {
                    0 => return Err(malformed("a sparse map that does not end")),
                    read => filled += read,
                }
            }
            if let Some(map) = parser.push(&block).map_err(malformed)? {
                return Ok(map);
            }
        }
    }
}

/// The current entry's data.
impl<R: Read, W: Witness> Read for TarStream<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_data(buffer).map_err(|error| match error {
            TarError::Read(source) => source,
            TarError::Truncated(_) => io::Error::new(io::ErrorKind::UnexpectedEof, error),
            other => io::Error::other(other),
        })
    }
}

/// Whether a block can start a tar stream: a header, or the end mark of an empty one.
pub fn looks_like_tar(block: &[u8]) -> bool {
    match <[u8; BLOCK]>::try_from(block) {
        Ok(block) => {
            let header = Header::new(block);
            header.is_zero() || header.checksum_matches()
        }
        Err(_) => false,
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
