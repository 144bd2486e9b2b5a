//! What the guest refers to: grants, nodes and handles. One lock for all, held only to look things up.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{FileType, Statx, StatxFlags};
use rustix::io::Errno;
use smallvec::{SmallVec, smallvec};

use crate::control::{Grant, GrantId, Owners};

use super::GrantError;
use super::directory::Stream;
use super::owners::Version;
use super::slots::{Slot, Slots};

/// Node of the exported root.
pub(super) const ROOT: u64 = 1;

/// Locks without regard to panics: every critical section leaves its data whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A grant that is or was in force.
#[derive(Debug)]
pub(super) struct Granted {
    pub(super) grant: Grant,
    /// The file that its tree begins with.
    root: Key,
    tree: Mutex<Option<(Arc<OwnedFd>, Slot)>>,
    revoked: AtomicBool,
}

impl Granted {
    /// The root, if the grant is still in force.
    pub(super) fn tree(&self) -> io::Result<Arc<OwnedFd>> {
        lock(&self.tree).as_ref().map(|(tree, _)| Arc::clone(tree)).ok_or_else(|| Errno::STALE.into())
    }

    fn in_force(&self) -> bool {
        !self.revoked.load(Ordering::Acquire)
    }
}

/// What makes a file the same file: device, inode number, and time of birth where the file system has one, since inode numbers are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    device: (u32, u32),
    inode: u64,
    birth: (i64, u32),
}

impl From<&Statx> for Key {
    fn from(status: &Statx) -> Self {
        let has_birth = status.stx_mask & StatxFlags::BTIME.bits() != 0;
        let birth = if has_birth { (status.stx_btime.tv_sec, status.stx_btime.tv_nsec) } else { (0, 0) };
        Self { device: (status.stx_dev_major, status.stx_dev_minor), inode: status.stx_ino, birth }
    }
}

/// Where a node is to be found.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// It is what a grant begins with.
    Root(Arc<OwnedFd>),
    /// It was seen last in this directory.
    Child { parent: u64, name: Box<CStr> },
}

/// A file that the guest refers to.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: u64,
    pub(super) key: Key,
    /// What it is on the host.
    pub(super) kind: FileType,
    pub(super) owners: Owners,
    state: Mutex<NodeState>,
}

#[derive(Debug)]
struct NodeState {
    lookups: u64,
    /// The directory and the name under which it was seen last.
    seen: Option<(u64, Box<CStr>)>,
    grants: SmallVec<[Arc<Granted>; 1]>,
    open: SmallVec<[Weak<Handle>; 1]>,
    told: Option<Version>,
}

impl Node {
    /// Where it is: what several grants begin with is found as long as one of them is in force.
    pub(super) fn place(&self) -> io::Result<Place> {
        let state = lock(&self.state);
        let mut roots = state.grants.iter().filter(|granted| granted.root == self.key);
        if let Some(tree) = roots.find_map(|granted| granted.tree().ok()) {
            return Ok(Place::Root(tree));
        }
        let (parent, name) = state.seen.clone().ok_or(Errno::STALE)?;
        Ok(Place::Child { parent, name })
    }

    /// It was seen there.
    pub(super) fn set_seen(&self, parent: u64, name: &CStr) {
        lock(&self.state).seen = Some((parent, name.into()));
    }

    fn in_force(&self) -> bool {
        lock(&self.state).grants.iter().any(|granted| granted.in_force())
    }

    /// Whether a grant allows changes.
    pub(super) fn is_writable(&self) -> bool {
        lock(&self.state).grants.iter().any(|granted| granted.in_force() && !granted.grant.read_only)
    }

    /// Whether both are in one grant that allows changes.
    pub(super) fn shares_writable_grant(&self, other: &Self) -> bool {
        let theirs = lock(&other.state).grants.clone();
        let mine = lock(&self.state);
        mine.grants.iter().any(|granted| {
            granted.in_force()
                && !granted.grant.read_only
                && theirs.iter().any(|their| Arc::ptr_eq(their, granted))
        })
    }

    /// A handle that is open on it.
    pub(super) fn open_handle(&self) -> Option<Arc<Handle>> {
        lock(&self.state).open.iter().find_map(Weak::upgrade)
    }

    /// The version that the guest was told of last.
    pub(super) fn told(&self) -> Option<Version> {
        lock(&self.state).told
    }

