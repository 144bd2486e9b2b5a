//! Volumes: directories on the data disk that outlive containers. Each has its files in `data`, which is what containers see. What comes
//! from an image is copied to `new` beside it, where no container can meddle with it; once it is whole it is called `full`, and its
//! entries are moved from there. So a volume that other containers use is filled without taking anything from them, and one that was
//! being filled when the machine ended is filled to the end before it is used again. What is in a volume was written by containers
//! and is not trusted. Everything here blocks and is called off the event loop.

mod copy;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use coracle_agent_api::{VolumeId, VolumeMount, VolumeUsage};
use rustix::fs::{FileType, FlockOperation, RenameFlags, fstat, renameat_with};
use rustix::io::Errno;

use crate::child::{RootDir, open_directory};
use crate::error::{AtStep, Result};
use crate::storage::Storage;

/// The volumes on the data disk.
pub(crate) struct Volumes {
    directory: PathBuf,
}

impl Volumes {
    /// Uses `data`.
    pub(crate) fn new(data: &Path) -> io::Result<Self> {
        let directory = data.join("volumes");
        fs::create_dir_all(&directory)?;
        Ok(Self { directory })
    }

    /// Makes volumes ready for a container with this root file system; their directories in the same order.
    pub(crate) fn prepare(&self, root: &OwnedFd, mounts: &[VolumeMount]) -> Result<Vec<String>> {
        let prepare = |mount: &VolumeMount| {
            let volume = Volume { directory: self.directory.join(mount.volume.as_str()) };
            let step = || format!("prepare the volume at {}", mount.path);
            let _alone = volume.make().and_then(|()| volume.lock()).at(step())?;
            volume.move_in().at(step())?;
            if mount.copy_up {
                let root = RootDir::new(root.try_clone().at(step())?);
                let step = format!("fill the volume at {} with what the image has there", mount.path);
                volume.fill(&root, &mount.path).at(step)?;
            }
            Ok(volume.data().to_string_lossy().into_owned())
        };
        mounts.iter().map(prepare).collect()
    }

    /// Takes a volume away; what is left must be given to [`crate::storage::delete`]. `None` if there was nothing.
    pub(crate) fn remove(&self, id: &VolumeId, storage: &Storage) -> io::Result<Option<PathBuf>> {
        storage.discard(&self.directory.join(id.as_str()), id.as_str())
    }

    /// All volumes.
    pub(crate) fn list(&self) -> io::Result<Vec<VolumeId>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            if let Ok(name) = entry?.file_name().into_string()
                && let Ok(id) = VolumeId::try_from(name)
            {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// All volumes with the space that they take.
    pub(crate) fn usage(&self) -> io::Result<Vec<VolumeUsage>> {
        let measure = |volume: VolumeId| {
            let bytes = space(&self.directory.join(volume.as_str()).join("data"));
            VolumeUsage { volume, bytes }
        };
        Ok(self.list()?.into_iter().map(measure).collect())
    }
}

struct Volume {
    directory: PathBuf,
}

impl Volume {
    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// What is being copied.
    fn half(&self) -> PathBuf {
        self.directory.join("new")
    }

    /// What is copied, and moved to where it belongs.
    fn full(&self) -> PathBuf {
        self.directory.join("full")
    }

    fn make(&self) -> io::Result<()> {
        fs::create_dir_all(self.data())
    }

    /// Held while the volume is made ready: two containers may start with it at the same time.
    fn lock(&self) -> io::Result<File> {
        let file = File::create(self.directory.join("lock"))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }

