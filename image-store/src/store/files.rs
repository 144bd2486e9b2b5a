//! The files of the store. They are written in `tmp/`, synced, and renamed to their digest's name, so that a file
//! under such a name is always whole.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use tracing::{debug, warn};

use super::db::References;
use super::error::Error;
use crate::digest::Digest;
use crate::faults;
use crate::layer::NewLayer;
use crate::recipe::LayerTar;

const LAYER_SUFFIX: &str = ".erofs";
/// Beside a layer's image: the way back to its tar stream.
const RECIPE_SUFFIX: &str = ".recipe";

#[derive(Debug)]
pub(super) struct Files {
    scratch: PathBuf,
    layers: PathBuf,
    blobs: PathBuf,
}

impl Files {
    /// Makes the directories that are missing.
    pub(super) fn create(root: &Path) -> Result<Self, Error> {
        let files = Self {
            scratch: root.join("tmp"),
            layers: root.join("layers"),
            blobs: root.join("blobs").join("sha256"),
        };
        for directory in [&files.scratch, &files.layers, &files.blobs] {
            create_private_directory(directory).map_err(|source| Error::io("create", directory, source))?;
        }
        Ok(files)
    }

    pub(super) fn scratch(&self) -> &Path {
        &self.scratch
    }

    pub(super) fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.layers.join(format!("{}{LAYER_SUFFIX}", diff_id.hex()))
    }

    fn recipe_path(&self, diff_id: &Digest) -> PathBuf {
        self.layers.join(format!("{}{RECIPE_SUFFIX}", diff_id.hex()))
    }

    /// The sizes of a stored layer's image and recipe. A layer that lacks either counts as not stored, so that the
    /// next load brings it.
    pub(super) fn layer_sizes(&self, diff_id: &Digest) -> Option<(u64, u64)> {
        Some((self.image_size(diff_id)?, file_size(&self.recipe_path(diff_id))?))
    }

    /// The size of a stored layer's image.
    pub(super) fn image_size(&self, diff_id: &Digest) -> Option<u64> {
        file_size(&self.layer_path(diff_id))
    }

    /// Puts a new layer's files in place; the recipe comes last and makes the layer complete.
    pub(super) fn put_layer(&self, layer: NewLayer, new_files: &mut NewFiles) -> Result<(), Error> {
        let diff_id = layer.converted.diff_id;
        let files = layer.into_files();
        let (image, recipe) = files.map_err(|source| Error::io("sync a layer in", &self.scratch, source))?;
        new_files.persist(image, self.layer_path(&diff_id))?;
        new_files.persist(recipe, self.recipe_path(&diff_id))
    }

    /// A layer's tar stream.
    pub(super) fn layer_tar(&self, diff_id: &Digest) -> Result<LayerTar<File, File>, Error> {
        let open = |path: PathBuf| match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let what = format!("the tar stream of layer {diff_id}; load or pull its image again");
                Err(Error::Corrupt { what })
            }
            other => other.map_err(|source| Error::io("open the layer", &path, source)),
        };
        let recipe = || open(self.recipe_path(diff_id));
        let tar = LayerTar::open(recipe()?, recipe()?, open(self.layer_path(diff_id))?, *diff_id);
        tar.map_err(|source| Error::io("read the layer", &self.recipe_path(diff_id), source))
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// A blob's content, checked against its digest.
    pub(super) fn blob(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let corrupt = || Error::Corrupt { what: format!("blob {digest}") };
        let bytes = fs::read(self.blob_path(digest)).map_err(|_| corrupt())?;
        if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(corrupt()) }
    }

    /// Stores a small blob under its digest.
    pub(super) fn put_blob(&self, bytes: &[u8], new_files: &mut NewFiles) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        if self.blob(&digest).is_ok() {
            return Ok(digest);
        }
        let failed = |source| Error::io("write a blob in", &self.scratch, source);
        faults::point();
        let mut file = tempfile::Builder::new().prefix("blob-").tempfile_in(&self.scratch).map_err(failed)?;
        faults::point();
        file.write_all(bytes).map_err(failed)?;
        faults::point();
        file.as_file().sync_all().map_err(failed)?;
        new_files.persist(file, self.blob_path(&digest))?;
        Ok(digest)
    }

    pub(super) fn remove_layer(&self, diff_id: &Digest) {
        remove_or_warn(&self.layer_path(diff_id));
        remove_or_warn(&self.recipe_path(diff_id));
    }

    pub(super) fn remove_blob(&self, digest: &Digest) {
        remove_or_warn(&self.blob_path(digest));
    }

    /// Removes temporary files and whatever no image refers to.
    pub(super) fn remove_debris(&self, references: &References) -> Result<(), Error> {
        remove_entries(&self.scratch, |_| false)?;
        remove_entries(&self.layers, |name| {
            let hex = name.strip_suffix(LAYER_SUFFIX).or_else(|| name.strip_suffix(RECIPE_SUFFIX));
            let digest = hex.and_then(|hex| Digest::from_hex(hex).ok());
            digest.is_some_and(|digest| references.layers.contains(&digest))
        })?;
        remove_entries(&self.blobs, |name| {
            Digest::from_hex(name).is_ok_and(|digest| references.blobs.contains(&digest))
        })
    }
}

/// The files that a load has put in place; they are removed again unless it succeeds.
#[derive(Debug, Default)]
pub(super) struct NewFiles(Vec<PathBuf>);

impl NewFiles {
    /// Renames a synced file to its final name.
    pub(super) fn persist(&mut self, file: NamedTempFile, target: PathBuf) -> Result<(), Error> {
        // What was there was incomplete or damaged, but images may refer to it: it is not for us to remove.
        let is_new = !target.exists();
        faults::point();
        match file.persist(&target) {
            Ok(_) if is_new => {
                self.0.push(target);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(Error::io("create", &target, error.error)),
        }
    }

    /// Makes the new names survive a crash.
    pub(super) fn sync_directories(&self) -> Result<(), Error> {
        let directories: BTreeSet<_> = self.0.iter().filter_map(|file| file.parent()).collect();
        for directory in directories {
            faults::point();
            sync_directory(directory).map_err(|source| Error::io("sync", directory, source))?;
        }
        Ok(())
    }

    /// From now on they stay.
    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        self.0.iter().for_each(|file| remove_or_warn(file));
    }
}

fn file_size(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|metadata| metadata.len())
}

/// A file that stays behind takes space until the next start, which removes it.
fn remove_or_warn(path: &Path) {
    faults::point();
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(path = %path.display(), %error, "cannot remove an unused file of the image store");
        }
        _ => {}
    }
}

fn remove_entries(directory: &Path, is_needed: impl Fn(&str) -> bool) -> Result<(), Error> {
    let failed = |source| Error::io("clean up", directory, source);
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_str().is_some_and(&is_needed) {
            continue;
        }
        faults::point();
        debug!(name = ?entry.file_name(), "removing what nothing refers to");
        let removed = match entry.file_type().map_err(failed)?.is_dir() {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        };
        removed.map_err(failed)?;
    }
    Ok(())
}

#[cfg(unix)]
fn create_private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(not(unix))]
fn create_private_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

#[cfg(unix)]
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Elsewhere directories cannot be synced; renames are ordered by the file system's journal.
#[cfg(not(unix))]
fn sync_directory(_path: &Path) -> io::Result<()> {
    Ok(())
}
