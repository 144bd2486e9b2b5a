//! Layers that are there before the image that needs them: a pull brings them one by one, and its image last. A lease
//! keeps such a layer's file; when the last lease goes, the file goes too, unless an image has come to need it.

use std::io::Read;
use std::sync::Arc;

use super::db::{ImageRecord, LayerRecord};
use super::files::NewFiles;
use super::{Error, ImageStore};
use crate::config::ImageConfig;
use crate::digest::{Digest, ImageId};
use crate::erofs::MAX_IMAGE;
use crate::layer::NewLayer;
use crate::reference::Reference;

/// Keeps a layer's file in the store.
#[derive(Debug)]
pub(crate) struct LayerLease {
    store: Arc<ImageStore>,
    record: LayerRecord,
}

impl Drop for LayerLease {
    fn drop(&mut self) {
        let (store, diff_id) = (Arc::clone(&self.store), self.record.diff_id);
        // It waits for the disk, which tasks must not.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || store.unpin(&[diff_id]))),
            Err(_) => store.unpin(&[diff_id]),
        }
    }
}

/// An image whose layers are there.
#[derive(Debug)]
pub(crate) struct NewImage<'a> {
    pub(crate) config_raw: &'a [u8],
    pub(crate) config: &'a ImageConfig,
    pub(crate) manifest: &'a [u8],
    pub(crate) layers: &'a [Arc<LayerLease>],
    /// The name that it gets, if it was asked for by a tag.
    pub(crate) tag: Option<&'a Reference>,
    /// The name by the digest that the registry knows it by.
    pub(crate) by_digest: &'a Reference,
}

impl ImageStore {
    /// Converts a layer to temporary files.
    pub(crate) fn convert_layer(&self, blob: impl Read + Send) -> Result<NewLayer, Error> {
        Ok(NewLayer::convert(blob, self.files.scratch(), MAX_IMAGE)?)
    }

    /// A temporary file, which is deleted when it is dropped.
    pub(crate) fn scratch_file(&self, prefix: &str) -> Result<tempfile::NamedTempFile, Error> {
        let made = tempfile::Builder::new().prefix(prefix).tempfile_in(self.files.scratch());
        made.map_err(|source| Error::io("make a file in", self.files.scratch(), source))
    }

    /// Gives a converted and verified layer its place.
    pub(crate) fn lease_new_layer(self: &Arc<Self>, layer: NewLayer) -> Result<LayerLease, Error> {
        let diff_id = layer.converted.diff_id;
        let sizes = (layer.converted.image_size, layer.converted.recipe_size);
        let _changes = self.lock();
        let sizes = match self.files.layer_sizes(&diff_id) {
            Some(sizes) => sizes,
            None => {
                let mut new_files = NewFiles::default();
                self.files.put_layer(layer, &mut new_files)?;
                new_files.sync_directories()?;
                new_files.keep();
                sizes
            }
        };
        Ok(self.new_lease(&diff_id, sizes))
    }

    /// A lease of a layer that is there already.
    pub(crate) fn lease_layer(self: &Arc<Self>, diff_id: &Digest) -> Option<LayerLease> {
        let _changes = self.lock();
        let sizes = self.files.layer_sizes(diff_id)?;
        Some(self.new_lease(diff_id, sizes))
    }

    fn new_lease(self: &Arc<Self>, diff_id: &Digest, (size, recipe_size): (u64, u64)) -> LayerLease {
        self.pins.add(diff_id);
        let record = LayerRecord { diff_id: *diff_id, size, recipe_size };
        LayerLease { store: Arc::clone(self), record }
    }

    /// Whether the image is there, and not only for a container that outlived its names.
    pub(crate) fn has_image(&self, id: &ImageId) -> Result<bool, Error> {
        Ok(self.db.image(id)?.is_some_and(|record| !record.removed))
    }

    /// What a name means now, exactly.
    pub(crate) fn lookup(&self, name: &Reference) -> Result<Option<ImageId>, Error> {
        self.db.lookup(name)
    }

    /// Gives an image that is there the names that a registry has for it. False: it is not there.
    pub(crate) fn name_image(
        &self,
        id: &ImageId,
        tag: Option<&Reference>,
        by_digest: &Reference,
    ) -> Result<bool, Error> {
        let _changes = self.lock();
        if !self.has_image(id)? {
            return Ok(false);
        }
        let change = self.db.change()?;
        if let Some(tag) = tag {
            change.put_tag(tag, id)?;
        }
        change.put_digest(by_digest, id)?;
        change.commit()?;
        Ok(true)
    }

    /// Keeps an image whose layers are leased.
    pub(crate) fn keep_image(&self, image: &NewImage<'_>) -> Result<ImageId, Error> {
        let _changes = self.lock();
        let id = ImageId::of_config(image.config_raw);
        let mut new_files = NewFiles::default();
        self.files.put_blob(image.config_raw, &mut new_files)?;
        let manifest = self.files.put_blob(image.manifest, &mut new_files)?;
        new_files.sync_directories()?;
        let layers = image.layers.iter();
        let record = ImageRecord {
            layers: layers.map(|layer| layer.record.clone()).collect(),
            manifest: Some(manifest),
            created: image.config.created,
            labels: image.config.config.labels.clone(),
            removed: false,
        };
        let change = self.db.change()?;
        change.put_image(&id, &record)?;
        if let Some(tag) = image.tag {
            change.put_tag(tag, &id)?;
        }
        change.put_digest(image.by_digest, &id)?;
        // From here on the files may count, even if the commit reports an error.
        new_files.keep();
        change.commit()?;
        Ok(id)
    }
}
