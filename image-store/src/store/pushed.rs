//! What is known of layers' blobs: in which packing registries have them, and in which repositories. Kept manifests and
//! the images' names tell it, so it is a guess about registries, to be checked there.

use std::collections::HashMap;

use super::{Error, ImageStore};
use crate::digest::{Digest, ImageId};
use crate::reference::Reference;
use crate::registry::manifest::{Descriptor, Document};
use crate::store::files::NewFiles;

/// A blob that a layer came as.
#[derive(Debug, Clone)]
pub(crate) struct KnownBlob {
    pub(crate) descriptor: Descriptor,
    /// Names of images that have it.
    pub(crate) names: Vec<Reference>,
}

impl ImageStore {
    /// The blobs that are known, by diff id.
    pub(crate) fn known_blobs(&self) -> Result<HashMap<Digest, Vec<KnownBlob>>, Error> {
        let names = self.db.names()?;
        let mut known: HashMap<Digest, Vec<KnownBlob>> = HashMap::new();
        for (id, record) in self.db.images()? {
            let Some(manifest) = record.manifest else { continue };
            let Ok(Document::Image(image)) = Document::parse_stored(&self.files.blob(&manifest)?) else {
                continue;
            };
            let of_image = names.digests.iter().chain(&names.tags).filter(|(_, owner)| *owner == id);
            let of_image: Vec<Reference> = of_image.map(|(name, _)| name.clone()).collect();
            for (layer, descriptor) in record.layers.iter().zip(image.layers) {
                let blobs = known.entry(layer.diff_id).or_default();
                match blobs.iter_mut().find(|blob| blob.descriptor.digest == descriptor.digest) {
                    Some(blob) => blob.names.extend(of_image.iter().cloned()),
                    None => blobs.push(KnownBlob { descriptor, names: of_image.clone() }),
                }
            }
        }
        Ok(known)
    }

    /// Remembers that a registry has the image under this digest now.
    pub(crate) fn note_pushed(
        &self,
        id: &ImageId,
        manifest: &[u8],
        by_digest: &Reference,
    ) -> Result<(), Error> {
        let _changes = self.lock();
        // It may have been removed meanwhile.
        let Some(mut record) = self.db.image(id)?.filter(|record| !record.removed) else { return Ok(()) };
        let mut new_files = NewFiles::default();
        let change = if record.manifest.is_none() {
            record.manifest = Some(self.files.put_blob(manifest, &mut new_files)?);
            new_files.sync_directories()?;
            let change = self.db.change()?;
            change.put_image(id, &record)?;
            change
        } else {
            self.db.change()?
        };
        change.put_digest(by_digest, id)?;
        new_files.keep();
        change.commit()
    }
}
