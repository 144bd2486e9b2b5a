//! The store on disk: blobs and layers are files named by their digest, and a small database says which images and
//! tags exist. Files come first (written aside, synced, renamed), then the database's commit makes them count; deletion
//! goes the other way round. So the database never names what is not there, and what it does not name is debris.

#[cfg(all(test, target_os = "linux"))]
mod crash_tests;
mod create;
mod db;
mod error;
mod files;
mod image;
mod lease;
mod pins;
mod pushed;
mod remove;
mod save;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::info;

use crate::archive::{self, LoadProgress, ResolvedImage, Scan};
use crate::config::Platform;
use crate::digest::{Digest, ImageId};
use crate::erofs::MAX_IMAGE;
use crate::layer::NewLayer;
use crate::recipe::LayerTar;
use crate::reference::Reference;

pub use create::{Commit, Created, Import};
use db::{Db, ImageRecord, LayerRecord};
pub use error::{Error, ErrorKind};
use files::{Files, NewFiles};
pub use image::{HistoryLine, Image, ImageSummary, Layer};
pub(crate) use lease::{LayerLease, NewImage};
pub use pins::PinnedLayers;
use pins::Pins;
pub(crate) use pushed::KnownBlob;
pub use remove::{ImageUser, Removal};
pub use save::ImageArchive;

/// The images of one person, shared by all their VMs. Only one process can have a store open.
#[derive(Debug)]
pub struct ImageStore {
    files: Files,
    db: Db,
    /// Held while files and the database change together. Conversion, which takes long, happens outside of it.
    changes: Mutex<()>,
    pins: Pins,
}

/// An image that a load brought.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Its id.
    pub id: ImageId,
    /// The tags that the archive gives it.
    pub tags: Vec<Reference>,
    /// What it is made for; containers of it can be created only if [`Platform::runs_on_host`].
    pub platform: Platform,
    /// Tags that belonged to other images before.
    pub replaced: Vec<(Reference, ImageId)>,
}

impl Loaded {
    /// What `docker load` prints, one line each.
    pub fn messages(&self) -> Vec<String> {
        if self.tags.is_empty() {
            return vec![format!("Loaded image ID: {}", self.id)];
        }
        let moved = self.replaced.iter().map(|(tag, old)| {
            format!("The image {tag} already exists, renaming the old one with ID {old} to empty string")
        });
        moved.chain(self.tags.iter().map(|tag| format!("Loaded image: {tag}"))).collect()
    }
}

impl ImageStore {
    /// Opens the store in this directory, which is made if it is not there. What a crash left behind is removed.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process has it open.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let files = Files::create(root)?;
        let db = Db::open(&root.join("images.redb"))?;
        let references = db.references()?;
        files.remove_debris(&references)?;
        Ok(Self { files, db, changes: Mutex::new(()), pins: Pins::default() })
    }

    /// Loads all images of an archive: docker-archive or OCI layout, plain, gzip or zstd. Either all of it is kept or
    /// nothing.
    pub fn load(
        &self,
        archive: impl Read + Send,
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<Vec<Loaded>, Error> {
        let mut scan = archive::scan(archive, self.files.scratch(), MAX_IMAGE, progress)?;
        let _changes = self.lock();
        let images = archive::resolve(&mut scan, &|diff_id| self.files.layer_sizes(diff_id).is_some())?;
        self.keep(images, scan)
    }

    /// The uncompressed tar stream of a layer, byte for byte as it came; its [`length`](LayerTar::length) is known at
    /// once. It is put together while it is read and needs little memory. Readers go on when the layer is removed
    /// meanwhile. If the store's files were damaged, the stream ends in an error before its last byte.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the store does not have the layer, or only its image, as stores of early versions do.
    pub fn layer_tar(&self, diff_id: &Digest) -> Result<LayerTar<File, File>, Error> {
        self.files.layer_tar(diff_id)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The lock guards no data of its own, so a panic elsewhere left nothing half done in memory.
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the images' files into place, then commits.
    fn keep(&self, images: Vec<ResolvedImage>, scan: Scan) -> Result<Vec<Loaded>, Error> {
        let mut layers = scan.into_layers();
        let mut new_files = NewFiles::default();
        let mut records = Vec::new();
        for image in &images {
            let id = ImageId::of_config(&image.config_raw);
            let record = self.keep_files(image, &mut layers, &mut new_files)?;
            records.push((id, record));
        }
        new_files.sync_directories()?;
        let change = self.db.change()?;
        let mut loaded = Vec::new();
        for (image, (id, record)) in images.into_iter().zip(records) {
            change.put_image(&id, &record)?;
            let mut replaced = Vec::new();
            for tag in &image.tags {
                let old = change.put_tag(tag, &id)?.filter(|old| *old != id);
                replaced.extend(old.map(|old| (tag.clone(), old)));
                if let Some(manifest) = record.manifest {
                    change.put_digest(&tag.by_digest(manifest), &id)?;
                }
            }
            loaded.push(Loaded { id, tags: image.tags, platform: image.config.platform(), replaced });
        }
        // From here on the files may count, even if the commit reports an error.
        new_files.keep();
        change.commit()?;
        for image in &loaded {
            info!(image = %image.id.short(), tags = image.tags.len(), "loaded");
        }
        Ok(loaded)
    }

    fn keep_files(
        &self,
        image: &ResolvedImage,
        layers: &mut HashMap<Digest, NewLayer>,
        new_files: &mut NewFiles,
    ) -> Result<ImageRecord, Error> {
        let mut kept = Vec::new();
        for diff_id in &image.config.rootfs.diff_ids {
            let (size, recipe_size) = match (self.files.layer_sizes(diff_id), layers.remove(diff_id)) {
                (Some(sizes), _) => sizes,
                (None, Some(layer)) => {
                    let sizes = (layer.converted.image_size, layer.converted.recipe_size);
                    self.files.put_layer(layer, new_files)?;
                    sizes
                }
                (None, None) => return Err(Error::Corrupt { what: format!("layer {diff_id}") }),
            };
            kept.push(LayerRecord { diff_id: *diff_id, size, recipe_size });
        }
        self.files.put_blob(&image.config_raw, new_files)?;
        let manifest = match &image.manifest {
            Some(manifest) => Some(self.files.put_blob(manifest, new_files)?),
            None => None,
        };
        Ok(ImageRecord {
            layers: kept,
            manifest,
            created: image.config.created,
            labels: image.config.config.labels.clone(),
            removed: false,
        })
    }
}
