//! Image archives: those that `cargo xtask` made with skopeo and umoci, and small ones with faults that no tool would make.

use std::{env, path::PathBuf};

use sha2::{Digest, Sha256};

use crate::workspace;

/// The folder with the archives that `cargo xtask` made: `CORACLE_IMAGES`, or `target/images`.
pub fn images_dir() -> PathBuf {
    env::var_os("CORACLE_IMAGES").map_or_else(|| workspace().join("target/images"), PathBuf::from)
}

/// One of them by its file name.
pub fn image_archive(name: &str) -> PathBuf {
    let path = images_dir().join(name);
    assert!(path.is_file(), "{} is not there: `cargo xtask test` makes it", path.display());
    path
}

/// An entry of a layer that a test makes.
#[derive(Debug, Clone)]
pub enum Entry<'a> {
    /// A regular file with these bytes.
    File(&'a str, &'a [u8]),
    /// A directory.
    Folder(&'a str),
    /// A symbolic link and its target.
    Symlink(&'a str, &'a str),
    /// A hard link and its target.
    Hardlink(&'a str, &'a str),
}

/// A layer's tar stream. Names are written as they are, whatever they say.
fn layer(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_ustar();
        let (name, kind, target, data): (&str, _, &str, &[u8]) = match *entry {
            Entry::File(name, data) => (name, tar::EntryType::Regular, "", data),
            Entry::Folder(name) => (name, tar::EntryType::Directory, "", b""),
            Entry::Symlink(name, target) => (name, tar::EntryType::Symlink, target, b""),
            Entry::Hardlink(name, target) => (name, tar::EntryType::Link, target, b""),
        };
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(data.len() as u64);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, data).expect("writing to memory");
    }
    builder.into_inner().expect("writing to memory")
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// An OCI layout archive with one image `name` of one layer with these entries; `change` may spoil its parts.
pub fn oci_archive_with(name: &str, entries: &[Entry<'_>], change: impl FnOnce(&mut Parts)) -> Vec<u8> {
    let layer = layer(entries);
    let mut parts = Parts { diff_id: sha256(&layer), layer, architecture: "amd64".to_owned() };
    change(&mut parts);
    let layer_digest = sha256(&parts.layer);
    let config = serde_json::json!({
        "architecture": parts.architecture,
        "os": "linux",
        "config": { "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", parts.diff_id)] },
    })
    .to_string();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": format!("sha256:{}", sha256(config.as_bytes())),
            "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": format!("sha256:{layer_digest}"),
            "size": parts.layer.len(),
        }],
    })
    .to_string();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{}", sha256(manifest.as_bytes())),
            "size": manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": name, "io.containerd.image.name": name },
        }],
    })
    .to_string();
    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |path: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, bytes).expect("writing to memory");
    };
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    add(&format!("blobs/sha256/{layer_digest}"), &parts.layer);
    add(&format!("blobs/sha256/{}", sha256(config.as_bytes())), config.as_bytes());
    add(&format!("blobs/sha256/{}", sha256(manifest.as_bytes())), manifest.as_bytes());
    add("index.json", index.as_bytes());
    archive.into_inner().expect("writing to memory")
}

/// What a test can spoil in an archive.
#[derive(Debug)]
pub struct Parts {
    /// The layer as it stands in the archive.
    pub layer: Vec<u8>,
    /// What the config says of the layer's uncompressed digest, in hexadecimal.
    pub diff_id: String,
    /// What the config says of the machine.
    pub architecture: String,
}
