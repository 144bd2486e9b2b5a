//! From nodes to descriptors. A node remembers the directory and the name under which it was seen last; what is found there is used only if it
//! is still the same file. Descriptors of directories are cached; those of other files are opened for one request, so that a file that the
//! host deletes does not keep its space.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Statx};
use rustix::io::Errno;

use super::table::{Handle, Key, Node, Place, lock};
use super::{Exported, sys};

/// The most directories between a node and its grant; a path of the system has no more.
const MAX_DEPTH: usize = 2048;
/// The longest name in bytes.
const MAX_NAME: usize = 255;

/// Checks that a name of the guest's is one component.
pub(super) fn component(name: &CStr) -> io::Result<&CStr> {
    let bytes = name.to_bytes();
    if bytes.len() > MAX_NAME {
        return Err(Errno::NAMETOOLONG.into());
    }
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno::INVAL.into());
    }
    Ok(name)
}

/// A descriptor that leads to a node's file.
#[derive(Debug)]
pub(super) enum NodeFd {
    /// Opened with `O_PATH`.
    Path(Arc<OwnedFd>),
    /// The file was unlinked or moved, but is open.
    Open(Arc<Handle>),
}

impl AsFd for NodeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Path(fd) => fd.as_fd(),
            Self::Open(handle) => handle.as_fd(),
        }
    }
}

/// Where a node's file is: a descriptor, and a name in it unless that is the file itself.
#[derive(Debug)]
pub(super) struct Location {
    fd: NodeFd,
    name: CString,
}

impl Location {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn name(&self) -> &CStr {
        &self.name
    }
}

/// Descriptors of directories, the most lately used of them ("clock": each one has a second chance).
#[derive(Debug)]
pub(super) struct Directories {
    capacity: usize,
    inner: Mutex<Clock>,
}

#[derive(Debug, Default)]
struct Clock {
    entries: HashMap<u64, (Arc<OwnedFd>, bool)>,
    hand: VecDeque<u64>,
}

impl Directories {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), inner: Mutex::default() }
    }

    fn get(&self, id: u64) -> Option<Arc<OwnedFd>> {
        let mut clock = lock(&self.inner);
        let (fd, used) = clock.entries.get_mut(&id)?;
        *used = true;
        Some(Arc::clone(fd))
    }

    fn insert(&self, id: u64, fd: Arc<OwnedFd>) {
        let mut clock = lock(&self.inner);
        let mut evicted = None;
        if clock.entries.insert(id, (fd, false)).is_none() {
            clock.hand.push_back(id);
        }
        if clock.entries.len() > self.capacity {
            evicted = clock.evict();
        }
        drop(clock);
        drop(evicted);
    }

    pub(super) fn remove(&self, id: u64) {
        let removed = lock(&self.inner).entries.remove(&id);
        drop(removed);
    }

    pub(super) fn remove_all(&self, ids: &[u64]) {
        ids.iter().for_each(|id| self.remove(*id));
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *lock(&self.inner));
        drop(all);
    }
}

impl Clock {
    fn evict(&mut self) -> Option<Arc<OwnedFd>> {
        while let Some(id) = self.hand.pop_front() {
            match self.entries.get_mut(&id) {
                // Removed since.
                None => {}
                Some((_, used)) if *used => {
                    *used = false;
                    self.hand.push_back(id);
                }
                Some(_) => return self.entries.remove(&id).map(|(fd, _)| fd),
            }
        }
        None
    }
}

impl Exported {
    /// Where the node's file is, and its status there.
    pub(super) fn locate(&self, node: &Node) -> io::Result<(Location, Statx)> {
        let location = node.place().and_then(|place| match place {
            Place::Root(tree) => Ok(Location { fd: NodeFd::Path(tree), name: CString::default() }),
            Place::Child { parent, name } => self.locate_child(node, parent, name),
        });
        let found = location.and_then(|location| {
            let status = sys::status(location.fd(), location.name())?;
            if Key::from(&status) == node.key { Ok((location, status)) } else { Err(Errno::STALE.into()) }
        });
        found.or_else(|_| {
            let handle = node.open_handle().ok_or(Errno::STALE)?;
            let status = sys::status(handle.as_fd(), c"")?;
            Ok((Location { fd: NodeFd::Open(handle), name: CString::default() }, status))
        })
    }

