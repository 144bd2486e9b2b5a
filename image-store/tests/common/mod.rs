//! What the tests share: tar streams with any entry, made by the `tar` crate, and images read back into a map.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Seek};

use coracle_image_store::erofs::reader::{ErofsReader, Inode, Nid};
use coracle_image_store::{ConvertedLayer, Digest, LayerError, LayerTar, convert_layer};
use tar::{Builder, EntryType, Header};

pub const MAX: u64 = 1 << 30;

/// A tar stream under construction. Paths are written as they are, good or bad.
pub struct Tar(Builder<Vec<u8>>);

impl Default for Tar {
    fn default() -> Self {
        Self::new()
    }
}

impl Tar {
    pub fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    pub fn header(kind: EntryType, mode: u32) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(0);
        header
    }

    pub fn add(mut self, mut header: Header, path: &str, content: &[u8]) -> Self {
        header.set_size(content.len() as u64);
        if path.len() > 100 {
            self.long_name(b'L', path);
        }
        put(&mut header.as_old_mut().name, path);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn long_name(&mut self, flag: u8, text: &str) {
        let mut header = Self::header(EntryType::new(flag), 0);
        put(&mut header.as_old_mut().name, "././@LongLink");
        header.set_size(text.len() as u64 + 1);
        header.set_cksum();
        self.0.append(&header, [text.as_bytes(), b"\0"].concat().as_slice()).unwrap();
    }

    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.add(Self::header(EntryType::Regular, 0o644), path, content)
    }

    pub fn dir(self, path: &str) -> Self {
        self.dir_with_mode(path, 0o755)
    }

    pub fn dir_with_mode(self, path: &str, mode: u32) -> Self {
        self.add(Self::header(EntryType::Directory, mode), path, b"")
    }

    fn linking(mut self, kind: EntryType, path: &str, target: &str) -> Self {
        let mut header = Self::header(kind, 0o777);
        if target.len() > 100 {
            self.long_name(b'K', target);
        }
        put(&mut header.as_old_mut().linkname, target);
        self.add(header, path, b"")
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.linking(EntryType::Symlink, path, target)
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.linking(EntryType::Link, path, target)
    }

    pub fn node(self, kind: EntryType, path: &str, major: u32, minor: u32) -> Self {
        let mut header = Self::header(kind, 0o600);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        self.add(header, path, b"")
    }

    /// Extended header for the next entry.
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn put(field: &mut [u8; 100], text: &str) {
    let length = text.len().min(100);
    field.fill(0);
    field[..length].copy_from_slice(&text.as_bytes()[..length]);
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    flate2::bufread::GzEncoder::new(bytes, flate2::Compression::fast()).read_to_end(&mut packed).unwrap();
    packed
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

/// A layer converted in memory.
#[derive(Debug)]
pub struct Made {
    pub converted: ConvertedLayer,
    pub image: Vec<u8>,
    pub recipe: Vec<u8>,
}

impl Made {
    /// The tar stream, from the image and the recipe.
    pub fn tar(&self) -> std::io::Result<Vec<u8>> {
        let recipe = || Cursor::new(self.recipe.as_slice());
        let mut tar = LayerTar::open(recipe(), recipe(), Cursor::new(&self.image), self.converted.diff_id)?;
        let mut bytes = Vec::new();
        tar.read_to_end(&mut bytes)?;
        assert_eq!(bytes.len() as u64, tar.length());
        Ok(bytes)
    }
}

/// Converts a layer in memory.
pub fn make(blob: &[u8]) -> Result<Made, LayerError> {
    let mut image = Cursor::new(Vec::new());
    let mut recipe = Vec::new();
    let converted = convert_layer(blob, &mut image, &mut recipe, &std::env::temp_dir(), MAX)?;
    assert_eq!(converted.recipe_size, recipe.len() as u64);
    Ok(Made { converted, image: image.into_inner(), recipe })
}

/// Converts a layer in memory.
pub fn convert(blob: &[u8]) -> Result<(ConvertedLayer, Vec<u8>), LayerError> {
    make(blob).map(|made| (made.converted, made.image))
}

/// Converts a layer that must be good, and reads the image back.
pub fn tree_of(blob: &[u8]) -> BTreeMap<String, Seen> {
    let (converted, image) = convert(blob).unwrap();
    assert_eq!(converted.image_size, image.len() as u64);
    walk(Cursor::new(image))
}

/// A whole error chain as text.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// The error of a layer that must be bad.
pub fn refusal(blob: &[u8]) -> String {
    match convert(blob) {
        Ok(_) => panic!("a bad layer was accepted"),
        Err(error) => chain(&error),
    }
}

/// A file in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub nid: Nid,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub links: u32,
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub content: Vec<u8>,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl Seen {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.content).unwrap()
    }

    pub fn is_whiteout(&self) -> bool {
        self.mode & 0o170_000 == 0o020_000 && self.device == (0, 0)
    }

    pub fn is_opaque(&self) -> bool {
        self.xattrs.get("trusted.overlay.opaque").is_some_and(|value| value == b"y")
    }
}

