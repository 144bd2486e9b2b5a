//! Image archives as `docker save`, podman, skopeo, umoci and buildx write them: docker-archive (old and new form)
//! and OCI image layout, in a tar stream that may be packed. The stream is read once, from a socket: every entry that
//! looks like a layer is converted as it passes, and only afterwards the manifests tell what belongs to what. Nothing
//! in the archive is trusted: digests and sizes are compared, and a mismatch fails the whole load.

mod docker;
mod oci;
mod scan;

use std::io;

use serde::de::DeserializeOwned;

use crate::config::{ConfigError, ImageConfig};
use crate::digest::Digest;
use crate::layer::LayerError;
use crate::reference::{InvalidReference, Reference};
use coracle_tarball::TarError;

pub use scan::LoadProgress;
pub(crate) use scan::{Scan, scan};

/// Why an archive cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The first bytes are of no known format.
    #[error("archive is not a tar, gzip or zstd stream")]
    Unrecognised,
    /// The stream ended too early.
    #[error("archive is truncated")]
    Truncated,
    /// The stream cannot be read or unpacked.
    #[error("archive cannot be read or unpacked")]
    Read(#[source] io::Error),
    /// The outer tar stream is malformed.
    #[error("archive is malformed")]
    Tar(#[source] TarError),
    /// It is a tar stream of something else.
    #[error("archive has neither a manifest.json nor an index.json, so it is not an image archive")]
    NoManifest,
    /// An entry with a path that no image archive has.
    #[error("archive entry `{path}` is refused: {reason}")]
    Entry {
        /// The path as far as it can be shown.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// More or larger files than any honest archive has.
    #[error("archive has too many or too large {0}")]
    TooLarge(&'static str),
    /// A manifest names what is not there.
    #[error("archive lacks {what} `{path}`")]
    Missing {
        /// What it is.
        what: &'static str,
        /// Its place in the archive.
        path: String,
    },
    /// A JSON document is malformed.
    #[error("`{path}` in the archive is malformed")]
    Json {
        /// Its place in the archive.
        path: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// An image's config is malformed.
    #[error("config `{path}` in the archive is refused")]
    Config {
        /// Its place in the archive.
        path: String,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// A document that contradicts itself or others.
    #[error("`{path}` in the archive is refused: {reason}")]
    Invalid {
        /// Its place in the archive.
        path: String,
        /// Why.
        reason: String,
    },
    /// Something is not what its digest says.
    #[error("wrong digest of {what}: expected {expected}, found {found}")]
    DigestMismatch {
        /// What.
        what: String,
        /// The digest that the archive promises.
        expected: Digest,
        /// The digest of what is there.
        found: Digest,
    },
    /// Something is not as long as its descriptor says.
    #[error("wrong size of {what}: expected {expected} bytes, found {found}")]
    SizeMismatch {
        /// What.
        what: String,
        /// The size that the archive promises.
        expected: u64,
        /// The size of what is there.
        found: u64,
    },
    /// A layer is unusable.
    #[error("layer `{name}` cannot be used")]
    Layer {
        /// Its place in the archive.
        name: String,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// A name in the archive is no image name.
    #[error("archive has a bad image name")]
    Reference(#[from] InvalidReference),
}

impl ArchiveError {
    fn reading(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Read(error),
        }
    }

    /// Whether it is the host's disk that failed, not the archive.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self, Self::Layer { source, .. } if source.is_local())
    }

    /// Whether the disk is full.
    pub(crate) fn is_no_space(&self) -> bool {
        matches!(self, Self::Layer { source, .. } if source.is_no_space())
    }
}

impl From<TarError> for ArchiveError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Truncated(_) => Self::Truncated,
            TarError::NotATar => Self::Unrecognised,
            TarError::Read(source) => Self::reading(source),
            other => Self::Tar(other),
        }
    }
}

/// An image in the archive whose parts are all there and match their digests.
#[derive(Debug)]
pub(crate) struct ResolvedImage {
    /// The config as it came.
    pub(crate) config_raw: Vec<u8>,
    pub(crate) config: ImageConfig,
    /// The OCI manifest as it came, if the archive names the image by one.
    pub(crate) manifest: Option<Vec<u8>>,
    pub(crate) tags: Vec<Reference>,
}

/// Tells what images the scanned archive holds. `is_stored` says which layers need not be in the archive.
pub(crate) fn resolve(
    scan: &mut Scan,
    is_stored: &dyn Fn(&Digest) -> bool,
) -> Result<Vec<ResolvedImage>, ArchiveError> {
    if scan.has(docker::MANIFEST) {
        return docker::resolve(scan, is_stored);
    }
    if scan.has(oci::INDEX) {
        return oci::resolve(scan, is_stored);
    }
    Err(ArchiveError::NoManifest)
}

fn parse_json<T: DeserializeOwned>(path: &str, bytes: &[u8]) -> Result<T, ArchiveError> {
    serde_json::from_slice(bytes).map_err(|source| ArchiveError::Json { path: path.to_owned(), source })
}

fn parse_config(path: &str, bytes: &[u8]) -> Result<ImageConfig, ArchiveError> {
    ImageConfig::parse(bytes).map_err(|source| ArchiveError::Config { path: path.to_owned(), source })
}

fn check_digest(
    what: impl FnOnce() -> String,
    expected: &Digest,
    found: &Digest,
) -> Result<(), ArchiveError> {
    if expected == found {
        return Ok(());
    }
    Err(ArchiveError::DigestMismatch { what: what(), expected: *expected, found: *found })
}

/// One layer file per diff id, or the config and the manifest are of different images.
fn check_layer_count(path: &str, layers: usize, config: &ImageConfig) -> Result<(), ArchiveError> {
    let diff_ids = config.rootfs.diff_ids.len();
    if layers == diff_ids {
        return Ok(());
    }
    let reason = format!("it lists {layers} layers, but the image config has {diff_ids} diff ids");
    Err(ArchiveError::Invalid { path: path.to_owned(), reason })
}
