//! Reads uncompressed EROFS images: the tree, files, link targets and attributes. The image is untrusted: every
//! offset is checked against the image's size, nothing is allocated by a size that the image merely claims, and what
//! contradicts itself is an error.

use std::io::{self, Read, Seek, SeekFrom};

use super::format::{
    BLOCK, BLOCK_BITS, COMPACT_INODE, COMPAT_CHECKSUM, DIRENT, DataLayout, EXTENDED_INODE, INODE_SLOT,
    MODE_DIR, MODE_SYMLINK, MODE_TYPE, SUPER_MAGIC, SUPER_OFFSET, SUPER_SIZE, XATTR_ENTRY, XATTR_HEADER,
    XATTR_PREFIXES, decode_device, superblock_checksum,
};

/// Link targets are shorter than this.
const MAX_LINK: u64 = BLOCK;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The image contradicts the format or itself.
    #[error("the EROFS image is corrupted: {0}")]
    Corrupted(&'static str),
    /// The image uses a feature that this reader does not know.
    #[error("the EROFS image uses {0}, which is not supported")]
    Unsupported(&'static str),
    /// A question that does not fit the inode.
    #[error("the inode is {0}")]
    WrongKind(&'static str),
    /// The image file cannot be read.
    #[error("the EROFS image cannot be read")]
    Io(#[from] io::Error),
}

/// Number of an inode in its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(u64);

/// An inode's metadata.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Its number.
    pub nid: Nid,
    /// Type and permission bits as in `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names.
    pub links: u32,
    /// Size in bytes.
    pub size: u64,
    /// Modification time: seconds since the epoch.
    pub mtime: i64,
    /// Modification time: nanoseconds.
    pub mtime_nanoseconds: u32,
    layout: DataLayout,
    block_or_device: u32,
    inode_end: u64,
    xattr_bytes: u64,
}

impl Inode {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.mode & MODE_TYPE == MODE_DIR
    }

    /// Major and minor number, of devices.
    pub fn device(&self) -> (u32, u32) {
        decode_device(self.block_or_device)
    }
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// The name, never empty, without `/` and NUL.
    pub name: Vec<u8>,
    /// The inode it names.
    pub nid: Nid,
    /// The type as the directory states it (1 regular, 2 directory, 3 and 4 devices, 5 fifo, 7 symbolic link).
    pub file_type: u8,
}

/// An extended attribute's full name and value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// An open image.
#[derive(Debug)]
pub struct ErofsReader<R> {
    source: R,
    size: u64,
    meta_start: u64,
    root: Nid,
    inodes: u64,
}

impl<R: Read + Seek> ErofsReader<R> {
    /// Opens an image and checks its superblock.
    pub fn open(mut source: R) -> Result<Self, ReadError> {
        let actual = source.seek(SeekFrom::End(0))?;
        if actual < BLOCK {
            return Err(ReadError::Corrupted("it is smaller than a block"));
        }
        source.seek(SeekFrom::Start(SUPER_OFFSET))?;
        let mut bytes = vec![0; (BLOCK - SUPER_OFFSET) as usize];
        source.read_exact(&mut bytes)?;
        let superblock = Fields(&bytes[..SUPER_SIZE]);
        if superblock.u32(0) != SUPER_MAGIC {
            return Err(ReadError::Corrupted("its magic number is wrong"));
        }
        if superblock.u32(80) != 0 {
            return Err(ReadError::Unsupported("incompatible features"));
        }
        if superblock.u8(12) != BLOCK_BITS || superblock.u8(90) != 0 {
            return Err(ReadError::Unsupported("another block size"));
        }
        let (has_checksum, checksum) = (superblock.u32(8) & COMPAT_CHECKSUM != 0, superblock.u32(4));
        let (root, inodes) = (Nid(superblock.u16(14).into()), superblock.u64(16));
        let (blocks, meta_block) = (superblock.u32(36), superblock.u32(40));
        bytes[4..8].fill(0);
        if has_checksum && superblock_checksum(&bytes) != checksum {
            return Err(ReadError::Corrupted("the superblock's checksum is wrong"));
        }
        let size = u64::from(blocks) * BLOCK;
        if size > actual {
            return Err(ReadError::Corrupted("it is shorter than its superblock says"));
        }
        Ok(Self { source, size, meta_start: u64::from(meta_block) * BLOCK, root, inodes })
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.root
    }

    /// The number of inodes that the superblock states.
    pub fn inode_count(&self) -> u64 {
        self.inodes
    }

    /// An inode's metadata.
    pub fn inode(&mut self, nid: Nid) -> Result<Inode, ReadError> {
        const OUTSIDE: ReadError = ReadError::Corrupted("an inode lies outside the image");
        let start = nid.0.checked_mul(INODE_SLOT).and_then(|offset| offset.checked_add(self.meta_start));
        let start = start.ok_or(OUTSIDE)?;
        let mut bytes = [0; EXTENDED_INODE];
        self.read_image(start, &mut bytes[..COMPACT_INODE])?;
        let format = Fields(&bytes).u16(0);
        let layout = match format >> 1 & 7 {
            0 => DataLayout::Plain,
            2 => DataLayout::Inline,
            _ => return Err(ReadError::Unsupported("compressed or chunked files")),
        };
        let extended = format & 1 != 0;
        if extended {
            self.read_image(start + COMPACT_INODE as u64, &mut bytes[COMPACT_INODE..])?;
        }
        let fields = Fields(&bytes);
        let inode_end = start + if extended { EXTENDED_INODE } else { COMPACT_INODE } as u64;
        let xattr_bytes = match u64::from(fields.u16(2)) {
            0 => 0,
            count => XATTR_HEADER as u64 + (count - 1) * XATTR_ENTRY as u64,
        };
        let common = (fields.u16(4), fields.u32(16));
        let inode = match extended {
            true => Inode {
                nid,
                mode: common.0,
                uid: fields.u32(24),
                gid: fields.u32(28),
                links: fields.u32(44),
                size: fields.u64(8),
                mtime: fields.u64(32) as i64,
                mtime_nanoseconds: fields.u32(40),
                layout,
                block_or_device: common.1,
                inode_end,
                xattr_bytes,
            },
            false => Inode {
                nid,
                mode: common.0,
                uid: fields.u16(24).into(),
                gid: fields.u16(26).into(),
                links: fields.u16(6).into(),
                size: fields.u32(8).into(),
                mtime: 0,
                mtime_nanoseconds: 0,
                layout,
                block_or_device: common.1,
                inode_end,
                xattr_bytes,
            },
        };
        if inode_end + xattr_bytes > self.size {
            return Err(OUTSIDE);
        }
        Ok(inode)
    }

    /// Reads file data at an offset; 0 at and beyond the end.
    pub fn read_at(&mut self, inode: &Inode, offset: u64, buffer: &mut [u8]) -> Result<usize, ReadError> {
        const BAD: ReadError = ReadError::Corrupted("a file's data lies outside the image");
        if offset >= inode.size {
            return Ok(0);
        }
        let inline_from = match inode.layout {
            DataLayout::Plain => inode.size,
            DataLayout::Inline => inode.size - inode.size % BLOCK,
        };
        let (start, end) = if offset < inline_from {
            let start = u64::from(inode.block_or_device) * BLOCK;
            (start.checked_add(offset).ok_or(BAD)?, inline_from)
        } else {
            let tail = inode.inode_end + inode.xattr_bytes;
            if tail % BLOCK + (inode.size - inline_from) > BLOCK {
                return Err(ReadError::Corrupted("inline data crosses a block"));
            }
            (tail + (offset - inline_from), inode.size)
        };
        let length = usize::try_from(end - offset).unwrap_or(usize::MAX).min(buffer.len());
        self.read_image(start, &mut buffer[..length])?;
        Ok(length)
    }

    /// A directory's entries, `.` and `..` included, in the order of the image.
    pub fn entries(&mut self, inode: &Inode) -> Result<Vec<DirectoryEntry>, ReadError> {
        if !inode.is_directory() {
            return Err(ReadError::WrongKind("not a directory"));
        }
        let mut entries = Vec::new();
        let mut offset = 0;
        let mut block = [0; BLOCK as usize];
        while offset < inode.size {
            let mut filled = 0;
            while filled < block.len() {
                match self.read_at(inode, offset + filled as u64, &mut block[filled..])? {
                    0 => break,
                    read => filled += read,
                }
            }
            parse_directory_block(&block[..filled], &mut entries)?;
            offset += BLOCK;
        }
        if entries.windows(2).any(|pair| pair[0].name >= pair[1].name) {
            return Err(ReadError::Corrupted("a directory is not sorted"));
        }
        Ok(entries)
    }

    /// Where a symbolic link leads.
    pub fn link_target(&mut self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        if inode.mode & MODE_TYPE != MODE_SYMLINK {
            return Err(ReadError::WrongKind("not a symbolic link"));
        }
        if inode.size > MAX_LINK {
            return Err(ReadError::Corrupted("a symbolic link is too long"));
        }
        let mut target = vec![0; inode.size as usize];
        let mut filled = 0;
        while filled < target.len() {
            filled += self.read_at(inode, filled as u64, &mut target[filled..])?;
        }
        Ok(target)
    }

    /// Extended attributes by their full names.
    pub fn xattrs(&mut self, inode: &Inode) -> Result<Vec<Xattr>, ReadError> {
        const BAD: ReadError = ReadError::Corrupted("an extended attribute leaves its area");
        if inode.xattr_bytes == 0 {
            return Ok(Vec::new());
        }
        // At most 256 KiB, as the count has 16 bits.
        let mut area = vec![0; inode.xattr_bytes as usize];
        self.read_image(inode.inode_end, &mut area)?;
        if area[4] != 0 {
            return Err(ReadError::Unsupported("shared extended attributes"));
        }
        let mut rest = &area[XATTR_HEADER..];
        let mut attributes = Vec::new();
        while !rest.is_empty() {
            let (entry, body) = rest.split_at_checked(XATTR_ENTRY).ok_or(BAD)?;
            let name_length = usize::from(entry[0]);
            let end = name_length + usize::from(Fields(entry).u16(2));
            let prefix = XATTR_PREFIXES.iter().find(|(index, _)| *index == entry[1]);
            let (_, prefix) = prefix.ok_or(ReadError::Unsupported("unknown attribute prefixes"))?;
            let content = body.get(..end).ok_or(BAD)?;
            attributes.push(([prefix, &content[..name_length]].concat(), content[name_length..].to_vec()));
            rest = body.get(end.next_multiple_of(XATTR_ENTRY)..).ok_or(BAD)?;
        }
        Ok(attributes)
    }

    fn read_image(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(ReadError::Corrupted("it points beyond its own end"));
        }
        self.source.seek(SeekFrom::Start(offset))?;
        self.source.read_exact(buffer)?;
        Ok(())
    }
}