    /// Moves in what was copied from an image, if anything was. What a container has put there meanwhile stays.
    fn move_in(&self) -> io::Result<()> {
        remove(&self.half())?;
        let full = match open_directory(self.full()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            full => full?,
        };
        let data = open_directory(self.data())?;
        copy::attributes(&full, &data)?;
        let entries: io::Result<Vec<_>> = fs::read_dir(self.full())?.collect();
        for name in entries?.iter().map(fs::DirEntry::file_name) {
            match renameat_with(&full, &name, &data, &name, RenameFlags::NOREPLACE) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        remove(&self.full())
    }

    fn fill(&self, root: &RootDir, path: &str) -> io::Result<()> {
        if fs::read_dir(self.data())?.next().is_some() {
            return Ok(());
        }
        let source = match root.find(path) {
            Ok(source) => source,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(()),
            Err(error) => return Err(error),
        };
        if FileType::from_raw_mode(fstat(&source)?.st_mode) != FileType::Directory {
            return Ok(());
        }
        fs::create_dir(self.half())?;
        let copied = open_directory(self.half()).and_then(|target| {
            copy::tree(&source, &target)?;
            // Else it could be called full on the disk before the files are there.
            rustix::fs::syncfs(File::open(self.half())?)?;
            fs::rename(self.half(), self.full())
        });
        if copied.is_err() {
            // If this fails too, the next start does it.
            let _ = remove(&self.half());
        }
        copied.and_then(|()| self.move_in())
    }
}

/// Removes a tree, if it is there.
fn remove(tree: &Path) -> io::Result<()> {
    match fs::remove_dir_all(tree) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The space that a tree takes. What cannot be looked at (a path that is too long, something that goes away meanwhile) does not count.
fn space(root: &Path) -> u64 {
    let mut total = 0u64;
    let mut links = HashSet::new();
    let mut ahead = vec![root.to_owned()];
    while let Some(directory) = ahead.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                ahead.push(entry.path());
            } else if metadata.nlink() > 1 && !links.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            total = total.saturating_add(metadata.blocks().saturating_mul(512));
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Place {
        dir: tempfile::TempDir,
        volumes: Volumes,
        root: OwnedFd,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image/var/lib");
        fs::create_dir_all(&image).unwrap();
        fs::write(image.join("file"), "content").unwrap();
        fs::hard_link(image.join("file"), image.join("link")).unwrap();
        symlink("../../etc/passwd", image.join("symlink")).unwrap();
        fs::create_dir(image.join("sub")).unwrap();
        fs::write(image.join("sub/secret"), "s").unwrap();
        fs::set_permissions(image.join("sub/secret"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o1777)).unwrap();
        let root = open_directory(dir.path().join("image")).unwrap();
        let volumes = Volumes::new(dir.path()).unwrap();
        Place { dir, volumes, root }
    }

    fn mount(copy_up: bool) -> VolumeMount {
        VolumeMount {
            volume: "a".repeat(64).parse().unwrap(),
            path: "/var/lib".to_owned(),
            subpath: String::new(),
            readonly: false,
            copy_up,
        }
    }

    fn prepared(place: &Place, copy_up: bool) -> PathBuf {
        place.volumes.prepare(&place.root, &[mount(copy_up)]).unwrap().remove(0).into()
    }

    #[test]
    fn an_empty_volume_is_filled_with_what_the_image_has() {
        let place = place();
        let data = prepared(&place, true);
        assert_eq!(fs::read(data.join("file")).unwrap(), b"content");
        assert_eq!(
            fs::metadata(data.join("file")).unwrap().ino(),
            fs::metadata(data.join("link")).unwrap().ino()
        );
        assert_eq!(fs::read_link(data.join("symlink")).unwrap(), Path::new("../../etc/passwd"));
        assert_eq!(fs::metadata(data.join("sub/secret")).unwrap().mode() & 0o7777, 0o4711);
        assert_eq!(fs::metadata(&data).unwrap().mode() & 0o7777, 0o1777);
        let beside: Vec<_> = fs::read_dir(data.parent().unwrap()).unwrap().flatten().collect();
        assert_eq!(beside.len(), 2, "{beside:?}");
    }

    #[test]
    fn a_volume_that_holds_something_stays_as_it_is() {
        let place = place();
        let data = prepared(&place, false);
        assert_eq!(fs::read_dir(&data).unwrap().count(), 0);
        fs::write(data.join("mine"), "").unwrap();
        prepared(&place, true);
        assert_eq!(fs::read_dir(&data).unwrap().count(), 1);
    }

    #[test]
    fn a_volume_that_was_being_filled_is_filled_to_the_end() {
        let place = place();
        let data = prepared(&place, false);
        // Half copied: that is done again. Copied, and half moved: that is gone on with.
        fs::create_dir(data.with_file_name("new")).unwrap();
        fs::write(data.with_file_name("new").join("half"), "").unwrap();
        let full = data.with_file_name("full");
        fs::create_dir_all(full.join("late")).unwrap();
        fs::write(full.join("file"), "content").unwrap();
        fs::set_permissions(&full, fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(data.join("early"), "").unwrap();
        prepared(&place, false);
        let mut names: Vec<_> =
            fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["early", "file", "late"]);
        assert_eq!(fs::metadata(&data).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(fs::read_dir(data.parent().unwrap()).unwrap().count(), 2);
    }

    #[test]
    fn what_another_container_puts_into_a_volume_while_it_is_filled_stays() {
        let place = place();
        let data = prepared(&place, false);
        let used = File::open(&data).unwrap();
        // As if it had come between the look at the empty volume and the moving in.
        let volume = Volume { directory: data.parent().unwrap().to_owned() };
        let image = RootDir::new(place.root.try_clone().unwrap());
        fs::create_dir(volume.full()).unwrap();
        copy::tree(&image.find("/var/lib").unwrap(), &open_directory(volume.full()).unwrap()).unwrap();
        symlink("/etc", data.join("sub")).unwrap();
        fs::write(data.join("file"), "mine").unwrap();
        volume.move_in().unwrap();
        assert_eq!(fs::read(data.join("file")).unwrap(), b"mine");
        assert_eq!(fs::read_link(data.join("sub")).unwrap(), Path::new("/etc"));
        assert_eq!(fs::read(data.join("link")).unwrap(), b"content");
        assert_eq!(used.metadata().unwrap().ino(), fs::metadata(&data).unwrap().ino());
    }

    #[test]
    fn space_counts_a_file_with_two_names_once() {
        let place = place();
        let data = prepared(&place, false);
        fs::write(data.join("one"), vec![1; 1 << 20]).unwrap();
        File::open(data.join("one")).unwrap().sync_all().unwrap();
        fs::hard_link(data.join("one"), data.join("two")).unwrap();
        let usage = place.volumes.usage().unwrap();
        assert!((1 << 20..(1 << 20) + (64 << 10)).contains(&usage[0].bytes), "{usage:?}");
        drop(place.dir);
    }
}
