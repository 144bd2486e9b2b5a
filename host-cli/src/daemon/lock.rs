//! A lock that is a file: held by an open descriptor, let go by the kernel however its holder ends.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

/// A held lock.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Takes the lock; waits for whoever has it.
    pub(crate) fn wait(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                result => return result.map(|()| Self(file)).map_err(io::Error::from),
            }
        }
    }

    /// Takes the lock if nobody has it.
    pub(crate) fn try_take(path: &Path) -> io::Result<Option<Self>> {
        let file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Notes in the file who holds it. It is for people: the lock itself is what counts.
    pub(crate) fn write_pid(&self) {
        let mut file = &self.0;
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    }
}

/// Who noted that they hold the lock.
pub(crate) fn holder(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_holds_a_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let lock = Lock::try_take(&path).unwrap().unwrap();
        lock.write_pid();
        assert!(Lock::try_take(&path).unwrap().is_none());
        assert_eq!(holder(&path), Some(std::process::id()));
        drop(lock);
        assert!(Lock::try_take(&path).unwrap().is_some());
    }

    #[test]
    fn a_waiter_gets_the_lock_when_its_holder_lets_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let lock = Lock::wait(&path).unwrap();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || Lock::wait(&path).map(drop)
        });
        drop(lock);
        waiter.join().unwrap().unwrap();
    }
}
