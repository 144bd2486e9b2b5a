//! Removal of tags and images by Docker's rules: a tag goes alone as long as the image has another; with the last one
//! goes the image, and with it the layers that no other image needs. What containers use stays: an image whose
//! container runs cannot be deleted; one whose container is stopped can be by force, and is then kept for the
//! container alone.

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

/// A container that uses an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageUser {
    /// The container, as messages name it.
    pub container: String,
    /// Whether it runs.
    pub is_running: bool,
}

/// An image that is to lose names, or to go.
struct Candidate<'a> {
    id: ImageId,
    names: Vec<Reference>,
    user: Option<ImageUser>,
    /// What the caller called it.
    called: &'a str,
    force: bool,
}

impl ImageStore {
    /// Removes a tag, or the image that an id names. `user` tells which container uses an image, one that runs if
    /// there is one.
    ///
    /// # Errors
    /// [`Error::Conflict`] if a running container uses the image: a tag of it can be forced away, the image itself
    /// never; unless forced, also if a stopped container uses it, or if an id names an image with names in several
    /// repositories.
    pub fn remove(
        &self,
        name: &str,
        force: bool,
        user: &dyn Fn(&ImageId) -> Option<ImageUser>,
    ) -> Result<Vec<Removal>, Error> {
        let _changes = self.lock();
        let id = self.resolve(name)?;
        let all = self.db.names()?;
        let candidate = Candidate { id, names: names_of(&all, &id), user: user(&id), called: name, force };
        match named(name, &all, &id) {
            None => {
                candidate.check_by_id()?;
                let names = candidate.names.clone();
                self.delete(candidate, &names)
            }
            Some(reference) => self.remove_name(candidate, &reference),
        }
    }

    fn remove_name(&self, candidate: Candidate<'_>, reference: &Reference) -> Result<Vec<Removal>, Error> {
        candidate.check_last_name()?;
        let repository = reference.canonical_name();
        let is_other_tag = |name: &Reference| {
            name.tag().is_some() && name != reference && name.canonical_name() == repository
        };
        // Digests of a repository go with its last tag.
        let with_digests = reference.digest().is_none() && !candidate.names.iter().any(is_other_tag);
        let goes = |name: &Reference| {
            name == reference || with_digests && name.tag().is_none() && name.canonical_name() == repository
        };
        let (going, left): (Vec<_>, Vec<_>) = candidate.names.iter().cloned().partition(goes);
        if left.is_empty() && !candidate.must_stay() {
            return self.delete(candidate, &going);
        }
        let change = self.db.change()?;
        going.iter().try_for_each(|name| change.remove_name(name))?;
        change.commit()?;
        Ok(going.iter().map(|name| Removal::Untagged(name.to_string())).collect())
    }

    /// Deletes the image with all its names, then the files that nothing refers to any more.
    fn delete(&self, candidate: Candidate<'_>, names: &[Reference]) -> Result<Vec<Removal>, Error> {
        let id = candidate.id;
        let mut record = self.db.image(&id)?.ok_or_else(|| Error::NotFound { name: id.to_string() })?;
        let change = self.db.change()?;
        names.iter().try_for_each(|name| change.remove_name(name))?;
        let is_used = candidate.user.is_some();
        if is_used {
            record.removed = true;
            change.put_image(&id, &record)?;
        } else {
            change.remove_image(&id)?;
        }
        change.commit()?;
        if !is_used {
            self.remove_unused_files(&id, &record)?;
        }
        info!(image = %id.short(), "deleted");
        let untagged = names.iter().map(|name| Removal::Untagged(name.to_string()));
        Ok(untagged.chain([Removal::Deleted(id.to_string())]).collect())
    }

    /// Deletes what was removed while containers used it and is used no more.
    pub fn forget_removed(&self, is_used: &dyn Fn(&ImageId) -> bool) -> Result<(), Error> {
        let _changes = self.lock();
        let images = self.db.images_and_removed()?;
        let unused: Vec<_> = images.iter().filter(|(id, record)| record.removed && !is_used(id)).collect();
        if unused.is_empty() {
            return Ok(());
        }
        let change = self.db.change()?;
        unused.iter().try_for_each(|(id, _)| change.remove_image(id))?;
        change.commit()?;
        unused.iter().try_for_each(|(id, record)| self.remove_unused_files(id, record))
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
            .filter(|layer| !references.layers.contains(layer) && !self.pins.holds(layer))
            .for_each(|layer| self.files.remove_layer(layer));
        Ok(())
    }
}

impl Candidate<'_> {
    /// Whether the image cannot go, though its last name does.
    fn must_stay(&self) -> bool {
        self.user.as_ref().is_some_and(|user| user.is_running || !self.force)
    }

    fn check_last_name(&self) -> Result<(), Error> {
        match &self.user {
            Some(user) if !self.force && is_single(&self.names) => Err(Error::Conflict(format!(
                "unable to remove repository reference \"{}\" (must force) - container {} is using its referenced \
                 image {}",
                self.called,
                user.container,
                self.id.short()
            ))),
            _ => Ok(()),
        }
    }

    fn check_by_id(&self) -> Result<(), Error> {
        let (how, reason) = match &self.user {
            Some(user) if user.is_running => {
                ("cannot be forced", format!("image is being used by running container {}", user.container))
            }
            _ if self.force => return Ok(()),
            _ if !is_single(&self.names) => {
                ("must be forced", "image is referenced in multiple repositories".to_owned())
            }
            Some(user) => {
                ("must be forced", format!("image is being used by stopped container {}", user.container))
            }
            None => return Ok(()),
        };
        Err(Error::Conflict(format!("unable to delete {} ({how}) - {reason}", self.id.short())))
    }
}

/// One tag at most, and digests of its repository only.
fn is_single(names: &[Reference]) -> bool {
    let tags = names.iter().filter(|name| name.tag().is_some()).count();
    let repositories: BTreeSet<_> = names.iter().map(Reference::canonical_name).collect();
    tags <= 1 && repositories.len() <= 1
}

fn names_of(all: &Names, id: &ImageId) -> Vec<Reference> {
    let names = all.tags.iter().chain(&all.digests);
    names.filter(|(_, owner)| owner == id).map(|(name, _)| name.clone()).collect()
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
