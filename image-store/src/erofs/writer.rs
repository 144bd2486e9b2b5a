//! Writes an image in one pass: file data goes to whole blocks as it comes; inodes and directories follow when the
//! tree is known, the root first because its number has only 16 bits; the superblock is written last, so that an
//! unfinished image is never mistaken for a whole one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Cursor, Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::convert::ConvertError;
use super::dirs::{self, Dirent};
use super::format::{
    BLOCK, DataLayout, EXTENDED_INODE, INODE_SLOT, InodeFields, MODE_DIR, MODE_TYPE, Superblock, dirent_type,
};
use super::spool::Spool;
use super::tree::{Kind, Node, NodeId, Tree};
use crate::faults;
use crate::recipe::{RecipeStats, RecipeWriter, Tail};

const BUFFER: usize = 256 * 1024;
/// Contents are compared in pieces of this size.
const COMPARED: usize = 64 * 1024;
/// Holes from this size on are left as holes in the image file, not written as zeros.
const MIN_HOLE: u64 = 64 * 1024;
/// Block addresses have 32 bits.
pub(crate) const MAX_IMAGE: u64 = (u32::MAX as u64 - 1) * BLOCK;
/// The end of a file stands behind its inode if it is not longer: it saves a block, but inodes that lie far apart make
/// walks through the tree slow.
const MAX_TAIL: u64 = 1024;
/// So many contents are remembered to share their blocks with later files.
const MAX_CONTENTS: usize = 1 << 20;

/// Where an image can be written.
pub trait ImageOutput: Read + Write + Seek {
    /// Cuts it off at this length.
    fn set_len(&mut self, length: u64) -> io::Result<()>;
}

impl ImageOutput for &File {
    fn set_len(&mut self, length: u64) -> io::Result<()> {
        File::set_len(self, length)
    }
}

impl ImageOutput for &mut Cursor<Vec<u8>> {
    fn set_len(&mut self, length: u64) -> io::Result<()> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.get_mut().resize(length, 0);
        Ok(())
    }
}

/// How much of a file of this size stands behind its inode.
pub(super) fn tail_behind_inode(size: u64, xattr_bytes: usize) -> usize {
    let tail = size % BLOCK;
    let fits = tail <= MAX_TAIL && (EXTENDED_INODE + xattr_bytes) as u64 + tail <= BLOCK;
    if fits { tail as usize } else { 0 }
}

/// The image under construction.
pub(super) struct ImageWriter<W: ImageOutput> {
    out: BufWriter<W>,
    position: u64,
    /// Up to here there may be something else than zeros.
    written: u64,
    max_size: u64,
    file: FileInProgress,
    /// First block by number of blocks and checksum.
    contents: HashMap<(u32, u32), u32>,
    spool: Spool,
}

#[derive(Default)]
struct FileInProgress {
    start: u64,
    checksum: u32,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ImageStats {
    /// Size of the image in bytes, whole blocks.
    pub(crate) size: u64,
    /// Number of entries in the tar stream.
    pub(crate) entries: u64,
    /// Size of the recipe.
    pub(crate) recipe: RecipeStats,
}

/// How an inode and its data lie in the image.
struct Placement {
    /// Inode with its attributes.
    inode_bytes: u64,
    data_bytes: u64,
    layout: DataLayout,
    /// Blocks of data outside the inode that are written with the metadata.
    blocks: u64,
}

impl<W: ImageOutput> ImageWriter<W> {
    pub(super) fn new(out: W, scratch: &Path, max_size: u64) -> Result<Self, ConvertError> {
        let mut writer = Self {
            out: BufWriter::with_capacity(BUFFER, out),
            position: 0,
            written: 0,
            max_size: max_size.min(MAX_IMAGE),
            file: FileInProgress::default(),
            contents: HashMap::new(),
            spool: Spool::new(scratch),
        };
        writer.zeros(BLOCK)?;
        Ok(writer)
    }

    fn check_fits(&self, size: u64) -> Result<(), ConvertError> {
        let end = self.position.checked_add(size).filter(|end| *end <= self.max_size);
        end.map(drop).ok_or(ConvertError::TooLarge)
    }

    /// Starts a file's data.
    pub(super) fn begin_file(&mut self, size: u64) -> Result<(), ConvertError> {
        faults::point();
        self.check_fits(size)?;
        self.file = FileInProgress { start: self.position, checksum: 0 };
        Ok(())
    }

