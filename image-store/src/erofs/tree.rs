//! The tree of a layer while its tar stream is read: names, metadata and where file data went. It keeps the rules of
//! tar extraction (the last entry of a name wins, directories merge, hard links share an inode) and of layers
//! (whiteouts and opaque directories as overlay wants them).

use std::collections::BTreeMap;

use super::format::{MODE_CHAR, MODE_DIR, MODE_REGULAR, MODE_SYMLINK};
use super::path::LayerPath;
use super::xattr;
use coracle_tarball::Mtime;

/// An estimate of the bytes that a node takes besides its variable parts.
const NODE_COST: usize = 160;
/// The tree may take about this much memory; about five million entries.
const MAX_COST: usize = 1 << 30;

/// Index of a node in its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId(u32);

/// What all kinds of files have.
#[derive(Debug, Default)]
pub(super) struct Meta {
    /// Permission bits with setuid, setgid and sticky.
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Mtime,
    pub(super) xattrs: xattr::Encoded,
}

impl Meta {
    /// A directory that only other entries' paths name.
    fn implied_directory() -> Self {
        Self { permissions: 0o755, ..Self::default() }
    }
}

#[derive(Debug)]
pub(super) struct Directory {
    pub(super) children: BTreeMap<Box<[u8]>, NodeId>,
    pub(super) parent: NodeId,
    /// Hides what lower layers have in this directory.
    pub(super) opaque: bool,
}

#[derive(Debug)]
pub(super) enum Kind {
    Directory(Box<Directory>),
    File {
        first_block: u32,
        size: u64,
        /// Where the end that stands behind the inode waits for it.
        tail: Option<u64>,
    },
    Symlink(Box<[u8]>),
    /// Devices and fifos: the type bits of the mode and the encoded device number.
    Special {
        type_bits: u16,
        device: u32,
    },
    /// Replaced by a later entry.
    Removed,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) meta: Meta,
    pub(super) kind: Kind,
    pub(super) links: u32,
    /// Set when the image is laid out.
    pub(super) nid: u64,
}

impl Node {
    /// Type and permissions.
    pub(super) fn mode(&self) -> u16 {
        let type_bits = match &self.kind {
            Kind::Directory(_) => MODE_DIR,
            Kind::File { .. } | Kind::Removed => MODE_REGULAR,
            Kind::Symlink(_) => MODE_SYMLINK,
            Kind::Special { type_bits, .. } => *type_bits,
        };
        type_bits | self.meta.permissions
    }

    pub(super) fn is_whiteout(&self) -> bool {
        matches!(self.kind, Kind::Special { type_bits: MODE_CHAR, device: 0 })
    }
}

pub(super) struct Tree {
    nodes: Vec<Node>,
    cost: usize,
}

impl Tree {
    pub(super) const ROOT: NodeId = NodeId(0);

