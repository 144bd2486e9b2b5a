//! From a layer's tar stream to its image: which entry becomes what. The stream is hostile; whatever it names stays
//! inside the image, because nothing is ever made on the host's file system.

use std::io::{self, Read, Write};
use std::path::Path;

use super::format::{self, MODE_BLOCK, MODE_CHAR, MODE_FIFO};
use super::path::{self, LayerPath};
use super::tree::{Kind, Meta, Tree};
use super::writer::{self, ImageOutput, ImageStats, ImageWriter};
use super::xattr;
use crate::recipe::RecipeWriter;
use coracle_tarball::{Entry, EntryKind, SparseMap, TarError, TarStream};

/// Marks of AUFS in tar streams, which OCI took over.
const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const CHUNK: usize = 128 * 1024;

/// Why a layer cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The stream is no good tar stream.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be part of a layer.
    #[error("entry `{path}` is refused: {reason}")]
    Entry {
        /// The entry's path, as far as it can be shown.
        path: String,
        /// Why.
        reason: String,
    },
    /// A directory cannot be written.
    #[error("a directory cannot be written: {reason}")]
    Directory {
        /// Why.
        reason: &'static str,
    },
    /// The image would not fit into 32-bit block addresses.
    #[error("the layer is too large")]
    TooLarge,
    /// The disk is full.
    #[error("no space left on the disk that holds the images")]
    NoSpace(#[source] io::Error),
    /// The image file cannot be written.
    #[error("the layer's image cannot be written")]
    Write(#[source] io::Error),
}

impl ConvertError {
    pub(crate) fn writing(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace(error),
            _ => Self::Write(error),
        }
    }
}

/// Reads the tar stream to its end, writes the image, and completes the recipe to which the stream's headers pass;
/// `max_size` bounds the image, holes included.
pub(crate) fn convert<R: Read, P: Write, W: ImageOutput>(
    mut tar: TarStream<R, RecipeWriter<P>>,
    out: W,
    scratch: &Path,
    max_size: u64,
) -> Result<ImageStats, ConvertError> {
    let mut converter = Converter {
        tree: Tree::new(),
        image: ImageWriter::new(out, scratch, max_size)?,
        chunk: vec![0; CHUNK],
    };
    let mut entries = 0;
    while let Some(mut entry) = tar.next_entry()? {
        converter.add(&mut tar, &mut entry)?;
        entries += 1;
    }
    tar.drain()?;
    let stats = converter.image.finish(&mut converter.tree, tar.into_witness())?;
    Ok(ImageStats { entries, ..stats })
}

struct Converter<W: ImageOutput> {
    tree: Tree,
    image: ImageWriter<W>,
    chunk: Vec<u8>,
}

impl<W: ImageOutput> Converter<W> {
    fn add<R: Read, P: Write>(
        &mut self,
        tar: &mut TarStream<R, RecipeWriter<P>>,
        entry: &mut Entry,
    ) -> Result<(), ConvertError> {
        let raw_path = std::mem::take(&mut entry.path);
        let refused = |reason: String| ConvertError::Entry { path: path::display(&raw_path), reason };
        let layer_path = LayerPath::parse(&raw_path).map_err(|reason| refused(reason.to_owned()))?;
        let Some((name, parents)) = layer_path.components().split_last() else {
            return self.set_root(entry).map_err(refused);
        };
        if parents.iter().chain([name]).any(|part| part.starts_with(WHITEOUT_META) && *part != OPAQUE) {
            return Ok(());
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(refused("it lies beneath a whiteout".to_owned()));
        }
        let parent = self.tree.make_directories(parents).map_err(refused)?;
        if *name == OPAQUE {
            self.tree.set_opaque(parent);
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return match hidden {
                b"" | b"." | b".." => Err(refused("it is a whiteout of no name".to_owned())),
                _ => self.tree.put_whiteout(parent, hidden).map_err(refused),
            };
        }
        let kind = match entry.kind {
            EntryKind::Directory => {
                let meta = meta(entry).map_err(refused)?;
                return self.tree.put_directory(parent, name, meta).map(drop).map_err(refused);
            }
            EntryKind::HardLink => {
                let target = LayerPath::parse(&entry.link)
                    .map_err(|reason| refused(format!("its hard link target is bad: {reason}")))?;
                return self.tree.link(parent, name, &target).map_err(|reason| {
                    refused(format!("{reason} (target `{}`)", path::display(&entry.link)))
                });
            }
            EntryKind::Regular => {
                let meta = meta(entry).map_err(refused)?;
                let kind = self.file_data(tar, entry, meta.xattrs.len())?;
                let tail = matches!(kind, Kind::File { tail: Some(_), .. });
                let id = self.tree.put(parent, name, meta, kind).map_err(refused)?;
                if tail {
                    self.image.tail_belongs_to(id, entry.size);
                }
                return Ok(());
            }
            EntryKind::Symlink => Kind::Symlink(symlink_target(&entry.link).map_err(refused)?),
            EntryKind::CharDevice => special(MODE_CHAR, entry.device).map_err(refused)?,
            EntryKind::BlockDevice => special(MODE_BLOCK, entry.device).map_err(refused)?,
            EntryKind::Fifo => Kind::Special { type_bits: MODE_FIFO, device: 0 },
            EntryKind::Other(flag) => {
                return Err(refused(format!(
                    "its type `{}` is not supported",
                    char::from(flag).escape_default()
                )));
            }
        };
        let meta = meta(entry).map_err(refused)?;
        self.tree.put(parent, name, meta, kind).map(drop).map_err(refused)
    }