    /// Ends a file's data; its first block. If the image has the same content already, this is where it was.
    pub(super) fn end_file(&mut self) -> Result<u32, ConvertError> {
        let (start, end) = (self.file.start, self.position.next_multiple_of(BLOCK));
        if start == end {
            return Ok(0);
        }
        self.pad_to(end)?;
        let too_large = |_| ConvertError::TooLarge;
        let first_block = u32::try_from(start / BLOCK).map_err(too_large)?;
        let blocks = u32::try_from((end - start) / BLOCK).map_err(too_large)?;
        let key = (blocks, self.file.checksum);
        match self.contents.get(&key).copied() {
            Some(known) => {
                let equal = self.are_equal(u64::from(known) * BLOCK, start, end - start);
                if equal.map_err(ConvertError::writing)? {
                    self.seek(start)?;
                    return Ok(known);
                }
            }
            None if self.contents.len() >= MAX_CONTENTS => {}
            None => drop(self.contents.insert(key, first_block)),
        }
        Ok(first_block)
    }

    /// Compares two ranges of what was written.
    fn are_equal(&mut self, one: u64, other: u64, length: u64) -> io::Result<bool> {
        self.out.flush()?;
        let out = self.out.get_mut();
        let mut buffers = [vec![0; COMPARED], vec![0; COMPARED]];
        let mut done = 0;
        let mut equal = true;
        while equal && done < length {
            let step = (length - done).min(COMPARED as u64) as usize;
            for (buffer, start) in buffers.iter_mut().zip([one, other]) {
                out.seek(SeekFrom::Start(start + done))?;
                out.read_exact(&mut buffer[..step])?;
            }
            equal = buffers[0][..step] == buffers[1][..step];
            done += step as u64;
        }
        out.seek(SeekFrom::Start(self.position))?;
        Ok(equal)
    }

    /// Starts the data of a file with holes; its first block.
    pub(super) fn begin_sparse_file(&mut self, size: u64) -> Result<u32, ConvertError> {
        if size == 0 {
            return Ok(0);
        }
        self.check_fits(size)?;
        u32::try_from(self.position / BLOCK).map_err(|_| ConvertError::TooLarge)
    }

    pub(super) fn end_sparse_file(&mut self) -> Result<(), ConvertError> {
        self.pad_to(self.position.next_multiple_of(BLOCK))
    }

    /// Keeps the end of a file for the time when its inode is written; its place.
    pub(super) fn push_tail(&mut self, bytes: &[u8]) -> Result<u64, ConvertError> {
        self.spool.push(bytes).map_err(ConvertError::writing)
    }

    /// Says which file of this size had the last end.
    pub(super) fn tail_belongs_to(&mut self, node: NodeId, size: u64) {
        self.spool.belongs_to(node, (size % BLOCK) as u16);
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ConvertError> {
        self.out.write_all(bytes).map_err(ConvertError::writing)?;
        self.file.checksum = crc32c::crc32c_append(self.file.checksum, bytes);
        self.position += bytes.len() as u64;
        self.written = self.written.max(self.position);
        Ok(())
    }

    fn seek(&mut self, position: u64) -> Result<(), ConvertError> {
        self.position = position;
        self.out.seek(SeekFrom::Start(position)).map(drop).map_err(ConvertError::writing)
    }

    pub(super) fn hole(&mut self, length: u64) -> Result<(), ConvertError> {
        if length < MIN_HOLE {
            return self.zeros(length);
        }
        self.check_fits(length)?;
        let target = self.position + length;
        // A file that turned out to be known already may have left its bytes here.
        self.zeros(self.written.clamp(self.position, target) - self.position)?;
        self.seek(target)
    }

    fn zeros(&mut self, length: u64) -> Result<(), ConvertError> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        let mut left = length;
        while left > 0 {
            let step = left.min(BLOCK);
            self.write(&ZEROS[..step as usize])?;
            left -= step;
        }
        Ok(())
    }

    fn pad_to(&mut self, position: u64) -> Result<(), ConvertError> {
        match position.checked_sub(self.position) {
            Some(0) | None => Ok(()),
            Some(gap) => self.zeros(gap),
        }
    }

