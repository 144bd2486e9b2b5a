//! One layer: from its blob (a tar stream, plain, gzip or zstd) to its EROFS image, with both digests computed on the
//! way: the blob's as it came, and the diff id over the whole uncompressed stream, padding after the end mark included.

use std::fs::File;
use std::io::{self, BufRead, BufWriter, Cursor, Read, Write};
use std::path::Path;
use std::thread::{self, JoinHandle};

use tempfile::NamedTempFile;

use crate::digest::Digest;
use crate::erofs::ImageOutput;
use crate::erofs::convert::{self, ConvertError};
use crate::faults;
use crate::pipeline::{self, StageReader};
use crate::recipe::RecipeWriter;
use coracle_tarball::{TarError, TarStream};

/// As much of a stream as is needed to tell what it is.
pub(crate) const HEAD: usize = coracle_tarball::BLOCK;

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
            _ if coracle_tarball::looks_like_tar(head) => Some(Self::Plain),
            _ => None,
        }
    }

    /// The unpacked stream. Memory is bounded by the format's window, whatever the stream says.
    pub(crate) fn unpack<'a, R: BufRead + Send + 'a>(
        self,
        reader: R,
    ) -> io::Result<Box<dyn Read + Send + 'a>> {
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
    /// Number of entries in the tar stream.
    pub entries: u64,
    /// Size of the recipe that leads from the image back to the tar stream.
    pub recipe_size: u64,
}

/// Reads a blob to its end and writes the layer's EROFS image, of at most `max_size` bytes (holes included; never
/// more than the 16 TiB that the format can address), and the recipe by which [`LayerTar`](crate::LayerTar) gives the
/// tar stream back. What has to wait for the image's end waits in a file in `scratch`.
///
/// Reading, unpacking and writing happen on a thread each, since hashing and unpacking take the longest.
pub fn convert_layer<R: Read + Send, W: ImageOutput, P: Write>(
    mut blob: R,
    image: W,
    recipe: P,
    scratch: &Path,
    max_size: u64,
) -> Result<ConvertedLayer, LayerError> {
    let mut head = Vec::with_capacity(HEAD);
    (&mut blob).take(HEAD as u64).read_to_end(&mut head).map_err(LayerError::reading)?;
    let packing = Packing::detect(&head).ok_or(LayerError::Unrecognised)?;
    let convert = |stream: StageReader| {
        let recipe = RecipeWriter::new(recipe).map_err(ConvertError::writing)?;
        convert::convert(TarStream::with_witness(stream, recipe), image, scratch, max_size)
    };
    thread::scope(|scope| {
        let (stream, blob_stage) = pipeline::stage(scope, Cursor::new(head).chain(blob));
        let (stream, diff_stage) = match packing {
            // One digest serves for both.
            Packing::Plain => (stream, None),
            _ => {
                let unpacked = packing.unpack(stream).map_err(LayerError::reading)?;
                let (stream, stage) = pipeline::stage(scope, unpacked);
                (stream, Some(stage))
            }
        };
        let image = convert(stream).map_err(LayerError::converting)?;
        let diff = diff_stage.map(pipeline::Stage::finish);
        let (blob, blob_size) = blob_stage.finish();
        let diff_id = diff.map_or(blob, |(diff_id, _)| diff_id);
        let recipe_size = image.recipe.size;
        Ok(ConvertedLayer {
            diff_id,
            blob,
            blob_size,
            image_size: image.size,
            entries: image.entries,
            recipe_size,
        })
    })
}

/// A converted layer in temporary files, which are deleted when this is dropped.
#[derive(Debug)]
pub(crate) struct NewLayer {
    pub(crate) converted: ConvertedLayer,
    image: NamedTempFile,
    recipe: NamedTempFile,
    /// Makes the files durable while others are read.
    sync: JoinHandle<io::Result<()>>,
}

impl NewLayer {
    /// Reads a blob to its end and converts it into files in `scratch`.
    pub(crate) fn convert(blob: impl Read + Send, scratch: &Path, max_size: u64) -> Result<Self, LayerError> {
        let local = |source| LayerError::Convert(ConvertError::writing(source));
        let new = |prefix| tempfile::Builder::new().prefix(prefix).tempfile_in(scratch).map_err(local);
        faults::point();
        let (image, recipe) = (new("layer-")?, new("recipe-")?);
        let recipe_out = BufWriter::new(recipe.as_file());
        let converted = convert_layer(blob, image.as_file(), recipe_out, scratch, max_size)?;
        let files = [image.as_file(), recipe.as_file()].map(File::try_clone);
        let sync = thread::spawn(move || {
            files.into_iter().try_for_each(|file| {
                faults::point();
                file?.sync_all()
            })
        });
        Ok(Self { converted, image, recipe, sync })
    }

    /// The image and the recipe, durable, to be renamed.
    pub(crate) fn into_files(self) -> io::Result<(NamedTempFile, NamedTempFile)> {
        self.sync.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((self.image, self.recipe))
    }
}
