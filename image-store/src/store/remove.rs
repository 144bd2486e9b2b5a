//! Removal of tags and images by Docker's rules: a tag goes alone as long as the image has another; with the last one
//! goes the image, and with it the layers that no other image needs. What containers use stays.

use std::collections::BTreeSet;

use tracing::info;

use super::db::{ImageRecord, Names};
use super::{Error, ImageStore};
use crate::digest::{Digest, ImageId};
use crate::reference::Reference;

/// What a removal did, in the order in which Docker prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// This name was taken away: `busybox:latest`.
    Untagged(String),
    /// This image was deleted: `sha256:…`.
    Deleted(String),
}

impl ImageStore {
    /// Removes a tag, or the image that an id names. `in_use` tells whether a container needs an image.
    ///
    /// # Errors
    /// [`Error::Conflict`] if a container uses the image: a tag of it can be forced away, the image itself never. Also
    /// if an id names an image with tags in several repositories, unless forced.
    pub fn remove(
        &self,
        name: &str,
        force: bool,
        in_use: &dyn Fn(&ImageId) -> bool,
    ) -> Result<Vec<Removal>, Error> {
        let _changes = self.lock();
        let id = self.resolve(name)?;
        let names = self.db.names()?;
        let tags: Vec<_> = owned(&names.tags, &id);
        let digests: Vec<_> = owned(&names.digests, &id);
        match named(name, &names, &id) {
            None => {
                self.check_removable_by_id(&id, &tags, force, in_use)?;
                self.delete(&id, &tags, &digests)
            }
            Some(reference) if reference.digest().is_some() => {
                let is_last = tags.is_empty() && digests.len() == 1;
                self.remove_name(name, &id, &reference, is_last, &digests, force, in_use)
            }
            Some(reference) => {
                self.remove_name(name, &id, &reference, tags.len() == 1, &digests, force, in_use)
            }
        }
    }

    fn check_removable_by_id(
        &self,
        id: &ImageId,
        tags: &[Reference],
        force: bool,
        in_use: &dyn Fn(&ImageId) -> bool,
    ) -> Result<(), Error> {
        let short = id.short();
        if in_use(id) {
            let message =
                format!("unable to delete {short} (cannot be forced) - image is being used by a container");
            return Err(Error::Conflict(message));
        }
        let repositories: BTreeSet<_> = tags.iter().map(Reference::canonical_name).collect();
        if repositories.len() > 1 && !force {
            let message = format!(
                "unable to delete {short} (must be forced) - image is referenced in multiple repositories"
            );
            return Err(Error::Conflict(message));
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "all of them are the one question that is asked")]
    fn remove_name(
        &self,
        name: &str,
        id: &ImageId,
        reference: &Reference,
        is_last: bool,
        digests: &[Reference],
        force: bool,
        in_use: &dyn Fn(&ImageId) -> bool,
    ) -> Result<Vec<Removal>, Error> {
        let is_used = is_last && in_use(id);
        if is_used && !force {
            let message = format!(
                "unable to remove repository reference \"{name}\" (must force) - a container is using its \
                 referenced image {}",
                id.short()
            );
            return Err(Error::Conflict(message));
        }
        if is_last && !is_used {
            let tags: Vec<_> = reference.tag().map(|_| reference.clone()).into_iter().collect();
            return self.delete(id, &tags, digests);
        }
        let change = self.db.change()?;
        match reference.digest() {
            Some(_) => change.remove_digest(reference)?,
            None => change.remove_tag(reference)?,
        }
        change.commit()?;
        Ok(vec![Removal::Untagged(reference.to_string())])
    }

    /// Deletes the image with all its names, then the files that nothing refers to any more.
    fn delete(&self, id: &ImageId, tags: &[Reference], digests: &[Reference]) -> Result<Vec<Removal>, Error> {
        let record = self.db.image(id)?.ok_or_else(|| Error::NotFound { name: id.to_string() })?;
        let change = self.db.change()?;
        let mut removals = Vec::new();
        for tag in tags {
            change.remove_tag(tag)?;
            removals.push(Removal::Untagged(tag.to_string()));
        }
        for name in digests {
            change.remove_digest(name)?;
            removals.push(Removal::Untagged(name.to_string()));
        }
        change.remove_image(id)?;
        change.commit()?;
        removals.push(Removal::Deleted(id.to_string()));
        self.remove_unused_files(id, &record)?;
        info!(image = %id.short(), "deleted");
        Ok(removals)
    }

    fn remove_unused_files(&self, id: &ImageId, record: &ImageRecord) -> Result<(), Error> {
        let references = self.db.references()?;
        let blobs: Vec<Digest> = std::iter::once(*id.digest()).chain(record.manifest).collect();
        blobs
            .iter()
            .filter(|blob| !references.blobs.contains(blob))
            .for_each(|blob| self.files.remove_blob(blob));
        let layers = record.layers.iter().map(|layer| &layer.diff_id);
        layers
            .filter(|layer| !references.layers.contains(layer))
            .for_each(|layer| self.files.remove_layer(layer));
        Ok(())
    }
}

fn owned(names: &[(Reference, ImageId)], id: &ImageId) -> Vec<Reference> {
    names.iter().filter(|(_, owner)| owner == id).map(|(name, _)| name.clone()).collect()
}

/// The reference that was meant, if the image was not named by its id.
fn named(name: &str, names: &Names, id: &ImageId) -> Option<Reference> {
    let reference = Reference::parse(name).ok()?;
    let reference = match reference.digest() {
        Some(digest) => reference.by_digest(*digest),
        None => reference,
    };
    let is_its_name = |known: &&(Reference, ImageId)| known.0 == reference && known.1 == *id;
    names.tags.iter().chain(&names.digests).find(is_its_name).map(|(name, _)| name.clone())
}