    /// Writes the tree and the superblock, and completes the recipe.
    pub(super) fn finish<P: Write>(
        mut self,
        tree: &mut Tree,
        recipe: RecipeWriter<P>,
    ) -> Result<ImageStats, ConvertError> {
        self.contents = HashMap::new();
        self.spool.seal().map_err(ConvertError::writing)?;
        let order = tree.in_layout_order();
        for id in &order {
            tree.mark_for_overlay(*id).map_err(|reason| ConvertError::Directory { reason })?;
        }
        let meta_start = self.position;
        let inodes_end = assign_nids(tree, &order);
        let first_block = (meta_start + inodes_end).div_ceil(BLOCK);
        let blocks = first_block + order.iter().map(|id| placement(tree.node(*id)).blocks).sum::<u64>();
        if blocks * BLOCK > self.max_size {
            return Err(ConvertError::TooLarge);
        }
        self.write_inodes(tree, &order, meta_start, first_block)?;
        self.pad_to(first_block * BLOCK)?;
        self.write_outside_blocks(tree, &order)?;
        let too_large = |_| ConvertError::TooLarge;
        let superblock = Superblock {
            root_nid: u16::try_from(tree.node(Tree::ROOT).nid).map_err(too_large)?,
            inodes: order.len() as u64,
            blocks: u32::try_from(blocks).map_err(too_large)?,
            meta_block: u32::try_from(meta_start / BLOCK).map_err(too_large)?,
        };
        faults::point();
        self.out.seek(SeekFrom::Start(0)).map_err(ConvertError::writing)?;
        self.out.write_all(&superblock.encode_block()).map_err(ConvertError::writing)?;
        self.out.flush().map_err(ConvertError::writing)?;
        self.out.get_mut().set_len(blocks * BLOCK).map_err(ConvertError::writing)?;
        let recipe = self.finish_recipe(tree, recipe, meta_start).map_err(ConvertError::writing)?;
        Ok(ImageStats { size: blocks * BLOCK, entries: 0, recipe })
    }

    /// Tells the recipe where the ends of files are now.
    fn finish_recipe<P: Write>(
        &mut self,
        tree: &Tree,
        recipe: RecipeWriter<P>,
        meta_start: u64,
    ) -> io::Result<RecipeStats> {
        let mut tails = recipe.finish_steps()?;
        for (id, place, length) in self.spool.tails() {
            let node = tree.node(id);
            tails.tail(&match node.kind {
                Kind::Removed => Tail::Lost(self.spool.read(place, length)?),
                _ => Tail::At(meta_start + node.nid * INODE_SLOT + placement(node).inode_bytes),
            })?;
        }
        tails.finish()
    }

    fn write_inodes(
        &mut self,
        tree: &Tree,
        order: &[NodeId],
        meta_start: u64,
        first_block: u64,
    ) -> Result<(), ConvertError> {
        let mut next_block = first_block;
        for (index, id) in order.iter().enumerate() {
            let node = tree.node(*id);
            let placement = placement(node);
            self.pad_to(meta_start + node.nid * INODE_SLOT)?;
            let block_or_device = match &node.kind {
                Kind::File { first_block, .. } => *first_block,
                Kind::Special { device, .. } => *device,
                _ if placement.blocks == 0 => 0,
                _ => next_block as u32,
            };
            next_block += placement.blocks;
            let fields = InodeFields {
                layout: placement.layout,
                xattr_bytes: node.meta.xattrs.len(),
                mode: node.mode(),
                size: placement.data_bytes,
                block_or_device,
                ino: index as u32 + 1,
                uid: node.meta.uid,
                gid: node.meta.gid,
                mtime: node.meta.mtime.seconds,
                mtime_nanoseconds: node.meta.mtime.nanoseconds,
                links: links(tree, node),
            };
            self.write(&fields.encode())?;
            self.write(&node.meta.xattrs)?;
            if let Kind::File { size, tail: Some(place), .. } = &node.kind {
                let bytes =
                    self.spool.read(*place, (size % BLOCK) as usize).map_err(ConvertError::writing)?;
                // Not through `write`, whose checksum is of no use here.
                self.out.write_all(bytes).map_err(ConvertError::writing)?;
                self.position += size % BLOCK;
                self.written = self.written.max(self.position);
            } else if placement.layout == DataLayout::Inline {
                let data = metadata_data(tree, *id);
                self.write(&data[(placement.blocks * BLOCK) as usize..])?;
            }
        }
        Ok(())
    }

