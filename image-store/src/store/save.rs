//! Images as an archive: an OCI image layout which is a docker-archive too, as Docker writes it since version 25, so
//! that Docker, podman and skopeo load it. Layers are plain tar streams; nothing is written to disk for it.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read, Write};

use coracle_tarball::{Entry, EntryKind, Mtime, TarWriter};
use serde_json::{Value, json};

use super::{Error, Image, ImageStore, PinnedLayers};
use crate::digest::{Digest, ImageId};
use crate::reference::Reference;

const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// Images that are about to be written as an archive. Their layers stay until it is dropped.
#[derive(Debug)]
pub struct ImageArchive<'a> {
    store: &'a ImageStore,
    images: Vec<(Image, Vec<Reference>)>,
    _layers: PinnedLayers<'a>,
}

impl ImageStore {
    /// Finds what is to be saved: an image by a tag (which is saved too), by its repository (with all its tags there)
    /// or by its id (without a name).
    pub fn save(&self, names: &[String]) -> Result<ImageArchive<'_>, Error> {
        let _changes = self.lock();
        let known = self.db.names()?;
        let mut wanted: Vec<(ImageId, Vec<Reference>)> = Vec::new();
        let mut want = |id: ImageId, tag: Option<Reference>| {
            let index = wanted.iter().position(|(known, _)| *known == id).unwrap_or_else(|| {
                wanted.push((id, Vec::new()));
                wanted.len() - 1
            });
            let tags = &mut wanted[index].1;
            tags.extend(tag.filter(|tag| !tags.contains(tag)));
        };
        for name in names {
            let reference = Reference::parse(name).ok();
            if let Some(reference) = reference.as_ref().filter(|_| is_name_only(name)) {
                let repository = reference.canonical_name();
                let tags: Vec<_> =
                    known.tags.iter().filter(|(tag, _)| tag.canonical_name() == repository).collect();
                tags.iter().for_each(|(tag, id)| want(*id, Some(tag.clone())));
                if !tags.is_empty() {
                    continue;
                }
            }
            let id = self.resolve(name)?;
            let is_known =
                |tag: &Reference| known.tags.iter().any(|(known, owner)| known == tag && *owner == id);
            want(id, reference.filter(is_known));
        }
        let images: Vec<_> = wanted
            .into_iter()
            .map(|(id, tags)| Ok((self.image(&id)?, tags)))
            .collect::<Result<_, Error>>()?;
        let layers = images.iter().flat_map(|(image, _)| &image.layers).map(|layer| layer.diff_id);
        let pinned = self.pin(layers.collect::<HashSet<_>>());
        Ok(ImageArchive { store: self, images, _layers: pinned })
    }
}

/// Neither tag nor digest.
fn is_name_only(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    !last.contains([':', '@'])
}

impl ImageArchive<'_> {
    /// The images' ids.
    pub fn ids(&self) -> impl Iterator<Item = ImageId> {
        self.images.iter().map(|(image, _)| image.id)
    }

    /// Writes the archive.
    pub fn write_to(&self, out: impl Write) -> Result<(), Error> {
        let failed = |source| Error::Stream { action: "write the archive", source };
        let mut archive = ArchiveWriter { tar: TarWriter::new(out), written: HashSet::new() };
        archive.directory("blobs/").map_err(failed)?;
        archive.directory("blobs/sha256/").map_err(failed)?;
        let (mut manifests, mut descriptors) = (Vec::new(), Vec::new());
        let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for (image, tags) in &self.images {
            let layers = self.write_layers(image, &mut archive)?;
            archive.blob(image.id.digest(), &image.config_raw).map_err(failed)?;
            let config = descriptor(CONFIG_TYPE, image.id.digest(), image.config_raw.len() as u64);
            let manifest = json!({
                "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers,
            });
            let manifest = manifest.to_string().into_bytes();
            let digest = Digest::of(&manifest);
            archive.blob(&digest, &manifest).map_err(failed)?;
            descriptors.extend(index_entries(image, tags, &digest, manifest.len() as u64));
            manifests.push(docker_manifest(image, tags, &layers));
            if let Some(top) = image.layers.last() {
                for tag in tags {
                    let tags = repositories.entry(tag.familiar_name()).or_default();
                    tags.insert(tag.tag().unwrap_or_default().to_owned(), top.diff_id.hex());
                }
            }
        }
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": descriptors });
        archive.document("index.json", &index).map_err(failed)?;
        archive.document("manifest.json", &json!(manifests)).map_err(failed)?;
        archive.document("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" })).map_err(failed)?;
        if !repositories.is_empty() {
            archive.document("repositories", &json!(repositories)).map_err(failed)?;
        }
        archive.tar.finish().map(drop).map_err(failed)
    }

    /// The layers that are not in the archive yet; the descriptors of all.
    fn write_layers<W: Write>(
        &self,
        image: &Image,
        archive: &mut ArchiveWriter<W>,
    ) -> Result<Vec<Value>, Error> {
        let mut descriptors = Vec::new();
        for layer in &image.layers {
            let tar = self.store.layer_tar(&layer.diff_id)?;
            descriptors.push(descriptor(LAYER_TYPE, &layer.diff_id, tar.length()));
            let written = archive.blob_of(&layer.diff_id, tar.length(), tar);
            written.map_err(|source| Error::Stream { action: "write a layer into the archive", source })?;
        }
        Ok(descriptors)
    }
}

fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size })
}

/// The entries of `index.json`: one for each tag, or one without a name.
fn index_entries(image: &Image, tags: &[Reference], manifest: &Digest, size: u64) -> Vec<Value> {
    let entry = |annotations: Option<Value>| {
        let mut entry = descriptor(MANIFEST_TYPE, manifest, size);
        entry["platform"] = json!(image.platform);
        if let Some(annotations) = annotations {
            entry["annotations"] = annotations;
        }
        entry
    };
    if tags.is_empty() {
        return vec![entry(None)];
    }
    let annotations = |tag: &Reference| {
        json!({
            "io.containerd.image.name": tag.canonical(),
            "org.opencontainers.image.ref.name": tag.tag().unwrap_or_default(),
        })
    };
    tags.iter().map(|tag| entry(Some(annotations(tag)))).collect()
}

/// The image's entry in `manifest.json`.
fn docker_manifest(image: &Image, tags: &[Reference], layers: &[Value]) -> Value {
    let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
    let sources: BTreeMap<_, _> =
        image.layers.iter().zip(layers).map(|(layer, source)| (layer.diff_id.to_string(), source)).collect();
    let tags: Option<Vec<_>> = (!tags.is_empty()).then(|| tags.iter().map(ToString::to_string).collect());
    json!({
        "Config": path(image.id.digest()),
        "RepoTags": tags,
        "Layers": image.layers.iter().map(|layer| path(&layer.diff_id)).collect::<Vec<_>>(),
        "LayerSources": sources,
    })
}

struct ArchiveWriter<W: Write> {
    tar: TarWriter<W>,
    written: HashSet<Digest>,
}

impl<W: Write> ArchiveWriter<W> {
    fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(EntryKind::Directory, 0o755, path, 0, io::empty())
    }

    fn document(&mut self, path: &str, content: &Value) -> io::Result<()> {
        let bytes = content.to_string();
        self.entry(EntryKind::Regular, 0o644, path, bytes.len() as u64, bytes.as_bytes())
    }

    fn blob(&mut self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        self.blob_of(digest, bytes.len() as u64, bytes)
    }

    /// A blob, unless it is there already.
    fn blob_of(&mut self, digest: &Digest, size: u64, content: impl Read) -> io::Result<()> {
        if !self.written.insert(*digest) {
            return Ok(());
        }
        let path = format!("blobs/sha256/{}", digest.hex());
        self.entry(EntryKind::Regular, 0o644, &path, size, content)
    }

    /// Equal archives for equal images: no times, no owners.
    fn entry(
        &mut self,
        kind: EntryKind,
        mode: u16,
        path: &str,
        size: u64,
        content: impl Read,
    ) -> io::Result<()> {
        let entry = Entry {
            path: path.into(),
            link: Vec::new(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: Mtime::default(),
            device: (0, 0),
            size,
            xattrs: Vec::new(),
            sparse: None,
        };
        self.tar.append(&entry, content)
    }
}