    fn set_root(&mut self, entry: &mut Entry) -> Result<(), String> {
        if entry.kind != EntryKind::Directory {
            return Err("it would replace the layer's root by something that is not a directory".to_owned());
        }
        self.tree.node_mut(Tree::ROOT).meta = meta(entry)?;
        Ok(())
    }

    /// Copies the entry's data into the image, and its place there into the recipe.
    fn file_data<R: Read, P: Write>(
        &mut self,
        tar: &mut TarStream<R, RecipeWriter<P>>,
        entry: &Entry,
        xattr_bytes: usize,
    ) -> Result<Kind, ConvertError> {
        if let Some(map) = &entry.sparse {
            return self.sparse_data(tar, map);
        }
        let tail = writer::tail_behind_inode(entry.size, xattr_bytes);
        let body = entry.size - tail as u64;
        self.image.begin_file(body)?;
        self.copy(tar, body)?;
        let first_block = self.image.end_file()?;
        if body > 0 {
            tar.witness().data(u64::from(first_block) * format::BLOCK, body);
        }
        if tail == 0 {
            return Ok(Kind::File { first_block, size: entry.size, tail: None });
        }
        let bytes = &mut self.chunk[..tail];
        let mut filled = 0;
        while filled < tail {
            match tar.read_data(&mut bytes[filled..])? {
                0 => return Err(ConvertError::Tar(TarError::Truncated(0))),
                read => filled += read,
            }
        }
        let place = self.image.push_tail(bytes)?;
        tar.witness().tail(tail);
        Ok(Kind::File { first_block, size: entry.size, tail: Some(place) })
    }

    /// Copies the data of a file with holes.
    fn sparse_data<R: Read, P: Write>(
        &mut self,
        tar: &mut TarStream<R, RecipeWriter<P>>,
        map: &SparseMap,
    ) -> Result<Kind, ConvertError> {
        let first_block = self.image.begin_sparse_file(map.real_size)?;
        let mut position = 0;
        for (offset, length) in &map.ranges {
            self.image.hole(offset - position)?;
            self.copy(tar, *length)?;
            position = offset + length;
            if *length > 0 {
                tar.witness().data(u64::from(first_block) * format::BLOCK + offset, *length);
            }
        }
        self.image.hole(map.real_size - position)?;
        self.image.end_sparse_file()?;
        Ok(Kind::File { first_block, size: map.real_size, tail: None })
    }

    fn copy<R: Read, P: Write>(
        &mut self,
        tar: &mut TarStream<R, RecipeWriter<P>>,
        length: u64,
    ) -> Result<(), ConvertError> {
        let mut left = length;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(self.chunk.len());
            let read = tar.read_data(&mut self.chunk[..want])?;
            if read == 0 {
                // The map was checked against the stored size, so this cannot be reached by a good reader.
                return Err(ConvertError::Tar(TarError::Truncated(0)));
            }
            self.image.write(&self.chunk[..read])?;
            left -= read as u64;
        }
        Ok(())
    }
}

fn meta(entry: &mut Entry) -> Result<Meta, String> {
    let mut attributes = Vec::new();
    for (name, value) in std::mem::take(&mut entry.xattrs) {
        attributes.extend(xattr::from_name(&name, value)?);
    }
    Ok(Meta {
        permissions: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        xattrs: xattr::encode(attributes)?,
    })
}

fn symlink_target(target: &[u8]) -> Result<Box<[u8]>, String> {
    match target {
        b"" => Err("its symbolic link has no target".to_owned()),
        _ if target.len() > 4095 => Err("its symbolic link's target is longer than 4095 bytes".to_owned()),
        _ if target.contains(&0) => Err("its symbolic link's target contains a NUL byte".to_owned()),
        _ => Ok(target.into()),
    }
}

fn special(type_bits: u16, (major, minor): (u32, u32)) -> Result<Kind, String> {
    let device = format::encode_device(major, minor)
        .ok_or_else(|| format!("its device number {major}:{minor} is out of range"))?;
    Ok(Kind::Special { type_bits, device })
}
