//! New images: from a file system's tar stream (import), and from an image and a container's differences (commit).

use std::io::Read;

use jiff::Timestamp;
use tracing::info;

use super::db::ImageRecord;
use super::files::NewFiles;
use super::{Error, ImageStore, LayerRecord};
use crate::config::{ContainerConfig, History, ImageConfig, Platform, RootFs, apply_changes};
use crate::digest::{Digest, ImageId};
use crate::erofs::MAX_IMAGE;
use crate::layer::NewLayer;
use crate::reference::Reference;

/// What an import is to make.
#[derive(Debug, Default)]
pub struct Import {
    /// The name that the image gets.
    pub tag: Option<Reference>,
    /// Changes to the empty config, in the words of Dockerfiles.
    pub changes: Vec<String>,
    /// The remark in the history.
    pub comment: String,
    /// What the image is for, if not for this machine.
    pub platform: Option<Platform>,
}

/// What a commit is to make.
#[derive(Debug)]
pub struct Commit {
    /// The image that the container was made of.
    pub parent: ImageId,
    /// How to run the new image; changes apply to it.
    pub config: ContainerConfig,
    /// Changes to the config, in the words of Dockerfiles.
    pub changes: Vec<String>,
    /// The name that the image gets.
    pub tag: Option<Reference>,
    /// Who made it.
    pub author: String,
    /// The remark in the history.
    pub comment: String,
    /// By which command, for the history.
    pub created_by: String,
}

/// A new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// Its id.
    pub id: ImageId,
    /// The image that had its name before.
    pub replaced: Option<ImageId>,
}

impl ImageStore {
    /// Makes an image of one layer of a tar stream (plain, gzip or zstd).
    pub fn import(&self, archive: impl Read + Send, import: &Import) -> Result<Created, Error> {
        let mut container = ContainerConfig::default();
        apply_changes(&mut container, &import.changes)?;
        check_tag(import.tag.as_ref())?;
        let layer = NewLayer::convert(archive, self.files.scratch(), MAX_IMAGE)?;
        let platform = import.platform.clone().unwrap_or_else(Platform::host);
        let now = Timestamp::now();
        let config = ImageConfig {
            architecture: platform.architecture,
            os: platform.os,
            variant: platform.variant,
            created: Some(now),
            config: container,
            rootfs: RootFs { kind: "layers".to_owned(), diff_ids: vec![layer.converted.diff_id] },
            history: vec![History {
                created: Some(now),
                comment: import.comment.clone(),
                ..History::default()
            }],
            ..ImageConfig::default()
        };
        self.keep_created(config, Some(layer), import.tag.as_ref())
    }

    /// Makes an image of another and a container's differences, which come as a tar stream with OCI's whiteouts. No
    /// differences make no layer.
    pub fn commit(&self, differences: impl Read + Send, commit: Commit) -> Result<Created, Error> {
        let mut container = commit.config;
        apply_changes(&mut container, &commit.changes)?;
        check_tag(commit.tag.as_ref())?;
        let parent = self.image(&commit.parent)?;
        let _stay = self.pin(parent.layers.iter().map(|layer| layer.diff_id));
        let layer = NewLayer::convert(differences, self.files.scratch(), MAX_IMAGE)?;
        let layer = Some(layer).filter(|layer| layer.converted.entries > 0);
        let now = Timestamp::now();
        let mut config = parent.config;
        config.created = Some(now);
        config.author = Some(commit.author.clone()).filter(|author| !author.is_empty());
        config.config = container;
        config.rootfs.diff_ids.extend(layer.as_ref().map(|layer| layer.converted.diff_id));
        config.history.push(History {
            created: Some(now),
            created_by: commit.created_by,
            author: commit.author,
            comment: commit.comment,
            empty_layer: layer.is_none(),
        });
        self.keep_created(config, layer, commit.tag.as_ref())
    }

    fn keep_created(
        &self,
        config: ImageConfig,
        layer: Option<NewLayer>,
        tag: Option<&Reference>,
    ) -> Result<Created, Error> {
        let config_raw = serde_json::to_vec(&config)
            .map_err(|_| Error::Corrupt { what: "a new image's config".to_owned() })?;
        let id = ImageId::of_config(&config_raw);
        let _changes = self.lock();
        let mut new_files = NewFiles::default();
        let mut layer = layer;
        let mut layers = Vec::new();
        for diff_id in &config.rootfs.diff_ids {
            let (size, recipe_size) = self.keep_layer(diff_id, &mut layer, &mut new_files)?;
            layers.push(LayerRecord { diff_id: *diff_id, size, recipe_size });
        }
        self.files.put_blob(&config_raw, &mut new_files)?;
        new_files.sync_directories()?;
        let change = self.db.change()?;
        let record = ImageRecord {
            layers,
            manifest: None,
            created: config.created,
            labels: config.config.labels,
            removed: false,
        };
        change.put_image(&id, &record)?;
        let replaced = match tag {
            Some(tag) => change.put_tag(tag, &id)?.filter(|old| *old != id),
            None => None,
        };
        new_files.keep();
        change.commit()?;
        info!(image = %id.short(), "created");
        Ok(Created { id, replaced })
    }

    /// The sizes of a layer that is stored, or is the new one.
    fn keep_layer(
        &self,
        diff_id: &Digest,
        new: &mut Option<NewLayer>,
        new_files: &mut NewFiles,
    ) -> Result<(u64, u64), Error> {
        if let Some(sizes) = self.files.layer_sizes(diff_id) {
            return Ok(sizes);
        }
        if let Some(layer) = new.take_if(|layer| layer.converted.diff_id == *diff_id) {
            let sizes = (layer.converted.image_size, layer.converted.recipe_size);
            self.files.put_layer(layer, new_files)?;
            return Ok(sizes);
        }
        // A layer of an early version, which has no recipe, can be built upon.
        let size = self.files.image_size(diff_id);
        size.map(|size| (size, 0)).ok_or_else(|| Error::Corrupt { what: format!("layer {diff_id}") })
    }
}

fn check_tag(tag: Option<&Reference>) -> Result<(), Error> {
    match tag.and_then(Reference::digest) {
        Some(_) => Err(Error::InvalidName("refusing to create a tag with a digest reference".to_owned())),
        None => Ok(()),
    }
}
