//! The one pass over an archive: layers are converted to temporary images as they stream by, JSON documents and links
//! are remembered under their normalised paths, all else is skipped. What is remembered is bounded.

use std::collections::HashMap;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;

use super::{ArchiveError, check_digest};
use crate::digest::Digest;
use crate::layer::{self, ConvertedLayer, LayerError, NewLayer, Packing};
use coracle_tarball::{Entry, EntryKind, TarStream};

const BUFFER: usize = 256 * 1024;
/// A manifest or config is a few kilobytes; Docker's registry limits them to 4 MiB.
const MAX_JSON: u64 = 4 << 20;
const MAX_ALL_JSON: u64 = 64 << 20;
const MAX_ITEMS: usize = 100_000;
const MAX_LINKS_FOLLOWED: usize = 16;
/// Progress is reported about this often, in bytes.
const PROGRESS_STEP: u64 = 1 << 20;

/// How far a layer's conversion is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadProgress {
    /// The layer, by the first 12 characters of its name in the archive.
    pub layer: String,
    /// Bytes of the layer's blob that were read.
    pub current: u64,
    /// Size of the layer's blob.
    pub total: u64,
}

enum Item {
    Json(Vec<u8>),
    Layer(ConvertedLayer),
    Failed(LayerError),
    Link(String),
    Other,
}

/// What the archive holds.
#[derive(Default)]
pub(crate) struct Scan {
    items: HashMap<String, Item>,
    layers: HashMap<Digest, NewLayer>,
    json_bytes: u64,
}

/// Reads the archive to its end. Layers go to temporary files in `scratch`.
pub(crate) fn scan(
    archive: impl Read + Send,
    scratch: &Path,
    max_layer: u64,
    progress: &mut (dyn FnMut(LoadProgress) + Send),
) -> Result<Scan, ArchiveError> {
    let mut archive = BufReader::with_capacity(BUFFER, archive);
    let mut head = Vec::with_capacity(layer::HEAD);
    (&mut archive).take(layer::HEAD as u64).read_to_end(&mut head).map_err(ArchiveError::reading)?;
    let packing = Packing::detect(&head).ok_or(ArchiveError::Unrecognised)?;
    let whole = BufReader::with_capacity(BUFFER, Cursor::new(&head).chain(archive));
    let mut tar = TarStream::new(packing.unpack(whole).map_err(ArchiveError::reading)?);
    let mut scan = Scan::default();
    while let Some(entry) = tar.next_entry()? {
        scan.add(&mut tar, entry, scratch, max_layer, progress)?;
    }
    // The rest matters too: a packed stream's checksum stands at its end, and the sender wants to send it all.
    tar.drain()?;
    Ok(scan)
}

