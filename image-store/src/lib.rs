//! Image archives, registries, manifests and layers: a content-addressed store that needs no VM, no root and no Linux.
//!
//! [`ImageStore::load`] reads what `docker save` and its kin write, converts each layer to an EROFS image while it
//! streams by, and keeps it under its digest. Archives are untrusted; what is in the store was verified. A crash at any
//! point leaves the old state or the new, and the next [`ImageStore::open`] clears the debris.
//!
//! ```no_run
//! # fn main() -> Result<(), coracle_image_store::Error> {
//! use coracle_image_store::ImageStore;
//!
//! let store = ImageStore::open("images".as_ref())?;
//! let archive = std::fs::File::open("busybox.tar").expect("an archive");
//! for loaded in store.load(archive, &mut |_| {})? {
//!     loaded.messages().iter().for_each(|message| println!("{message}"));
//! }
//! let image = store.image(&store.resolve("busybox")?)?;
//! for layer in &image.layers {
//!     println!("{} {}", layer.diff_id, layer.path.display());
//! }
//! # Ok(())
//! # }
//! ```

mod archive;
pub mod config;
mod digest;
pub mod erofs;
mod faults;
mod layer;
mod pipeline;
mod recipe;
mod reference;
pub mod registry;
mod store;

pub use archive::{ArchiveError, LoadProgress};
pub use config::{ImageConfig, Platform};
pub use coracle_tarball::TarError;
pub use digest::{Digest, ImageId, InvalidDigest};
pub use erofs::ConvertError;
pub use layer::{ConvertedLayer, LayerError, convert_layer};
pub use recipe::LayerTar;
pub use reference::{InvalidReference, Reference};
pub use store::{
    Commit, Created, Error, ErrorKind, HistoryLine, Image, ImageArchive, ImageStore, ImageSummary, ImageUser,
    Import, Layer, Loaded, PinnedLayers, Removal,
};
