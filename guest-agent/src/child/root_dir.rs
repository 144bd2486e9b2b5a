//! A container's root directory as the boundary that no path leaves. The kernel resolves every path below it
//! (openat2 with RESOLVE_IN_ROOT and without magic links), so that a symbolic link in a hostile image ends inside the
//! image, whatever it points to.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

const MAX_LINKS: u32 = 40;
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);
const FILE_MODE: Mode = Mode::from_raw_mode(0o644);

/// The root of a container's file system.
pub(crate) struct RootDir {
    fd: OwnedFd,
}

/// What a path that is made shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A directory.
    Directory,
    /// An empty regular file.
    File,
}

impl RootDir {
    /// The directory behind a descriptor.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// The calling process's own root.
    pub(super) fn current() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self::new(rustix::fs::open("/", flags, Mode::empty())?))
    }

    /// The descriptor itself.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn openat2(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match openat2(&self.fd, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // The kernel saw a rename elsewhere while it walked; nothing is known yet.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// A handle (O_PATH) to what is there; symbolic links are followed within the root.
    pub(crate) fn find(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        Ok(self.openat2(path.as_ref(), OFlags::PATH, ResolveFlags::empty())?)
    }

    /// A handle to what is there, which must not be or be reached through a symbolic link.
    pub(super) fn find_without_links(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        Ok(self.openat2(path.as_ref(), OFlags::PATH, ResolveFlags::NO_SYMLINKS)?)
    }

    /// A handle to a directory.
    pub(super) fn find_directory(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        Ok(self.openat2(path.as_ref(), OFlags::PATH | OFlags::DIRECTORY, ResolveFlags::empty())?)
    }

    /// What a link says; an error for anything else. Links on the way are followed, it is not.
    pub(super) fn read_link(&self, path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let link = self.openat2(path.as_ref(), OFlags::PATH | OFlags::NOFOLLOW, ResolveFlags::empty())?;
        Ok(rustix::fs::readlinkat(&link, "", Vec::new())?.into_bytes())
    }

    /// Opens a device for reading and writing without making it the controlling terminal.
    pub(super) fn open_device(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
        Ok(self.openat2(path.as_ref(), flags, ResolveFlags::NO_SYMLINKS)?)
    }

    /// Reads a regular file of at most `limit` bytes; anything else is an error.
    pub(super) fn read_file(&self, path: impl AsRef<Path>, limit: u64) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        // Look before opening: opening a device can have effects.
        let handle = self.find(&path)?;
        if FileType::from_raw_mode(rustix::fs::fstat(&handle)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = std::fs::File::from(self.openat2(path.as_ref(), flags, ResolveFlags::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        Ok(bytes)
    }

    /// A handle to `path`, which is made, with the directories on the way, as far as it is missing. Links are followed
    /// within the root also where they point to nothing yet.
    pub(super) fn find_or_make(&self, path: impl AsRef<Path>, kind: Kind) -> io::Result<OwnedFd> {
        match self.find(&path) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => return result,
        }
        let mut links = 0;
        let mut here = PathBuf::new();
        let mut ahead: Vec<std::ffi::OsString> = components(path.as_ref());
        while let Some(name) = ahead.pop() {
            if name == ".." {
                here.pop();
                continue;
            }
            let next = here.join(&name);
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            match self.openat2(&next, flags, ResolveFlags::empty()) {
                Ok(found) if is_link(&found)? => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
                    let target = PathBuf::from(std::ffi::OsString::from(
                        target.into_string().map_err(|_| io::Error::from(Errno::ILSEQ))?,
                    ));
                    if target.is_absolute() {
                        here.clear();
                    }
                    ahead.extend(components(&target));
                }
                Ok(_) => here = next,
                Err(Errno::NOENT) => {
                    let parent = self.find_directory(if here.as_os_str().is_empty() {
                        Path::new(".")
                    } else {
                        &here
                    })?;
                    let kind = if ahead.is_empty() { kind } else { Kind::Directory };
                    make(parent.as_fd(), Path::new(&name), kind)?;
                    here = next;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.find(if here.as_os_str().is_empty() { Path::new(".") } else { &here })
    }
}

/// The path's parts, the first one last.
fn components(path: &Path) -> Vec<std::ffi::OsString> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    let mut parts: Vec<_> = parts.collect();
    parts.reverse();
    parts
}

fn is_link(fd: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::Symlink)
}

/// Makes one thing in a directory; it is fine if it exists.
pub(super) fn make(parent: BorrowedFd<'_>, name: &Path, kind: Kind) -> io::Result<()> {
    let result = match kind {
        Kind::Directory => rustix::fs::mkdirat(parent, name, DIRECTORY_MODE),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags, FILE_MODE).map(drop)
        }
    };
    match result {
        Err(Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}

/// A handle to a directory in the agent's own file system.
pub(crate) fn open_directory(path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path.as_ref(), flags, Mode::empty())?)
}

/// A handle to anything in the agent's own file system.
pub(super) fn open(path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(CWD, path.as_ref(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root(dir: &tempfile::TempDir) -> RootDir {
        RootDir::new(open_directory(dir.path()).unwrap())
    }

    #[test]
    fn links_end_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("passwd"), "inside").unwrap();
        symlink("/passwd", dir.path().join("absolute")).unwrap();
        symlink("../../../../passwd", dir.path().join("climbing")).unwrap();
        for path in ["/absolute", "climbing", "/../passwd"] {
            assert_eq!(root(&dir).read_file(path, 100).unwrap(), b"inside", "{path}");
        }
    }

    #[test]
    fn dangling_links_are_made_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        symlink("../../../run/systemd/resolv.conf", dir.path().join("etc/resolv.conf")).unwrap();
        root(&dir).find_or_make("/etc/resolv.conf", Kind::File).unwrap();
        assert!(dir.path().join("run/systemd/resolv.conf").is_file());
    }

    #[test]
    fn links_in_a_circle_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        let error = root(&dir).find_or_make("a", Kind::File).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_on_the_way_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let error = root(&dir).find_or_make("file/below", Kind::Directory).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn only_regular_files_of_a_sane_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("big"), [0; 101]).unwrap();
        rustix::fs::mknodat(CWD, dir.path().join("fifo"), FileType::Fifo, FILE_MODE, 0).unwrap();
        symlink("/proc/self/fd/0", dir.path().join("magic")).unwrap();
        for path in ["big", "fifo", "magic", "."] {
            assert!(root(&dir).read_file(path, 100).is_err(), "{path}");
        }
    }
}
