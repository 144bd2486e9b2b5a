//! Things that take long to make, kept in the user's cache under a hash of everything they were made from.
//! An entry appears whole or not at all: it is made in a folder beside its place and renamed; a lock keeps two builds of one thing apart.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// A hash over named inputs, in their order.
#[derive(Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// Adds an input. Lengths are hashed too, so that no two lists of inputs run into each other.
    pub(crate) fn input(mut self, name: &str, bytes: &[u8]) -> Self {
        for part in [name.as_bytes(), bytes] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// The hash as a folder's name.
    pub(crate) fn finish(self) -> String {
        hex::encode(&self.0.finalize()[..16])
    }
}

/// The folder of what `make` makes of the inputs behind `key`; `make` fills the folder that it is given, once.
pub(crate) fn entry(kind: &str, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let shelf = home()?.join("coracle").join(kind);
    let place = shelf.join(key);
    if place.is_dir() {
        return Ok(place);
    }
    fs::create_dir_all(&shelf).with_context(|| format!("cannot make {}", shelf.display()))?;
    let _lock = lock(&shelf.join(format!(".{key}.lock")))?;
    if place.is_dir() {
        return Ok(place);
    }
    let made = tempfile::Builder::new()
        .prefix(".making-")
        .tempdir_in(&shelf)
        .with_context(|| format!("cannot write in {}", shelf.display()))?;
    make(made.path())?;
    fs::rename(made.path(), &place)
        .with_context(|| format!("cannot put {} in its place", place.display()))?;
    File::open(&shelf)?.sync_all()?;
    let _ = made.keep();
    Ok(place)
}

fn home() -> Result<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of("XDG_CACHE_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| of("HOME").map(|home| home.join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: nowhere to keep what was built")
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, nix::Error::EWOULDBLOCK)) => {
            eprintln!("waiting for another xtask that makes the same");
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| error)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Writes `bytes` to `path` unless that is what is there; through a temporary file and a rename.
pub(crate) fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let folder = path.parent().context("a file needs a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut file = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("cannot write in {}", folder.display()))?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.as_file().sync_all()?;
    fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_do_not_run_into_each_other() {
        let one = Key::default().input("a", b"bc").finish();
        let other = Key::default().input("ab", b"c").finish();
        assert_ne!(one, other);
        assert_eq!(one, Key::default().input("a", b"bc").finish());
    }

    #[test]
    fn a_file_that_did_not_change_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/file");
        write_if_changed(&path, b"one").unwrap();
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        write_if_changed(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
        write_if_changed(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
    }
}