fn parse_directory_block(block: &[u8], entries: &mut Vec<DirectoryEntry>) -> Result<(), ReadError> {
    const BAD: ReadError = ReadError::Corrupted("a directory block is malformed");
    if block.len() < DIRENT {
        return Err(BAD);
    }
    let names_start = usize::from(Fields(block).u16(8));
    if names_start < DIRENT || names_start % DIRENT != 0 || names_start > block.len() {
        return Err(BAD);
    }
    let count = names_start / DIRENT;
    for index in 0..count {
        let fields = Fields(&block[index * DIRENT..(index + 1) * DIRENT]);
        let start = usize::from(fields.u16(8));
        let is_last = index + 1 == count;
        let end = if is_last { block.len() } else { Fields(&block[(index + 1) * DIRENT..]).u16(8).into() };
        let mut name = block.get(start..end).filter(|_| start >= names_start).ok_or(BAD)?;
        if is_last {
            name = &name[..name.iter().position(|byte| *byte == 0).unwrap_or(name.len())];
        }
        if name.is_empty()
            || name.len() > super::format::MAX_NAME
            || name.iter().any(|byte| [0, b'/'].contains(byte))
        {
            return Err(ReadError::Corrupted("a directory has a malformed name"));
        }
        entries.push(DirectoryEntry {
            name: name.to_vec(),
            nid: Nid(fields.u64(0)),
            file_type: fields.u8(10),
        });
    }
    Ok(())
}

/// Little-endian fields of a structure that is long enough for them.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[offset..offset + N]);
        bytes
    }

    fn u8(&self, offset: usize) -> u8 {
        self.0[offset]
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.array(offset))
    }
}