    pub(super) fn tell(&self, version: Version) {
        lock(&self.state).told = Some(version);
    }
}

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) node: Arc<Node>,
    file: OwnedFd,
    _slot: Slot,
    /// Where a directory is being read.
    pub(super) stream: Mutex<Stream>,
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Debug)]
pub(super) struct Tables {
    inner: Mutex<Inner>,
    slots: Slots,
}

#[derive(Debug, Default)]
struct Inner {
    grants: BTreeMap<GrantId, Arc<Granted>>,
    nodes: HashMap<u64, Arc<Node>>,
    by_key: HashMap<Key, u64>,
    handles: HashMap<u64, Arc<Handle>>,
    devices: HashMap<(u32, u32), u64>,
    last_node: u64,
    last_handle: u64,
}

impl Tables {
    /// Tables of a process that may have so many descriptors.
    pub(super) fn new(descriptors: u64) -> Self {
        Self { inner: Mutex::default(), slots: Slots::new(descriptors) }
    }

    pub(super) fn add_grant(&self, grant: Grant, tree: OwnedFd, status: &Statx) -> Result<(), GrantError> {
        let mut inner = lock(&self.inner);
        let id = grant.id.clone();
        if let Some(other) = inner.grants.get(&id) {
            let same = other.grant == grant && other.root == Key::from(status);
            return if same { Ok(()) } else { Err(GrantError::Exists(id)) };
        }
        let differs = |other: &&Arc<Granted>| other.grant.owners != grant.owners;
        if let Some(other) = inner.grants.values().find(differs) {
            return Err(GrantError::OtherOwners { id, other: other.grant.id.clone() });
        }
        let slot = self.slots.for_grant().ok_or_else(|| GrantError::Full(id.clone()))?;
        let (root, tree) = (Key::from(status), Mutex::new(Some((Arc::new(tree), slot))));
        inner.grants.insert(id, Arc::new(Granted { grant, root, tree, revoked: AtomicBool::new(false) }));
        Ok(())
    }

    /// Ends a grant and whatever was reached through it alone; gives the ids of the nodes that are gone.
    pub(super) fn remove_grant(&self, id: &GrantId) -> Option<Vec<u64>> {
        let mut inner = lock(&self.inner);
        let granted = inner.grants.remove(id)?;
        granted.revoked.store(true, Ordering::Release);
        let tree = lock(&granted.tree).take();
        let gone: Vec<u64> =
            inner.nodes.values().filter(|node| !node.in_force()).map(|node| node.id).collect();
        for id in &gone {
            inner.remove_node(*id);
        }
        let (open, closed) = inner.handles.drain().partition(|(_, handle)| handle.node.in_force());
        inner.handles = open;
        drop(inner);
        // Closing can take its time.
        let closed: HashMap<u64, Arc<Handle>> = closed;
        drop((tree, closed));
        Some(gone)
    }

    pub(super) fn grants(&self) -> Vec<Grant> {
        lock(&self.inner).grants.values().map(|granted| granted.grant.clone()).collect()
    }

    pub(super) fn granted(&self, name: &CStr) -> Option<Arc<Granted>> {
        let id = GrantId::try_from(name.to_str().ok()?.to_owned()).ok()?;
        lock(&self.inner).grants.get(&id).cloned()
    }

    pub(super) fn counts(&self) -> (u64, u64) {
        let inner = lock(&self.inner);
        (inner.nodes.len() as u64, inner.handles.len() as u64)
    }

    /// The node with this id.
    pub(super) fn node(&self, id: u64) -> io::Result<Arc<Node>> {
        let node = lock(&self.inner).nodes.get(&id).cloned();
        node.filter(|node| node.in_force()).ok_or_else(|| Errno::STALE.into())
    }

    /// The node of a file that is known already.
    pub(super) fn known(&self, key: Key) -> Option<Arc<Node>> {
        let inner = lock(&self.inner);
        inner.nodes.get(inner.by_key.get(&key)?).cloned()
    }

    /// Counts a look-up of a grant's root.
    pub(super) fn look_up_root(&self, granted: &Arc<Granted>, status: &Statx) -> Arc<Node> {
        lock(&self.inner).look_up(None, status, &[Arc::clone(granted)], granted.grant.owners)
    }

    /// Counts a look-up of a name in a directory.
    pub(super) fn look_up(&self, parent: &Node, name: &CStr, status: &Statx) -> Arc<Node> {
        let grants = lock(&parent.state).grants.clone();
        let seen = Some((parent.id, name.into()));
        lock(&self.inner).look_up(seen, status, &grants, parent.owners)
    }