    pub(super) fn new() -> Self {
        let mut tree = Self { nodes: Vec::new(), cost: 0 };
        tree.nodes.push(Node {
            meta: Meta::implied_directory(),
            kind: empty_directory(Self::ROOT, false),
            links: 1,
            nid: 0,
        });
        tree
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    fn directory(&self, id: NodeId) -> Option<&Directory> {
        match &self.node(id).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn directory_mut(&mut self, id: NodeId) -> Option<&mut Directory> {
        match &mut self.node_mut(id).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.directory(parent)?.children.get(name).copied()
    }

    /// The directory at this path; missing ones are made, as extraction would.
    pub(super) fn make_directories(&mut self, components: &[&[u8]]) -> Result<NodeId, String> {
        let mut current = Self::ROOT;
        for name in components {
            current = match self.child(current, name) {
                Some(child) if self.directory(child).is_some() => child,
                Some(child) if !self.node(child).is_whiteout() => {
                    let what = match self.node(child).kind {
                        Kind::Symlink(_) => "a symbolic link",
                        _ => "not a directory",
                    };
                    return Err(format!(
                        "its parent `{}` is {what} in the same layer",
                        super::path::display(name)
                    ));
                }
                _ => self.put_directory(current, name, Meta::implied_directory())?,
            };
        }
        Ok(current)
    }

    /// Sets a directory's metadata, making it if it is not there.
    pub(super) fn put_directory(
        &mut self,
        parent: NodeId,
        name: &[u8],
        meta: Meta,
    ) -> Result<NodeId, String> {
        if let Some(existing) = self.child(parent, name)
            && self.directory(existing).is_some()
        {
            self.node_mut(existing).meta = meta;
            return Ok(existing);
        }
        // What was deleted and made again has nothing of what lower layers had.
        let opaque = self.child(parent, name).is_some_and(|existing| self.node(existing).is_whiteout());
        self.put(parent, name, meta, empty_directory(parent, opaque))
    }

    /// Puts a file of any kind; replaces what had this name.
    pub(super) fn put(
        &mut self,
        parent: NodeId,
        name: &[u8],
        meta: Meta,
        kind: Kind,
    ) -> Result<NodeId, String> {
        let variable = meta.xattrs.len() + if let Kind::Symlink(target) = &kind { target.len() } else { 0 };
        self.charge(NODE_COST + variable)?;
        let id = NodeId(u32::try_from(self.nodes.len()).map_err(|_| "the layer has too many entries")?);
        self.nodes.push(Node { meta, kind, links: 0, nid: 0 });
        self.attach(parent, name, id)?;
        Ok(id)
    }

    /// Marks `name` as deleted from lower layers. What this layer itself puts there stays, as whiteouts only concern
    /// lower layers.
    pub(super) fn put_whiteout(&mut self, parent: NodeId, name: &[u8]) -> Result<(), String> {
        match self.child(parent, name) {
            Some(existing) => {
                if let Some(directory) = self.directory_mut(existing) {
                    directory.opaque = true;
                }
            }
            None => {
                let whiteout = Kind::Special { type_bits: MODE_CHAR, device: 0 };
                self.put(parent, name, Meta::default(), whiteout)?;
            }
        }
        Ok(())
    }

    /// Hides what lower layers have in this directory.
    pub(super) fn set_opaque(&mut self, id: NodeId) {
        if let Some(directory) = self.directory_mut(id) {
            directory.opaque = true;
        }
    }

    /// Gives the file at `target` another name.
    pub(super) fn link(&mut self, parent: NodeId, name: &[u8], target: &LayerPath<'_>) -> Result<(), String> {
        let found =
            target.components().iter().try_fold(Self::ROOT, |current, name| self.child(current, name));
        let Some(id) = found.filter(|id| !self.node(*id).is_whiteout()) else {
            return Err("its hard link target is not in the layer".to_owned());
        };
        if self.directory(id).is_some() {
            return Err("its hard link target is a directory".to_owned());
        }
        if self.child(parent, name) == Some(id) {
            return Ok(());
        }
        self.attach(parent, name, id)
    }

    fn attach(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<(), String> {
        self.charge(name.len())?;
        let directory = self.directory_mut(parent).ok_or("its parent is not a directory")?;
        let replaced = directory.children.insert(name.into(), id);
        self.node_mut(id).links += 1;
        if let Some(replaced) = replaced {
            self.detach(replaced);
        }
        Ok(())
    }

    /// Takes one name from a file, or a directory with all in it. Not recursive: trees can be deep.
    fn detach(&mut self, id: NodeId) {
        let mut pending = vec![id];
        while let Some(id) = pending.pop() {
            let node = self.node_mut(id);
            node.links -= 1;
            if node.links > 0 {
                continue;
            }
            node.meta.xattrs = xattr::Encoded::default();
            if let Kind::Directory(directory) = std::mem::replace(&mut node.kind, Kind::Removed) {
                pending.extend(directory.children.into_values());
            }
        }
    }

    fn charge(&mut self, cost: usize) -> Result<(), String> {
        self.cost = self.cost.saturating_add(cost);
        if self.cost > MAX_COST { Err("the layer has too many entries".to_owned()) } else { Ok(()) }
    }

    /// All nodes that have a name, each once: a directory's children stand together, so that listing it reads few
    /// blocks.
    pub(super) fn in_layout_order(&self) -> Vec<NodeId> {
        let mut seen = vec![false; self.nodes.len()];
        let mut order = vec![Self::ROOT];
        let mut pending = vec![Self::ROOT];
        while let Some(id) = pending.pop() {
            let Some(directory) = self.directory(id) else { continue };
            for child in directory.children.values() {
                if !std::mem::replace(&mut seen[child.0 as usize], true) {
                    order.push(*child);
                }
            }
            pending
                .extend(directory.children.values().rev().filter(|child| self.directory(**child).is_some()));
        }
        order
    }

    /// A directory needs to be marked for overlay if it is opaque or holds whiteouts: without an (empty) origin mark
    /// overlay would list the whiteouts of an unmerged directory as files.
    pub(super) fn mark_for_overlay(&mut self, id: NodeId) -> Result<(), &'static str> {
        let Some(directory) = self.directory(id) else { return Ok(()) };
        let mut marks = Vec::new();
        if directory.opaque {
            marks.push(xattr::overlay_mark("opaque", b"y"));
        }
        if directory.children.values().any(|child| self.node(*child).is_whiteout()) {
            marks.push(xattr::overlay_mark("origin", b""));
        }
        if marks.is_empty() {
            return Ok(());
        }
        xattr::append(&mut self.node_mut(id).meta.xattrs, &marks)
    }
}

pub(super) fn empty_directory(parent: NodeId, opaque: bool) -> Kind {
    Kind::Directory(Box::new(Directory { children: BTreeMap::new(), parent, opaque }))
}
