//! Questions to the store: which images there are, what a name means, what an image says.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;

use jiff::Timestamp;

use super::{Error, ImageStore, LayerRecord};
use crate::config::{ImageConfig, Platform};
use crate::digest::{Digest, ImageId};
use crate::reference::Reference;

/// One line of a list of images.
#[derive(Debug, Clone)]
pub struct ImageSummary {
    /// Its id.
    pub id: ImageId,
    /// Its tags as people write them (`busybox:latest`); none if it is dangling.
    pub repo_tags: Vec<String>,
    /// Its repositories with the digest of its manifest (`busybox@sha256:…`).
    pub repo_digests: Vec<String>,
    /// Bytes of its layers on disk; layers can be shared with other images.
    pub size: u64,
    /// Bytes of those of its layers that other images have, too.
    pub shared_size: u64,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// All about one image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Its config.
    pub config: ImageConfig,
    /// Its config as it came, of which the id is the digest.
    pub config_raw: Vec<u8>,
    /// Its tags as people write them.
    pub repo_tags: Vec<String>,
    /// Its repositories with the digest of its manifest.
    pub repo_digests: Vec<String>,
    /// Its layers, lowest first.
    pub layers: Vec<Layer>,
    /// Bytes of its layers on disk.
    pub size: u64,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// What it is made for.
    pub platform: Platform,
}

/// A layer in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the tar stream that it was made from.
    pub diff_id: Digest,
    /// The EROFS image, which never changes.
    pub path: PathBuf,
    /// Its size, a multiple of 4096.
    pub size: u64,
    /// Size of what leads from the image back to the tar stream.
    pub recipe_size: u64,
}

impl Layer {
    /// Opens the EROFS image for reading.
    pub fn open_layer(&self) -> Result<File, Error> {
        File::open(&self.path).map_err(|source| Error::io("open the layer", &self.path, source))
    }
}

/// One line of an image's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryLine {
    /// The image, on its newest line.
    pub id: Option<ImageId>,
    /// When.
    pub created: Option<Timestamp>,
    /// By which command.
    pub created_by: String,
    /// With what remark.
    pub comment: String,
    /// Bytes on disk of the layer that it made.
    pub size: u64,
    /// The image's tags, on its newest line.
    pub tags: Vec<String>,
}

impl Image {
    /// How it came to be, newest first.
    pub fn history(&self) -> Vec<HistoryLine> {
        let mut layers = self.layers.iter();
        let mut lines: Vec<_> = self
            .config
            .history
            .iter()
            .map(|step| HistoryLine {
                id: None,
                created: step.created,
                created_by: step.created_by.clone(),
                comment: step.comment.clone(),
                size: match step.empty_layer {
                    true => 0,
                    false => layers.next().map_or(0, |layer| layer.size + layer.recipe_size),
                },
                tags: Vec::new(),
            })
            .collect();
        lines.reverse();
        if let Some(newest) = lines.first_mut() {
            newest.id = Some(self.id);
            newest.tags.clone_from(&self.repo_tags);
        }
        lines
    }
}

impl ImageStore {
    /// All images, newest first.
    pub fn list(&self) -> Result<Vec<ImageSummary>, Error> {
        let names = self.db.names()?;
        let records = self.db.images()?;
        let mut users: HashMap<Digest, usize> = HashMap::new();
        for (_, record) in &records {
            let layers: HashSet<_> = record.layers.iter().map(|layer| layer.diff_id).collect();
            layers.into_iter().for_each(|layer| *users.entry(layer).or_default() += 1);
        }
        let is_shared = |layer: &&LayerRecord| users.get(&layer.diff_id).is_some_and(|users| *users > 1);
        let mut images: Vec<_> = records
            .into_iter()
            .map(|(id, record)| {
                let (repo_tags, repo_digests) = names.of(&id);
                let size = record.size();
                let shared_size = record.layers.iter().filter(is_shared).map(LayerRecord::on_disk).sum();
                ImageSummary {
                    id,
                    repo_tags,
                    repo_digests,
                    size,
                    shared_size,
                    created: record.created,
                    labels: record.labels,
                }
            })
            .collect();
        images.sort_by_key(|image| std::cmp::Reverse(image.created));
        Ok(images)
    }

    /// Bytes on disk of all layers, each counted once.
    pub fn layers_size(&self) -> Result<u64, Error> {
        let records = self.db.images_and_removed()?;
        let layers = records.iter().flat_map(|(_, record)| &record.layers);
        let sizes: HashMap<_, _> = layers.map(|layer| (layer.diff_id, layer.on_disk())).collect();
        Ok(sizes.values().sum())
    }

    /// What a name means: a tag, a digest, an id or the start of one.
    ///
    /// # Errors
    /// [`Error::NotFound`], and [`Error::Ambiguous`] if several ids start so.
    pub fn resolve(&self, name: &str) -> Result<ImageId, Error> {
        let full_id = name.parse().or_else(|_| Digest::from_hex(name));
        if let Ok(digest) = full_id {
            let id = ImageId::from(digest);
            return match self.db.image(&id)? {
                Some(record) if !record.removed => Ok(id),
                _ => Err(Error::NotFound { name: name.to_owned() }),
            };
        }
        let short = name.strip_prefix("sha256:").unwrap_or(name);
        let is_short_id = !short.is_empty() && short.len() < 64 && short.bytes().all(is_hex);
        let reference = Reference::parse(name);
        if let Ok(reference) = &reference
            && let Some(id) = self.db.lookup(reference)?
        {
            return Ok(id);
        }
        if is_short_id {
            match self.db.ids_with_prefix(short)?.as_slice() {
                [] => {}
                [id] => return Ok(*id),
                _ => return Err(Error::Ambiguous { name: name.to_owned() }),
            }
        }
        Err(Error::NotFound { name: reference?.to_string() })
    }

    /// All about the image with this id.
    pub fn image(&self, id: &ImageId) -> Result<Image, Error> {
        let record = self.db.image(id)?.ok_or_else(|| Error::NotFound { name: id.to_string() })?;
        let config_raw = self.files.blob(id.digest())?;
        let config = ImageConfig::parse(&config_raw);
        let config = config.map_err(|_| Error::Corrupt { what: format!("the config of image {id}") })?;
        let (repo_tags, repo_digests) = self.db.names()?.of(id);
        let size = record.size();
        let to_layer = |layer: super::LayerRecord| Layer {
            path: self.files.layer_path(&layer.diff_id),
            diff_id: layer.diff_id,
            size: layer.size,
            recipe_size: layer.recipe_size,
        };
        Ok(Image {
            id: *id,
            platform: config.platform(),
            created: config.created,
            config,
            config_raw,
            repo_tags,
            repo_digests,
            layers: record.layers.into_iter().map(to_layer).collect(),
            size,
        })
    }

    /// The manifest by which the image came, as it came, if it came with one.
    pub fn manifest(&self, id: &ImageId) -> Result<Option<Vec<u8>>, Error> {
        let record = self.db.image(id)?.ok_or_else(|| Error::NotFound { name: id.to_string() })?;
        record.manifest.map(|manifest| self.files.blob(&manifest)).transpose()
    }

    /// Gives an image another tag; takes it from the image that had it.
    pub fn tag(&self, source: &str, target: &Reference) -> Result<(), Error> {
        if target.digest().is_some() {
            return Err(Error::InvalidName("refusing to create a tag with a digest reference".to_owned()));
        }
        let _changes = self.lock();
        let id = self.resolve(source)?;
        let change = self.db.change()?;
        change.put_tag(target, &id)?;
        change.commit()
    }
}

fn is_hex(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}
