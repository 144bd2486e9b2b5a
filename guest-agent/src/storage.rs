//! Containers' writable layers on the data disk. Removing one is a rename, which is done at once and survives a crash; the
//! files go afterwards. Everything here blocks and is called off the event loop.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_agent_api::{InjectedFile, ProcessId};
use rustix::mount::MountAttrFlags;

use crate::error::{AtStep, Result};
use crate::mounts;

/// The folders on the data disk.
pub(crate) struct Storage {
    containers: PathBuf,
    trash: PathBuf,
    removed: AtomicU64,
}

impl Storage {
    /// Uses `data`, and empties the trash of an earlier run.
    pub(crate) fn new(data: &Path) -> io::Result<Self> {
        let storage = Self {
            containers: data.join("containers"),
            trash: data.join("trash"),
            removed: AtomicU64::new(0),
        };
        std::fs::create_dir_all(&storage.containers)?;
        match std::fs::remove_dir_all(&storage.trash) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::create_dir_all(&storage.trash)?;
        Ok(storage)
    }

    fn directory(&self, id: &ProcessId) -> PathBuf {
        self.containers.join(id.as_str())
    }

    /// Mounts a container's root file system: a detached mount over the lower directories (highest first). Device nodes in it
    /// open something only if `nodes_open`.
    pub(crate) fn mount_root(&self, id: &ProcessId, lower: &[PathBuf], nodes_open: bool) -> Result<OwnedFd> {
        let step = "mount the root file system";
        let directory = self.directory(id);
        let (upper, work) = (directory.join("upper"), directory.join("work"));
        for path in [&upper, &work] {
            std::fs::create_dir_all(path).at("make the writable layer")?;
        }
        fn text(path: &Path) -> io::Result<&str> {
            path.to_str().ok_or(io::ErrorKind::InvalidInput.into())
        }
        let mut options = Vec::with_capacity(lower.len() + 6);
        for path in lower {
            options.push(("lowerdir+", text(path).at(step)?));
        }
        options.push(("upperdir", text(&upper).at(step)?));
        options.push(("workdir", text(&work).at(step)?));
        // Whatever the kernel's defaults are: a rename of a lower directory gives EXDEV, as with Docker, and the upper
        // layer holds whole files, so that it can be read without the lower ones.
        options.extend([("redirect_dir", "off"), ("metacopy", "off"), ("index", "off"), ("xino", "off")]);
        let attributes = if nodes_open { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_NODEV };
        mounts::new("overlay", &options, attributes).at(step)
    }

    /// A handle to a container's writable layer, which is made if there is none yet.
    pub(crate) fn open_upper(&self, id: &ProcessId) -> Result<OwnedFd> {
        let upper = self.directory(id).join("upper");
        std::fs::create_dir_all(&upper).at("make the writable layer")?;
        crate::child::open_directory(&upper).at("open the writable layer")
    }

    /// Writes the files that the daemon gives a container; their paths in the same order.
    pub(crate) fn write_files(&self, id: &ProcessId, files: &[InjectedFile]) -> Result<Vec<String>> {
        if files.is_empty() {
            return Ok(Vec::new());
        }
        let directory = self.directory(id).join("files");
        std::fs::create_dir_all(&directory).at("make the directory of the container's files")?;
        let write = |(number, file): (usize, &InjectedFile)| {
            let path = directory.join(number.to_string());
            std::fs::write(&path, &file.contents).at(format!("write {}", file.path))?;
            Ok(path.to_string_lossy().into_owned())
        };
        files.iter().enumerate().map(write).collect()
    }

    /// Takes a container's writable layer away; what is left must be given to [`delete`], after the container's mount has
    /// gone. `None` if there was nothing.
    pub(crate) fn remove(&self, id: &ProcessId) -> io::Result<Option<PathBuf>> {
        self.discard(&self.directory(id), id.as_str())
    }

    /// Takes a directory of the data disk away; what is left must be given to [`delete`]. `None` if there was nothing.
    pub(crate) fn discard(&self, directory: &Path, name: &str) -> io::Result<Option<PathBuf>> {
        let number = self.removed.fetch_add(1, Ordering::Relaxed);
        let trash = self.trash.join(format!("{name}-{number}"));
        match std::fs::rename(directory, &trash) {
            Ok(()) => Ok(Some(trash)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The containers that have a writable layer.
    pub(crate) fn list(&self) -> io::Result<Vec<ProcessId>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.containers)? {
            if let Ok(name) = entry?.file_name().into_string()
                && let Ok(id) = ProcessId::try_from(name)
            {
                ids.push(id);
            }
        }
        Ok(ids)
    }
}

/// Deletes what [`Storage::remove`] took away.
pub(crate) fn delete(trash: &Path) {
    if let Err(error) = std::fs::remove_dir_all(trash) {
        tracing::warn!("deleting {} failed: {error}", trash.display());
    }
}
