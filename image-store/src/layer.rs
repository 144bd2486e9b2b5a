//! One layer: from its blob (a tar stream, plain, gzip or zstd) to its EROFS image, with both digests computed on the
//! way: the blob's as it came, and the diff id over the whole uncompressed stream, padding after the end mark included.

use std::io::{self, BufRead, BufReader, Cursor, Read, Seek, Write};

use crate::digest::{Digest, HashingReader};
use crate::erofs::convert::{self, ConvertError};
use crate::tarball::{self, TarError, TarStream};

const BUFFER: usize = 64 * 1024;
/// As much of a stream as is needed to tell what it is.
pub(crate) const HEAD: usize = tarball::BLOCK;

/// How a stream is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// From the stream's first bytes; `None` if it is no tar stream, as far as one can see.
    pub(crate) fn detect(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            // A skippable frame, which may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            _ if tarball::looks_like_tar(head) => Some(Self::Plain),
            _ => None,
        }
    }

    /// The unpacked stream. Memory is bounded by the format's window, whatever the stream says.
    pub(crate) fn unpack<'a, R: BufRead + 'a>(self, reader: R) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Plain => Box::new(reader),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(reader)?),
        })
    }
}

/// Why a blob is no usable layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The first bytes are of no known format.
    #[error("layer is not a tar, gzip or zstd stream")]
    Unrecognised,
    /// The stream ended too early.
    #[error("layer is truncated")]
    Truncated,
    /// The stream cannot be read or unpacked.
    #[error("layer cannot be read or unpacked")]
    Read(#[source] io::Error),
    /// The tar stream in it cannot be converted.
    #[error("layer cannot be converted")]
    Convert(#[source] ConvertError),
}

impl LayerError {
    fn reading(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Read(error),
        }
    }

    fn converting(error: ConvertError) -> Self {
        match error {
            ConvertError::Tar(TarError::Truncated(_)) => Self::Truncated,
            ConvertError::Tar(TarError::Read(source)) => Self::reading(source),
            // Inside a gzip or zstd stream there may be something else than a tar stream.
            ConvertError::Tar(TarError::NotATar) => Self::Unrecognised,
            other => Self::Convert(other),
        }
    }

    /// Whether it is the host's disk that failed, not the layer.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self, Self::Convert(ConvertError::NoSpace(_) | ConvertError::Write(_)))
    }

    /// Whether the disk is full.
    pub(crate) fn is_no_space(&self) -> bool {
        matches!(self, Self::Convert(ConvertError::NoSpace(_)))
    }
}

/// What a layer turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvertedLayer {
    /// Digest of the uncompressed stream.
    pub diff_id: Digest,
    /// Digest of the blob as it came.
    pub blob: Digest,
    /// Its size.
    pub blob_size: u64,
    /// Size of the EROFS image.
    pub image_size: u64,
}

/// Reads a blob to its end and writes the layer's EROFS image, of at most `max_size` bytes (holes included; never
/// more than the 16 TiB that the format can address).
pub fn convert_layer<R: Read, W: Write + Seek>(
    blob: R,
    out: W,
    max_size: u64,
) -> Result<ConvertedLayer, LayerError> {
    let mut blob = HashingReader::new(blob);
    let mut head = Vec::with_capacity(HEAD);
    (&mut blob).take(HEAD as u64).read_to_end(&mut head).map_err(LayerError::reading)?;
    let packing = Packing::detect(&head).ok_or(LayerError::Unrecognised)?;
    let (image, diff_id) = {
        let whole = BufReader::with_capacity(BUFFER, Cursor::new(&head).chain(&mut blob));
        let mut diff = HashingReader::new(packing.unpack(whole).map_err(LayerError::reading)?);
        let mut tar = TarStream::new(&mut diff);
        let image = convert::convert(&mut tar, out, max_size).map_err(LayerError::converting)?;
        tar.get_mut().drain().map_err(LayerError::reading)?;
        (image, diff.finish().0)
    };
    blob.drain().map_err(LayerError::reading)?;
    let (blob, blob_size) = blob.finish();
    Ok(ConvertedLayer { diff_id, blob, blob_size, image_size: image.size })
}
