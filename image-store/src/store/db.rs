//! The database: images by id, and tags and digests that lead to them. It is trusted (only we write it), but a record
//! that does not parse is an error and not a panic. Every change is one durable transaction.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use jiff::Timestamp;
use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition,
    WriteTransaction,
};
use serde::{Deserialize, Serialize};

use super::error::Error;
use crate::digest::{Digest, ImageId};
use crate::reference::Reference;

/// Image id to record, as JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// `docker.io/library/busybox:latest` to image id.
const TAGS: TableDefinition<'_, &str, &str> = TableDefinition::new("tags");
/// `docker.io/library/busybox@sha256:…` to image id.
const DIGESTS: TableDefinition<'_, &str, &str> = TableDefinition::new("digests");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const VERSION: u64 = 1;
/// The whole database is small.
const CACHE: usize = 4 << 20;

/// What the database knows of an image; the rest is in its config.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) layers: Vec<LayerRecord>,
    pub(super) manifest: Option<Digest>,
    pub(super) created: Option<Timestamp>,
    pub(super) labels: BTreeMap<String, String>,
    /// It was removed while a stopped container used it: it has no name, is not listed, and goes with the container.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) removed: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub(super) diff_id: Digest,
    /// Size of the EROFS image.
    pub(super) size: u64,
    /// Size of the recipe beside it; 0 in records of early versions, which had none.
    #[serde(default)]
    pub(super) recipe_size: u64,
}

impl ImageRecord {
    pub(super) fn size(&self) -> u64 {
        self.layers.iter().map(LayerRecord::on_disk).sum()
    }
}

impl LayerRecord {
    /// Bytes of the image and its recipe.
    pub(super) fn on_disk(&self) -> u64 {
        self.size + self.recipe_size
    }
}

/// All names of images.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) tags: Vec<(Reference, ImageId)>,
    pub(super) digests: Vec<(Reference, ImageId)>,
}

impl Names {
    /// Tags and digests of one image, as people write them.
    pub(super) fn of(&self, id: &ImageId) -> (Vec<String>, Vec<String>) {
        let familiar = |names: &[(Reference, ImageId)]| {
            names.iter().filter(|(_, owner)| owner == id).map(|(name, _)| name.to_string()).collect()
        };
        (familiar(&self.tags), familiar(&self.digests))
    }
}

/// The digests of all files that images need.
#[derive(Debug, Default)]
pub(super) struct References {
    pub(super) blobs: HashSet<Digest>,
    pub(super) layers: HashSet<Digest>,
}

impl References {
    fn of<'a>(images: impl Iterator<Item = (&'a ImageId, &'a ImageRecord)>) -> Self {
        let mut references = Self::default();
        for (id, record) in images {
            references.blobs.insert(*id.digest());
            references.blobs.extend(record.manifest);
            references.layers.extend(record.layers.iter().map(|layer| layer.diff_id));
        }
        references
    }
}

#[derive(Debug)]
pub(super) struct Db(Database);

