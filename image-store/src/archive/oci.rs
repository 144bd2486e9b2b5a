//! OCI image layout: an `index.json` whose descriptors lead, perhaps through nested indexes, to manifests, and these
//! to configs and layers, all of them blobs named by their digest.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::scan::blob_path;
use super::{ArchiveError, ResolvedImage, Scan, check_digest, check_layer_count, parse_config, parse_json};
use crate::config::{Platform, or_default};
use crate::digest::Digest;
use crate::reference::Reference;

pub(super) const INDEX: &str = "index.json";
const MAX_NESTING: usize = 8;
const MAX_MANIFESTS: usize = 4096;
/// Names that tools put on descriptors; containerd's is the full one.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
const OCI_NAME: &str = "org.opencontainers.image.ref.name";
/// buildx marks attestations, which are no images.
const ATTESTATION: &str = "vnd.docker.reference.type";

#[derive(Clone, Deserialize)]
struct Descriptor {
    digest: Digest,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// A blob that a descriptor of an index may lead to.
#[derive(Deserialize)]
struct ManifestOrIndex {
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
}

pub(super) fn resolve(
    scan: &mut Scan,
    is_stored: &dyn Fn(&Digest) -> bool,
) -> Result<Vec<ResolvedImage>, ArchiveError> {
    let index: Index = parse_json(INDEX, scan.json("the index", INDEX)?)?;
    if index.manifests.len() > MAX_MANIFESTS {
        return Err(ArchiveError::TooLarge("manifests"));
    }
    let mut groups: BTreeMap<Option<String>, Vec<Descriptor>> = BTreeMap::new();
    for descriptor in index.manifests.into_iter().filter(is_image) {
        groups.entry(name(&descriptor)).or_default().push(descriptor);
    }
    let mut images: Vec<ResolvedImage> = Vec::new();
    for (name, descriptors) in groups {
        let tag = name.and_then(|name| Reference::parse(&name).ok()).and_then(|name| name.tag_only());
        for descriptor in host_platform_or_all(descriptors) {
            let mut image = resolve_descriptor(scan, &descriptor, is_stored, MAX_NESTING)?;
            image.tags.extend(tag.clone());
            match images.iter_mut().find(|other| other.config_raw == image.config_raw) {
                Some(same) => same.tags.append(&mut image.tags),
                None => images.push(image),
            }
        }
    }
    Ok(images)
}

fn is_image(descriptor: &Descriptor) -> bool {
    let is_attestation = descriptor.annotations.contains_key(ATTESTATION)
        || descriptor.platform.as_ref().is_some_and(|platform| platform.architecture == "unknown");
    !is_attestation
}

fn name(descriptor: &Descriptor) -> Option<String> {
    descriptor.annotations.get(CONTAINERD_NAME).or_else(|| descriptor.annotations.get(OCI_NAME)).cloned()
}

/// Of several descriptors with one name, those for this machine if there are any.
fn host_platform_or_all(descriptors: Vec<Descriptor>) -> Vec<Descriptor> {
    let is_ours = |descriptor: &Descriptor| descriptor.platform.as_ref().is_some_and(Platform::runs_on_host);
    match descriptors.iter().any(is_ours) {
        true => descriptors.into_iter().filter(is_ours).collect(),
        false => descriptors,
    }
}

/// From a descriptor of an index to the image, through nested indexes.
fn resolve_descriptor(
    scan: &mut Scan,
    descriptor: &Descriptor,
    is_stored: &dyn Fn(&Digest) -> bool,
    nesting: usize,
) -> Result<ResolvedImage, ArchiveError> {
    let path = blob_path(&descriptor.digest);
    let bytes = blob(scan, "the manifest", descriptor)?;
    let kind: ManifestOrIndex = parse_json(&path, bytes)?;
    if kind.manifests.is_none() {
        let manifest = bytes.to_vec();
        return resolve_manifest(scan, &path, manifest, is_stored);
    }
    let invalid = |reason: &str| ArchiveError::Invalid { path: path.clone(), reason: reason.to_owned() };
    if nesting == 0 {
        return Err(invalid("indexes are nested too deeply"));
    }
    let index: Index = parse_json(&path, bytes)?;
    // Archives may hold only some of an index's platforms.
    let present = |descriptor: &Descriptor| scan.has(&blob_path(&descriptor.digest));
    let candidates: Vec<_> = index.manifests.into_iter().filter(is_image).filter(present).collect();
    let chosen = host_platform_or_all(candidates).into_iter().next();
    let chosen = chosen.ok_or_else(|| invalid("none of the images in this index is in the archive"))?;
    resolve_descriptor(scan, &chosen, is_stored, nesting - 1)
}

fn resolve_manifest(
    scan: &mut Scan,
    path: &str,
    manifest_raw: Vec<u8>,
    is_stored: &dyn Fn(&Digest) -> bool,
) -> Result<ResolvedImage, ArchiveError> {
    let manifest: Manifest = parse_json(path, &manifest_raw)?;
    let config_raw = blob(scan, "the image config", &manifest.config)?.to_vec();
    let config = parse_config(&blob_path(&manifest.config.digest), &config_raw)?;
    check_layer_count(path, manifest.layers.len(), &config)?;
    for (descriptor, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
        let layer_path = blob_path(&descriptor.digest);
        if let Some(layer) = scan.converted(&layer_path) {
            check_size(&layer_path, descriptor.size, layer.blob_size)?;
            check_digest(|| format!("layer `{layer_path}`"), &descriptor.digest, &layer.blob)?;
        }
        scan.check_layer(&layer_path, diff_id, is_stored)?;
    }
    Ok(ResolvedImage { config_raw, config, manifest: Some(manifest_raw), tags: Vec::new() })
}

/// A JSON blob that matches its descriptor.
fn blob<'a>(scan: &'a Scan, what: &'static str, descriptor: &Descriptor) -> Result<&'a [u8], ArchiveError> {
    let path = blob_path(&descriptor.digest);
    let bytes = scan.json(what, &path)?;
    check_size(&path, descriptor.size, bytes.len() as u64)?;
    check_digest(|| format!("{what} `{path}`"), &descriptor.digest, &Digest::of(bytes))?;
    Ok(bytes)
}

fn check_size(path: &str, expected: u64, found: u64) -> Result<(), ArchiveError> {
    if expected == found {
        return Ok(());
    }
    Err(ArchiveError::SizeMismatch { what: format!("`{path}`"), expected, found })
}