    /// Directories and link targets that do not fit behind their inodes.
    fn write_outside_blocks(&mut self, tree: &Tree, order: &[NodeId]) -> Result<(), ConvertError> {
        for id in order {
            let blocks = placement(tree.node(*id)).blocks;
            if blocks > 0 {
                let data = metadata_data(tree, *id);
                self.write(&data[..data.len().min((blocks * BLOCK) as usize)])?;
                self.pad_to(self.position.next_multiple_of(BLOCK))?;
            }
        }
        Ok(())
    }
}

/// Gives each node its place after the data; the number of bytes up to the end of the last.
fn assign_nids(tree: &mut Tree, order: &[NodeId]) -> u64 {
    // Number 0 is avoided: tools take it for "none".
    let mut end = EXTENDED_INODE as u64;
    for id in order {
        let node = tree.node_mut(*id);
        let placement = placement(node);
        let in_one_block = match placement.layout {
            DataLayout::Inline => placement.inode_bytes + placement.data_bytes % BLOCK,
            DataLayout::Plain => EXTENDED_INODE as u64,
        };
        let mut start = end.next_multiple_of(INODE_SLOT);
        if start % BLOCK + in_one_block > BLOCK {
            start = start.next_multiple_of(BLOCK);
        }
        node.nid = start / INODE_SLOT;
        let inline = if placement.layout == DataLayout::Inline { placement.data_bytes % BLOCK } else { 0 };
        end = start + placement.inode_bytes + inline;
    }
    end
}

fn placement(node: &Node) -> Placement {
    let inode_bytes = (EXTENDED_INODE + node.meta.xattrs.len()) as u64;
    let data_bytes = match &node.kind {
        Kind::File { size, tail, .. } => {
            let layout = if tail.is_some() { DataLayout::Inline } else { DataLayout::Plain };
            return Placement { inode_bytes, data_bytes: *size, layout, blocks: 0 };
        }
        Kind::Directory(directory) => {
            dirs::size(names(directory.children.keys().map(|name| &**name)).into_iter())
        }
        Kind::Symlink(target) => target.len() as u64,
        Kind::Special { .. } | Kind::Removed => 0,
    };
    let tail = data_bytes % BLOCK;
    if tail > 0 && inode_bytes + tail <= BLOCK {
        return Placement { inode_bytes, data_bytes, layout: DataLayout::Inline, blocks: data_bytes / BLOCK };
    }
    Placement { inode_bytes, data_bytes, layout: DataLayout::Plain, blocks: data_bytes.div_ceil(BLOCK) }
}

/// A directory's sorted names with `.` and `..` in their places.
fn names<'a>(children: impl Iterator<Item = &'a [u8]>) -> Vec<&'a [u8]> {
    let mut names: Vec<&[u8]> = children.collect();
    for name in [&b"."[..], b".."] {
        let place = names.partition_point(|other| *other < name);
        names.insert(place, name);
    }
    names
}

/// The data of a directory or symbolic link.
fn metadata_data(tree: &Tree, id: NodeId) -> Vec<u8> {
    let node = tree.node(id);
    let directory = match &node.kind {
        Kind::Directory(directory) => directory,
        Kind::Symlink(target) => return target.to_vec(),
        _ => return Vec::new(),
    };
    let mut entries: Vec<_> = directory
        .children
        .iter()
        .map(|(name, child)| {
            let child = tree.node(*child);
            Dirent { name, nid: child.nid, file_type: dirent_type(child.mode()) }
        })
        .collect();
    for (name, nid) in [(&b"."[..], node.nid), (b"..", tree.node(directory.parent).nid)] {
        let place = entries.partition_point(|other| other.name < name);
        entries.insert(place, Dirent { name, nid, file_type: dirent_type(MODE_DIR) });
    }
    dirs::encode(&entries)
}

fn links(tree: &Tree, node: &Node) -> u32 {
    match &node.kind {
        Kind::Directory(directory) => {
            let is_directory = |child: &&NodeId| tree.node(**child).mode() & MODE_TYPE == MODE_DIR;
            2 + directory.children.values().filter(is_directory).count() as u32
        }
        _ => node.links,
    }
}