/// All files of an image by path; the root is "".
pub fn walk<R: Read + Seek>(image: R) -> BTreeMap<String, Seen> {
    let mut reader = ErofsReader::open(image).unwrap();
    let mut found = BTreeMap::new();
    let root = reader.root();
    let mut pending = vec![(String::new(), root, root)];
    while let Some((path, nid, parent)) = pending.pop() {
        let inode = reader.inode(nid).unwrap();
        if inode.is_directory() {
            for entry in reader.entries(&inode).unwrap() {
                match entry.name.as_slice() {
                    b"." => assert_eq!(entry.nid, nid),
                    b".." => assert_eq!(entry.nid, parent),
                    name => {
                        let name = String::from_utf8_lossy(name);
                        let child =
                            if path.is_empty() { name.into_owned() } else { format!("{path}/{name}") };
                        pending.push((child, entry.nid, nid));
                    }
                }
            }
        }
        let seen = see(&mut reader, &inode);
        found.insert(path, seen);
    }
    let inodes: std::collections::BTreeSet<_> = found.values().map(|seen| seen.nid).collect();
    assert_eq!(inodes.len() as u64, reader.inode_count());
    found
}

fn see<R: Read + Seek>(reader: &mut ErofsReader<R>, inode: &Inode) -> Seen {
    let kind = inode.mode & 0o170_000;
    let content = match kind {
        0o100_000 => {
            let mut content = vec![0; inode.size as usize];
            let mut filled = 0;
            while filled < content.len() {
                filled += reader.read_at(inode, filled as u64, &mut content[filled..]).unwrap();
            }
            content
        }
        0o120_000 => reader.link_target(inode).unwrap(),
        _ => Vec::new(),
    };
    let xattrs = reader.xattrs(inode).unwrap();
    let xattrs = xattrs.into_iter().map(|(name, value)| (String::from_utf8(name).unwrap(), value)).collect();
    Seen {
        nid: inode.nid,
        mode: inode.mode,
        uid: inode.uid,
        gid: inode.gid,
        links: inode.links,
        mtime: (inode.mtime, inode.mtime_nanoseconds),
        device: if matches!(kind, 0o020_000 | 0o060_000) { inode.device() } else { (0, 0) },
        content,
        xattrs,
    }
}

/// A config for these layers.
pub fn config_for(layers: &[&[u8]], settings: &str) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| format!("\"{}\"", Digest::of(layer))).collect();
    format!(
        r#"{{"architecture":"amd64","os":"linux","created":"2024-05-06T07:08:09Z","config":{{{settings}}},
            "rootfs":{{"type":"layers","diff_ids":[{}]}},"history":[{{"created_by":"COPY"}}]}}"#,
        diff_ids.join(",")
    )
    .into_bytes()
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(",")
}

/// docker-archive as Docker wrote it before version 25.
pub fn docker_archive(tags: &[&str], config: &[u8], layers: &[&[u8]]) -> Vec<u8> {
    let config_name = format!("{}.json", Digest::of(config).hex());
    let names: Vec<_> = (0..layers.len()).map(|n| format!("{n:064}/layer.tar")).collect();
    let tar = layers.iter().zip(&names).fold(Tar::new(), |tar, (layer, name)| {
        let directory = name.trim_end_matches("layer.tar");
        tar.dir(directory).file(&format!("{directory}VERSION"), b"1.0").file(name, layer)
    });
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let manifest = format!(
        r#"[{{"Config":"{config_name}","RepoTags":[{}],"Layers":[{}]}}]"#,
        quoted(tags),
        quoted(&names)
    );
    tar.file(&config_name, config)
        .file("manifest.json", manifest.as_bytes())
        .file("repositories", b"{}")
        .finish()
}

/// An OCI layout under construction.
#[derive(Default)]
pub struct Layout {
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: Vec<String>,
}

impl Layout {
    /// Adds a blob; its descriptor's fields.
    pub fn blob(&mut self, content: &[u8]) -> String {
        let digest = Digest::of(content);
        self.blobs.insert(format!("blobs/sha256/{}", digest.hex()), content.to_vec());
        format!(r#""digest":"{digest}","size":{}"#, content.len())
    }

    /// Adds an image's blobs; its manifest's descriptor's fields.
    pub fn image(&mut self, config: &[u8], blobs: &[&[u8]]) -> String {
        let config = self.blob(config);
        let layers: Vec<_> = blobs.iter().map(|blob| format!("{{{}}}", self.blob(blob))).collect();
        let manifest =
            format!(r#"{{"schemaVersion":2,"config":{{{config}}},"layers":[{}]}}"#, layers.join(","));
        self.blob(manifest.as_bytes())
    }

    /// Adds a descriptor to `index.json`.
    pub fn list(&mut self, descriptor: &str, extra: &str) {
        self.manifests.push(format!("{{{descriptor}{extra}}}"));
    }

    pub fn list_named(&mut self, descriptor: &str, name: &str) {
        self.list(descriptor, &format!(r#","annotations":{{"org.opencontainers.image.ref.name":"{name}"}}"#));
    }

    /// Changes a blob's content but not its name.
    pub fn tamper(&mut self, descriptor: &str, content: &[u8]) {
        let hex = descriptor.split(['"', ':']).find(|word| word.len() == 64).unwrap();
        self.blobs.insert(format!("blobs/sha256/{hex}"), content.to_vec());
    }

    pub fn remove(&mut self, descriptor: &str) {
        let hex = descriptor.split(['"', ':']).find(|word| word.len() == 64).unwrap();
        self.blobs.remove(&format!("blobs/sha256/{hex}"));
    }

    pub fn finish(self) -> Vec<u8> {
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, self.manifests.join(","));
        let tar =
            self.blobs.into_iter().fold(Tar::new().dir("blobs/"), |tar, (path, blob)| tar.file(&path, &blob));
        tar.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
            .file("index.json", index.as_bytes())
            .finish()
    }
}