    /// Takes look-ups back; whether the node is gone.
    pub(super) fn forget(&self, id: u64, count: u64) -> bool {
        let mut inner = lock(&self.inner);
        let Some(node) = inner.nodes.get(&id) else { return false };
        let mut state = lock(&node.state);
        state.lookups = state.lookups.saturating_sub(count);
        let forgotten = state.lookups == 0;
        drop(state);
        if forgotten {
            inner.remove_node(id);
        }
        forgotten
    }

    /// Forgets all nodes and handles: the guest begins anew.
    pub(super) fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.by_key.clear();
        let gone = (std::mem::take(&mut inner.nodes), std::mem::take(&mut inner.handles));
        drop(inner);
        drop(gone);
    }

    /// A place for a handle, to be taken before anything is opened for it.
    pub(super) fn slot(&self) -> Result<Slot, Errno> {
        self.slots.for_guest().ok_or(Errno::NFILE)
    }

    pub(super) fn add_handle(&self, node: &Arc<Node>, file: OwnedFd, slot: Slot) -> u64 {
        let stream = Mutex::default();
        let handle = Arc::new(Handle { node: Arc::clone(node), file, _slot: slot, stream });
        {
            let mut state = lock(&node.state);
            state.open.retain(|weak| weak.strong_count() > 0);
            state.open.push(Arc::downgrade(&handle));
        }
        let mut inner = lock(&self.inner);
        inner.last_handle += 1;
        let id = inner.last_handle;
        inner.handles.insert(id, handle);
        id
    }

    /// The handle with this id, if it is of this node.
    pub(super) fn handle(&self, id: u64, node: u64) -> io::Result<Arc<Handle>> {
        let handle = lock(&self.inner).handles.get(&id).cloned();
        handle.filter(|handle| handle.node.id == node).ok_or_else(|| Errno::BADF.into())
    }

    pub(super) fn remove_handle(&self, id: u64, node: u64) {
        let mut inner = lock(&self.inner);
        let removed = match inner.handles.get(&id) {
            Some(handle) if handle.node.id == node => inner.handles.remove(&id),
            _ => None,
        };
        drop(inner);
        drop(removed);
    }

    /// The inode number to show: the host's on the first device, and one that is another on others, since the guest sees a single device. It is
    /// that as long as the devices are fewer than 65,536 and their file systems number with 48 bits, as nearly all do; beyond that, two files
    /// may show the same number, and programs that look for hard links by it may take them for one.
    pub(super) fn shown_inode(&self, key: Key) -> u64 {
        self.shown_inode_beside(key, key.inode)
    }

    /// The same for another file on the device of this one.
    pub(super) fn shown_inode_beside(&self, key: Key, inode: u64) -> u64 {
        let mut inner = lock(&self.inner);
        let next = inner.devices.len() as u64;
        let number = *inner.devices.entry(key.device).or_insert(next);
        inode ^ (number << 48)
    }
}

impl Inner {
    fn look_up(
        &mut self,
        seen: Option<(u64, Box<CStr>)>,
        status: &Statx,
        grants: &[Arc<Granted>],
        owners: Owners,
    ) -> Arc<Node> {
        let key = Key::from(status);
        let kind = super::sys::kind(status);
        if let Some(node) = self.by_key.get(&key).and_then(|id| self.nodes.get(id)) {
            // An inode number that was used again for something else is another file.
            if node.kind == kind {
                let node = Arc::clone(node);
                let mut state = lock(&node.state);
                state.lookups = state.lookups.saturating_add(1);
                if seen.is_some() {
                    state.seen = seen;
                }
                state.grants.retain(|granted| granted.in_force());
                for granted in grants {
                    if !state.grants.iter().any(|mine| Arc::ptr_eq(mine, granted)) {
                        state.grants.push(Arc::clone(granted));
                    }
                }
                drop(state);
                return node;
            }
        }
        self.last_node = self.last_node.max(ROOT) + 1;
        let state = NodeState { lookups: 1, seen, grants: grants.into(), open: smallvec![], told: None };
        let node = Arc::new(Node { id: self.last_node, key, kind, owners, state: Mutex::new(state) });
        self.nodes.insert(node.id, Arc::clone(&node));
        self.by_key.insert(key, node.id);
        node
    }

    fn remove_node(&mut self, id: u64) {
        if let Some(node) = self.nodes.remove(&id)
            && self.by_key.get(&node.key) == Some(&id)
        {
            self.by_key.remove(&node.key);
        }
    }
}
