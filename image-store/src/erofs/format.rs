//! The on-disk structures of EROFS as Linux defines them (fs/erofs/erofs_fs.h), little-endian, only what uncompressed
//! images need.

/// Block size of our images; the smallest page size, so that they mount everywhere.
pub(crate) const BLOCK: u64 = 4096;
pub(crate) const BLOCK_BITS: u8 = 12;
/// Where the superblock stands in block 0.
pub(crate) const SUPER_OFFSET: u64 = 1024;
pub(crate) const SUPER_MAGIC: u32 = 0xe0f5_e1e2;
pub(crate) const SUPER_SIZE: usize = 128;
/// The superblock has a checksum.
pub(crate) const COMPAT_CHECKSUM: u32 = 1;
/// The inodes' times are modification times.
pub(crate) const COMPAT_MTIME: u32 = 2;
/// Inodes stand at multiples of this; their number (nid) counts in it.
pub(crate) const INODE_SLOT: u64 = 32;
pub(crate) const COMPACT_INODE: usize = 32;
pub(crate) const EXTENDED_INODE: usize = 64;
pub(crate) const DIRENT: usize = 12;
pub(crate) const MAX_NAME: usize = 255;
pub(crate) const XATTR_HEADER: usize = 12;
pub(crate) const XATTR_ENTRY: usize = 4;

pub(crate) const MODE_TYPE: u16 = 0o170_000;
pub(crate) const MODE_FIFO: u16 = 0o010_000;
pub(crate) const MODE_CHAR: u16 = 0o020_000;
pub(crate) const MODE_DIR: u16 = 0o040_000;
pub(crate) const MODE_BLOCK: u16 = 0o060_000;
pub(crate) const MODE_REGULAR: u16 = 0o100_000;
pub(crate) const MODE_SYMLINK: u16 = 0o120_000;

/// How a file's data is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataLayout {
    /// All of it in whole blocks.
    Plain,
    /// Whole blocks, and the rest after the inode.
    Inline,
}

/// Prefixes of attribute names that have a number, and the numbers.
pub(crate) const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// The superblock's variable fields.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    pub(crate) blocks: u32,
    pub(crate) meta_block: u32,
}

impl Superblock {
    /// Block 0 in full, with its checksum.
    pub(crate) fn encode_block(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK as usize];
        let start = SUPER_OFFSET as usize;
        let mut put = |offset: usize, bytes: &[u8]| {
            block[start + offset..start + offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &SUPER_MAGIC.to_le_bytes());
        put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        let checksum = superblock_checksum(&block[start..]);
        block[start + 4..start + 8].copy_from_slice(&checksum.to_le_bytes());
        block
    }
}

/// CRC-32C over the superblock to the end of its block, checksum field zero, without the final inversion.
pub(crate) fn superblock_checksum(bytes: &[u8]) -> u32 {
    !crc32c::crc32c(bytes)
}

/// An inode's fields as they are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InodeFields {
    pub(crate) layout: DataLayout,
    pub(crate) xattr_bytes: usize,
    pub(crate) mode: u16,
    pub(crate) size: u64,
    /// First block of the data, or the device number.
    pub(crate) block_or_device: u32,
    pub(crate) ino: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nanoseconds: u32,
    pub(crate) links: u32,
}

impl InodeFields {
    /// The 64-byte form, which alone has a time of its own and 32-bit owners.
    pub(crate) fn encode(&self) -> [u8; EXTENDED_INODE] {
        let mut inode = [0; EXTENDED_INODE];
        let mut put =
            |offset: usize, bytes: &[u8]| inode[offset..offset + bytes.len()].copy_from_slice(bytes);
        let layout = match self.layout {
            DataLayout::Plain => 0u16,
            DataLayout::Inline => 2,
        };
        put(0, &(1 | layout << 1).to_le_bytes());
        put(2, &xattr_count(self.xattr_bytes).to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.block_or_device.to_le_bytes());
        put(20, &self.ino.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.to_le_bytes());
        put(40, &self.mtime_nanoseconds.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        inode
    }
}

/// The attribute area's size as inodes count it.
fn xattr_count(bytes: usize) -> u16 {
    if bytes == 0 { 0 } else { (1 + (bytes - XATTR_HEADER) / XATTR_ENTRY) as u16 }
}

/// The largest attribute area that the inode's 16-bit count can express.
pub(crate) const MAX_XATTR_BYTES: usize = XATTR_HEADER + (u16::MAX as usize - 1) * XATTR_ENTRY;

/// Linux's `new_encode_dev`: 12 bits of major number, 20 of minor. `None` if they do not fit.
pub(crate) fn encode_device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xff) | major << 8 | (minor & !0xff) << 12)
}

/// The reverse.
pub(crate) fn decode_device(device: u32) -> (u32, u32) {
    ((device & 0xfff00) >> 8, (device & 0xff) | ((device >> 12) & 0xfff00))
}

/// The directory entry's type for a mode.
pub(crate) fn dirent_type(mode: u16) -> u8 {
    match mode & MODE_TYPE {
        MODE_REGULAR => 1,
        MODE_DIR => 2,
        MODE_CHAR => 3,
        MODE_BLOCK => 4,
        MODE_FIFO => 5,
        MODE_SYMLINK => 7,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_go_there_and_back() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (259, 256), (0xfff, 0xfffff)] {
            assert_eq!(decode_device(encode_device(major, minor).unwrap()), (major, minor));
        }
        assert_eq!(encode_device(0x1000, 0), None);
        assert_eq!(encode_device(0, 0x10_0000), None);
    }
}
