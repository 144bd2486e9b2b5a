//! docker-archive: a `manifest.json` that lists configs, tags and layer files by their paths in the archive. Old
//! ones hold `<id>/layer.tar`, new ones `blobs/sha256/<hex>`.

use serde::Deserialize;

use super::scan::digest_of_blob_path;
use super::{ArchiveError, ResolvedImage, Scan, check_digest, check_layer_count, parse_config, parse_json};
use crate::config::or_default;
use crate::digest::Digest;
use crate::reference::Reference;

pub(super) const MANIFEST: &str = "manifest.json";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ManifestItem {
    config: String,
    #[serde(default, deserialize_with = "or_default")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    layers: Vec<String>,
}

pub(super) fn resolve(
    scan: &mut Scan,
    is_stored: &dyn Fn(&Digest) -> bool,
) -> Result<Vec<ResolvedImage>, ArchiveError> {
    let items: Vec<ManifestItem> = parse_json(MANIFEST, scan.json("the manifest", MANIFEST)?)?;
    items.into_iter().map(|item| resolve_item(scan, item, is_stored)).collect()
}

fn resolve_item(
    scan: &mut Scan,
    item: ManifestItem,
    is_stored: &dyn Fn(&Digest) -> bool,
) -> Result<ResolvedImage, ArchiveError> {
    let config_raw = scan.json("the image config", &item.config)?.to_vec();
    if let Some(expected) = promised_digest(&item.config) {
        check_digest(|| format!("image config `{}`", item.config), &expected, &Digest::of(&config_raw))?;
    }
    let config = parse_config(&item.config, &config_raw)?;
    check_layer_count(MANIFEST, item.layers.len(), &config)?;
    for (path, diff_id) in item.layers.iter().zip(&config.rootfs.diff_ids) {
        if let (Some(layer), Some(expected)) = (scan.converted(path), digest_of_blob_path(path)) {
            check_digest(|| format!("layer `{path}`"), &expected, &layer.blob)?;
        }
        scan.check_layer(path, diff_id, is_stored)?;
    }
    let tags = item.repo_tags.iter().map(|tag| parse_tag(tag)).collect::<Result<_, _>>()?;
    Ok(ResolvedImage { config_raw, config, manifest: None, tags })
}

fn parse_tag(text: &str) -> Result<Reference, ArchiveError> {
    let reference = Reference::parse(text)?;
    if reference.digest().is_none() {
        return Ok(reference);
    }
    let reason = format!("the tag `{reference}` contains a digest");
    Err(ArchiveError::Invalid { path: MANIFEST.to_owned(), reason })
}

/// Configs are named by their digest: `blobs/sha256/<hex>` or `<hex>.json`.
fn promised_digest(path: &str) -> Option<Digest> {
    let hex = path.strip_suffix(".json").and_then(|hex| Digest::from_hex(hex).ok());
    digest_of_blob_path(path).or(hex)
}