impl Scan {
    fn add<R: Read + Send>(
        &mut self,
        tar: &mut TarStream<R>,
        entry: Entry,
        scratch: &Path,
        max_layer: u64,
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<(), ArchiveError> {
        let path = normalise(&entry.path)?;
        let item = match entry.kind {
            EntryKind::Regular if entry.sparse.is_none() => {
                self.regular(tar, &path, entry.size, scratch, max_layer, progress)?
            }
            EntryKind::Symlink => match beside(&path, &entry.link) {
                Some(target) => Item::Link(target),
                None => Item::Other,
            },
            EntryKind::HardLink => Item::Link(normalise(&entry.link)?),
            EntryKind::Directory => return Ok(()),
            _ => Item::Other,
        };
        if self.items.len() >= MAX_ITEMS {
            return Err(ArchiveError::TooLarge("entries"));
        }
        self.items.insert(path, item);
        Ok(())
    }

    fn regular<R: Read + Send>(
        &mut self,
        tar: &mut TarStream<R>,
        path: &str,
        size: u64,
        scratch: &Path,
        max_layer: u64,
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<Item, ArchiveError> {
        let mut head = Vec::with_capacity(layer::HEAD);
        (&mut *tar).take(layer::HEAD as u64).read_to_end(&mut head).map_err(ArchiveError::reading)?;
        if Packing::detect(&head).is_some() {
            let blob = Cursor::new(&head).chain(tar);
            return self.layer(blob, path, size, scratch, max_layer, progress);
        }
        let starts_like_json = matches!(head.trim_ascii_start().first(), Some(b'{' | b'['));
        if !starts_like_json || size > MAX_JSON {
            return Ok(Item::Other);
        }
        self.json_bytes += size;
        if self.json_bytes > MAX_ALL_JSON {
            return Err(ArchiveError::TooLarge("JSON documents"));
        }
        let mut bytes = head;
        tar.read_to_end(&mut bytes).map_err(ArchiveError::reading)?;
        Ok(Item::Json(bytes))
    }

    fn layer(
        &mut self,
        blob: impl Read + Send,
        path: &str,
        total: u64,
        scratch: &Path,
        max_layer: u64,
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<Item, ArchiveError> {
        let label = label(path);
        let blob = ProgressReader {
            inner: blob,
            read: 0,
            reported: None,
            report: |current| progress(LoadProgress { layer: label.clone(), current, total }),
        };
        match NewLayer::convert(blob, scratch, max_layer) {
            Ok(layer) => {
                let converted = layer.converted;
                self.layers.entry(converted.diff_id).or_insert(layer);
                Ok(Item::Layer(converted))
            }
            Err(source) if source.is_local() => Err(ArchiveError::Layer { name: path.to_owned(), source }),
            // Perhaps it is no layer at all; it matters only if a manifest says that it is one.
            Err(error) => Ok(Item::Failed(error)),
        }
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.items.contains_key(path)
    }

    /// Follows links inside the archive.
    fn real_path(&self, path: &str) -> String {
        let mut path = path;
        for _ in 0..MAX_LINKS_FOLLOWED {
            match self.items.get(path) {
                Some(Item::Link(target)) => path = target,
                _ => break,
            }
        }
        path.to_owned()
    }

    /// A JSON document.
    pub(super) fn json(&self, what: &'static str, path: &str) -> Result<&[u8], ArchiveError> {
        match self.items.get(&self.real_path(path)) {
            Some(Item::Json(bytes)) => Ok(bytes),
            Some(_) => {
                let reason = format!("it is not a JSON document of at most {MAX_JSON} bytes");
                Err(ArchiveError::Invalid { path: path.to_owned(), reason })
            }
            None => Err(ArchiveError::Missing { what, path: path.to_owned() }),
        }
    }

    /// What the layer at `path` turned out to be, if it is in the archive and usable.
    pub(super) fn converted(&self, path: &str) -> Option<ConvertedLayer> {
        match self.items.get(&self.real_path(path)) {
            Some(Item::Layer(converted)) => Some(*converted),
            _ => None,
        }
    }

    /// The layer at `path`, must have this diff id, or be stored already.
    pub(super) fn check_layer(
        &mut self,
        path: &str,
        diff_id: &Digest,
        is_stored: &dyn Fn(&Digest) -> bool,
    ) -> Result<(), ArchiveError> {
        let real = self.real_path(path);
        let unusable = |source| ArchiveError::Layer { name: path.to_owned(), source };
        if let Some(Item::Failed(_)) = self.items.get(&real)
            && let Some(Item::Failed(error)) = self.items.remove(&real)
        {
            return Err(unusable(error));
        }
        match self.items.get(&real) {
            Some(Item::Layer(converted)) => {
                check_digest(|| format!("layer `{path}` (uncompressed)"), diff_id, &converted.diff_id)?;
                Ok(())
            }
            Some(_) => Err(unusable(LayerError::Unrecognised)),
            None if is_stored(diff_id) => Ok(()),
            None => Err(ArchiveError::Missing { what: "layer", path: path.to_owned() }),
        }
    }

    /// The converted layers by diff id.
    pub(crate) fn into_layers(self) -> HashMap<Digest, NewLayer> {
        self.layers
    }
}

/// Where OCI layouts keep blobs.
pub(super) fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The digest that a path in `blobs/sha256/` promises.
pub(super) fn digest_of_blob_path(path: &str) -> Option<Digest> {
    path.strip_prefix("blobs/sha256/").and_then(|hex| Digest::from_hex(hex).ok())
}

/// A path relative to the archive's root.
fn normalise(raw: &[u8]) -> Result<String, ArchiveError> {
    let refused = |reason| ArchiveError::Entry { path: crate::erofs::display_path(raw), reason };
    let text = std::str::from_utf8(raw).map_err(|_| refused("its path is not UTF-8"))?;
    if text.len() > 4096 {
        return Err(refused("its path is too long"));
    }
    let parts: Vec<_> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(refused("its path contains `..`"));
    }
    Ok(parts.join("/"))
}

/// Where a symbolic link at `path` leads; `None` if out of the archive.
fn beside(path: &str, target: &[u8]) -> Option<String> {
    let target =
        std::str::from_utf8(target).ok().filter(|target| target.len() <= 4096 && !target.starts_with('/'))?;
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// The layer's hash if its path has one, as progress is shown under it.
fn label(path: &str) -> String {
    let longest = path.split(['/', '.']).max_by_key(|part| part.len()).unwrap_or(path);
    longest.chars().take(12).collect()
}

/// Reports how much was read: at the start, now and then, and at the end.
struct ProgressReader<R, F> {
    inner: R,
    read: u64,
    reported: Option<u64>,
    report: F,
}

impl<R: Read, F: FnMut(u64)> Read for ProgressReader<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read += read as u64;
        let is_due = match self.reported {
            None => true,
            Some(reported) if read == 0 => reported != self.read,
            Some(reported) => self.read - reported >= PROGRESS_STEP,
        };
        if is_due {
            self.reported = Some(self.read);
            (self.report)(self.read);
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_resolve_inside_the_archive_only() {
        assert_eq!(beside("a/layer.tar", b"../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(beside("a/layer.tar", b"../x.tar").as_deref(), Some("x.tar"));
        assert_eq!(beside("a/layer.tar", b"../../x.tar"), None);
        assert_eq!(beside("a/layer.tar", b"/etc/passwd"), None);
        assert!(normalise(b"../x").is_err());
        assert_eq!(normalise(b"/./a//b").unwrap(), "a/b");
    }

    #[test]
    fn progress_is_labelled_by_the_hash() {
        assert_eq!(label(&format!("blobs/sha256/{}", "ab".repeat(32))), "abababababab");
        assert_eq!(label(&format!("{}/layer.tar", "cd".repeat(32))), "cdcdcdcdcdcd");
        assert_eq!(label(&format!("{}.tar", "ef".repeat(32))), "efefefefefef");
    }
}