impl Db {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE);
        let opened = create(&builder, path);
        let db = opened.map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => Error::Locked { path: path.to_owned() },
            other => redb::Error::from(other).into(),
        })?;
        let change = db.begin_write().map_err(redb::Error::from)?;
        {
            change.open_table(IMAGES)?;
            change.open_table(TAGS)?;
            change.open_table(DIGESTS)?;
            let mut meta = change.open_table(META)?;
            let version = meta.get("version")?.map(|version| version.value());
            match version {
                Some(VERSION) => {}
                None => drop(meta.insert("version", VERSION)?),
                Some(other) => {
                    return Err(Error::Corrupt {
                        what: format!("a database of version {VERSION} (it has {other})"),
                    });
                }
            }
        }
        change.commit()?;
        Ok(Self(db))
    }

    fn read(&self) -> Result<ReadTransaction, Error> {
        Ok(self.0.begin_read()?)
    }

    pub(super) fn change(&self) -> Result<Change, Error> {
        Ok(Change(self.0.begin_write()?))
    }

    /// All images, those included that only containers know.
    pub(super) fn images_and_removed(&self) -> Result<Vec<(ImageId, ImageRecord)>, Error> {
        all_images(&self.read()?.open_table(IMAGES)?)
    }

    pub(super) fn images(&self) -> Result<Vec<(ImageId, ImageRecord)>, Error> {
        let mut images = self.images_and_removed()?;
        images.retain(|(_, record)| !record.removed);
        Ok(images)
    }

    pub(super) fn image(&self, id: &ImageId) -> Result<Option<ImageRecord>, Error> {
        let found = self.read()?.open_table(IMAGES)?.get(id.to_string().as_str())?;
        found.map(|record| parse_record(id, record.value())).transpose()
    }

    /// Ids that start with these hex digits; two at most, as that is enough to know.
    pub(super) fn ids_with_prefix(&self, hex: &str) -> Result<Vec<ImageId>, Error> {
        let prefix = format!("sha256:{hex}");
        let table = self.read()?.open_table(IMAGES)?;
        let mut ids = Vec::new();
        for item in table.range(prefix.as_str()..)? {
            let (key, value) = item?;
            if ids.len() == 2 || !key.value().starts_with(&prefix) {
                break;
            }
            let id = parse_id(key.value())?;
            if !parse_record(&id, value.value())?.removed {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// The image that a reference leads to: by its digest if it has one, else by its tag.
    pub(super) fn lookup(&self, name: &Reference) -> Result<Option<ImageId>, Error> {
        let (table, key) = match name.digest() {
            Some(digest) => (DIGESTS, name.by_digest(*digest).canonical()),
            None => (TAGS, name.canonical()),
        };
        let found = self.read()?.open_table(table)?.get(key.as_str())?;
        found.map(|id| parse_id(id.value())).transpose()
    }

    pub(super) fn names(&self) -> Result<Names, Error> {
        let read = self.read()?;
        Ok(Names {
            tags: all_names(&read.open_table(TAGS)?)?,
            digests: all_names(&read.open_table(DIGESTS)?)?,
        })
    }

    pub(super) fn references(&self) -> Result<References, Error> {
        let images = self.images_and_removed()?;
        Ok(References::of(images.iter().map(|(id, record)| (id, record))))
    }
}

#[cfg(not(test))]
fn create(builder: &redb::Builder, path: &Path) -> Result<Database, DatabaseError> {
    builder.create(path)
}

/// With places for the process to die.
#[cfg(test)]
fn create(builder: &redb::Builder, path: &Path) -> Result<Database, DatabaseError> {
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    let backend = redb::backends::FileBackend::new(file)?;
    builder.create_with_backend(crate::faults::Backend(backend))
}

/// A transaction; nothing happens unless it is committed.
pub(super) struct Change(WriteTransaction);

impl Change {
    pub(super) fn put_image(&self, id: &ImageId, record: &ImageRecord) -> Result<(), Error> {
        let json =
            serde_json::to_vec(record).map_err(|_| Error::Corrupt { what: format!("the record of {id}") })?;
        self.0.open_table(IMAGES)?.insert(id.to_string().as_str(), json.as_slice())?;
        Ok(())
    }

    /// Points a tag to an image; where it pointed before.
    pub(super) fn put_tag(&self, tag: &Reference, id: &ImageId) -> Result<Option<ImageId>, Error> {
        let mut table = self.0.open_table(TAGS)?;
        let old = table.insert(tag.canonical().as_str(), id.to_string().as_str())?;
        old.map(|old| parse_id(old.value())).transpose()
    }

    pub(super) fn put_digest(&self, name: &Reference, id: &ImageId) -> Result<(), Error> {
        self.0.open_table(DIGESTS)?.insert(name.canonical().as_str(), id.to_string().as_str())?;
        Ok(())
    }

    /// Removes a tag or a digest.
    pub(super) fn remove_name(&self, name: &Reference) -> Result<(), Error> {
        let table = if name.digest().is_some() { DIGESTS } else { TAGS };
        self.0.open_table(table)?.remove(name.canonical().as_str())?;
        Ok(())
    }

    pub(super) fn remove_image(&self, id: &ImageId) -> Result<(), Error> {
        self.0.open_table(IMAGES)?.remove(id.to_string().as_str())?;
        Ok(())
    }

    pub(super) fn commit(self) -> Result<(), Error> {
        Ok(self.0.commit()?)
    }
}

fn all_images(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Vec<(ImageId, ImageRecord)>, Error> {
    let mut images = Vec::new();
    for item in table.iter()? {
        let (key, value) = item?;
        let id = parse_id(key.value())?;
        images.push((id, parse_record(&id, value.value())?));
    }
    Ok(images)
}

fn all_names(
    table: &impl ReadableTable<&'static str, &'static str>,
) -> Result<Vec<(Reference, ImageId)>, Error> {
    let mut names = Vec::new();
    for item in table.iter()? {
        let (key, value) = item?;
        let name = Reference::parse(key.value());
        let name = name.map_err(|_| Error::Corrupt { what: format!("the name `{}`", key.value()) })?;
        names.push((name, parse_id(value.value())?));
    }
    Ok(names)
}

fn parse_id(text: &str) -> Result<ImageId, Error> {
    text.parse().map_err(|_| Error::Corrupt { what: format!("the image id `{text}`") })
}

fn parse_record(id: &ImageId, json: &[u8]) -> Result<ImageRecord, Error> {
    serde_json::from_slice(json).map_err(|_| Error::Corrupt { what: format!("the record of image {id}") })
}