    fn locate_child(&self, node: &Node, parent: u64, name: Box<CStr>) -> io::Result<Location> {
        if let Some(fd) = self.directories.get(node.id) {
            return Ok(Location { fd: NodeFd::Path(fd), name: CString::default() });
        }
        let directory = self.directory(&*self.tables.node(parent)?)?;
        Ok(Location { fd: NodeFd::Path(directory), name: name.into() })
    }

    /// A descriptor of the node's file, opened with `O_PATH` or open anyway.
    pub(super) fn fd(&self, node: &Node) -> io::Result<NodeFd> {
        if node.kind == FileType::Directory {
            return self.directory(node).map(NodeFd::Path);
        }
        let (location, _) = self.locate(node)?;
        if location.name.is_empty() {
            return Ok(location.fd);
        }
        match self.open_path(location.fd(), location.name(), OFlags::empty(), node.key) {
            Ok(fd) => Ok(NodeFd::Path(fd)),
            Err(error) => node.open_handle().map(NodeFd::Open).ok_or(error),
        }
    }

    /// A descriptor of the node's directory, opened with `O_PATH`.
    pub(super) fn directory(&self, node: &Node) -> io::Result<Arc<OwnedFd>> {
        if node.kind != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let mut missing: Vec<(u64, Key, Box<CStr>)> = Vec::new();
        let mut at = (node.id, node.key, node.place()?);
        let mut fd = loop {
            let (id, key, place) = at;
            if let Some(fd) = self.directories.get(id) {
                break fd;
            }
            match place {
                Place::Root(tree) => break tree,
                Place::Child { .. } if missing.len() >= MAX_DEPTH => return Err(Errno::STALE.into()),
                Place::Child { parent, name } => {
                    let above = self.tables.node(parent)?;
                    missing.push((id, key, name));
                    at = (above.id, above.key, above.place()?);
                }
            }
        };
        while let Some((id, key, name)) = missing.pop() {
            fd = self.open_path(fd.as_fd(), &name, OFlags::DIRECTORY, key)?;
            self.directories.insert(id, Arc::clone(&fd));
        }
        Ok(fd)
    }

    /// Opens `name` in `directory` with `O_PATH` if it is the file that is expected.
    fn open_path(
        &self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        flags: OFlags,
        expected: Key,
    ) -> io::Result<Arc<OwnedFd>> {
        let flags = flags | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let fd = self
            .with_room(|| rustix::fs::openat2(directory, name, flags, Mode::empty(), beneath))
            .map_err(|errno| match errno {
                Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
                errno => errno,
            })?;
        let status = sys::status(fd.as_fd(), c"")?;
        if Key::from(&status) == expected { Ok(Arc::new(fd)) } else { Err(Errno::STALE.into()) }
    }

    /// Opens something; when there are no descriptors left, gives those of the cache back and tries again.
    pub(super) fn with_room<T>(&self, open: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.directories.clear();
                open()
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_are_names() {
        for bad in [c"", c".", c"..", c"a/b", c"/", c"../a"] {
            assert!(component(bad).is_err(), "{bad:?}");
        }
        for good in [c"a", c"...", c".a", c"\xff\xfe"] {
            assert!(component(good).is_ok(), "{good:?}");
        }
        let long = CString::new(vec![b'a'; MAX_NAME + 1]).unwrap();
        assert_eq!(component(&long).unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    }

    #[test]
    fn the_cache_keeps_what_is_used_within_its_bound() {
        let cache = Directories::new(3);
        let fd = || Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
        for id in 0..3 {
            cache.insert(id, fd());
        }
        assert!(cache.get(0).is_some());
        cache.insert(3, fd());
        assert!(cache.get(0).is_some(), "used lately");
        assert!(cache.get(1).is_none(), "the oldest that was not used");
        for id in 10..1000 {
            cache.insert(id, fd());
            cache.remove(id);
        }
        assert!(lock(&cache.inner).entries.len() <= 3);
    }
}
