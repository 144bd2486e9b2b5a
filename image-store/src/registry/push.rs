//! A push: each layer is looked for in the repository, mounted from another one, or sent; then the config, and at last the
//! manifest, which makes the image count. What the store keeps is no blob: a layer that the registry lacks is packed anew,
//! the same way each time.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use http::header::{self, HeaderValue};
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Full};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use super::error::RegistryError;
use super::http_client::Body;
use super::manifest::{
    DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, Descriptor, Document, OCI_MANIFEST, render,
};
use super::pull::blocking;
use super::repository::Repository;
use super::session::Credentials;
use super::settings::RegistrySettings;
use super::upload::{FileBody, Upload, put_manifest};
use super::{Registries, open_first};
use crate::digest::{Digest, ImageId};
use crate::reference::Reference;
use crate::store::{Image, KnownBlob};

/// How many layers are pushed at the same time.
const PARALLEL: usize = 3;
/// Mounts are tried from this many repositories.
const MAX_MOUNTS: usize = 4;
const INTERVAL: Duration = Duration::from_millis(100);

/// How far one layer is, in Docker's words.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are Docker's own words")]
pub enum PushStatus {
    Preparing,
    Waiting,
    Pushing { current: u64, total: u64 },
    Pushed,
    LayerAlreadyExists,
    MountedFrom(String),
}

/// What happens during a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushEvent {
    /// The layer.
    pub diff_id: Digest,
    /// How far it is.
    pub status: PushStatus,
}

/// What a push left at the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The image.
    pub id: ImageId,
    /// The manifest's digest.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
}

type Events = mpsc::Sender<PushEvent>;

impl Registries {
    /// Pushes the image that has this tag. Whoever no longer wants it drops the future.
    pub async fn push(
        &self,
        settings: &RegistrySettings,
        reference: &Reference,
        credentials: Option<&Credentials>,
        events: &Events,
    ) -> Result<Pushed, RegistryError> {
        let (store, name) = (Arc::clone(&self.store), reference.clone());
        let (image, manifest, known) = blocking(move || {
            let id = store.lookup(&name)?.ok_or(RegistryError::NotLocal(name.familiar_name()))?;
            Ok((store.image(&id)?, store.manifest(&id)?, store.known_blobs()?))
        })
        .await?;
        let endpoints = settings.endpoints(reference.domain(), true)?;
        let session = open_first(settings, &endpoints, credentials).await?;
        let repository = Repository::new(session, reference, "pull,push");
        let layers = self.push_layers(&repository, &image, &known, events).await?;
        let config = Descriptor::new(DOCKER_CONFIG, image.config_raw.len() as u64, *image.id.digest());
        let (bytes, media_type) = compose(&image, manifest, config, &layers);
        let raw = Bytes::from(image.config_raw);
        if !repository.has_blob(image.id.digest()).await? {
            let body = || -> Body { Full::new(raw.clone()).map_err(|never| match never {}).boxed_unsync() };
            Upload::begin(&repository).await?.send_small(&body, raw.len(), image.id.digest()).await?;
        }
        let tag = reference.tag().unwrap_or("latest");
        let digest = Digest::of(&bytes);
        put_manifest(&repository, tag, media_type, &bytes, &digest).await?;
        let (store, by_digest, size) =
            (Arc::clone(&self.store), reference.by_digest(digest), bytes.len() as u64);
        let id = image.id;
        blocking(move || Ok(store.note_pushed(&id, &bytes, &by_digest)?)).await?;
        tracing::info!(image = %id.short(), %reference, "pushed");
        Ok(Pushed { id, digest, size })
    }

    /// Brings all layers to the registry; what they are there, in order.
    async fn push_layers(
        &self,
        repository: &Repository,
        image: &Image,
        known: &HashMap<Digest, Vec<KnownBlob>>,
        events: &Events,
    ) -> Result<Vec<Descriptor>, RegistryError> {
        let mut unique: Vec<Digest> = Vec::new();
        for layer in &image.layers {
            if !unique.contains(&layer.diff_id) {
                unique.push(layer.diff_id);
                tell(events, layer.diff_id, PushStatus::Preparing).await?;
            }
        }
        for diff_id in unique.iter().skip(PARALLEL) {
            tell(events, *diff_id, PushStatus::Waiting).await?;
        }
        let pushing: Vec<_> = unique
            .into_iter()
            .map(|diff_id| {
                let known = known.get(&diff_id).cloned().unwrap_or_default();
                self.push_layer(repository.clone(), diff_id, known, events.clone())
            })
            .collect();
        let done: HashMap<Digest, Descriptor> =
            stream::iter(pushing).buffer_unordered(PARALLEL).try_collect().await?;
        Ok(image.layers.iter().filter_map(|layer| done.get(&layer.diff_id).cloned()).collect())
    }

    async fn push_layer(
        &self,
        repository: Repository,
        diff_id: Digest,
        known: Vec<KnownBlob>,
        events: Events,
    ) -> Result<(Digest, Descriptor), RegistryError> {
        for blob in &known {
            if repository.has_blob(&blob.descriptor.digest).await? {
                tell(&events, diff_id, PushStatus::LayerAlreadyExists).await?;
                return Ok((diff_id, docker_layer(&blob.descriptor)));
            }
        }
        for (blob, from) in mounts(&known, &repository.reference) {
            let with_source = repository.clone().with_scopes([format!("repository:{}:pull", from.path())]);
            if Upload::mount(&with_source, &blob.digest, from.path()).await? {
                tell(&events, diff_id, PushStatus::MountedFrom(from.path().to_owned())).await?;
                return Ok((diff_id, docker_layer(&blob)));
            }
        }
        let store = Arc::clone(&self.store);
        let packed = blocking(move || {
            let file = store.scratch_file("push-")?;
            let mut tar = store.layer_tar(&diff_id)?;
            Packed::new(&mut tar, file).map_err(RegistryError::Scratch)
        })
        .await?;
        let layer = Descriptor::new(DOCKER_LAYER, packed.size, packed.digest);
        if repository.has_blob(&packed.digest).await? {
            tell(&events, diff_id, PushStatus::LayerAlreadyExists).await?;
            return Ok((diff_id, layer));
        }
        let (sent, progress) = tokio::sync::watch::channel(0);
        let body = FileBody { path: packed.file.path().to_owned(), size: packed.size, sent };
        let sending = async { Upload::begin(&repository).await?.send_file(&body, &packed.digest).await };
        let telling = tell_progress(&events, diff_id, packed.size, progress);
        tokio::select! {
            result = sending => result?,
            Err(error) = telling => return Err(error),
        }
        tell(&events, diff_id, PushStatus::Pushed).await?;
        Ok((diff_id, layer))
    }
}

/// The manifest to push: the image's own, byte for byte, if the registry has its layers as they are there.
fn compose(
    image: &Image,
    manifest: Option<Vec<u8>>,
    config: Descriptor,
    layers: &[Descriptor],
) -> (Vec<u8>, &'static str) {
    let is_config_same = |document: &Document| match document {
        Document::Image(own) => {
            let digests = |layers: &[Descriptor]| layers.iter().map(|layer| layer.digest).collect::<Vec<_>>();
            own.config.digest == *image.id.digest() && digests(&own.layers) == digests(layers)
        }
        Document::Index(_) => false,
    };
    if let Some(own) = manifest
        && let Ok(document) = Document::parse_stored(&own)
        && is_config_same(&document)
    {
        let is_docker = Document::parse(None, &own).is_ok_and(|(_, kind)| kind == DOCKER_MANIFEST);
        return (own, if is_docker { DOCKER_MANIFEST } else { OCI_MANIFEST });
    }
    (render(&config, layers), DOCKER_MANIFEST)
}

/// A layer as Docker's manifests name it.
fn docker_layer(layer: &Descriptor) -> Descriptor {
    let kind = match layer.media_type.as_str() {
        kind if kind.ends_with("zstd") => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        kind if kind.ends_with("gzip") => DOCKER_LAYER,
        _ => "application/vnd.docker.image.rootfs.diff.tar",
    };
    Descriptor::new(kind, layer.size, layer.digest)
}

/// From which repositories of the same registry a blob could be mounted.
fn mounts(known: &[KnownBlob], target: &Reference) -> Vec<(Descriptor, Reference)> {
    let mut found: Vec<(Descriptor, Reference)> = Vec::new();
    for blob in known {
        for name in &blob.names {
            let is_candidate = name.domain() == target.domain() && name.path() != target.path();
            if is_candidate && !found.iter().any(|(_, other)| other.path() == name.path()) {
                found.push((blob.descriptor.clone(), name.clone()));
            }
        }
    }
    found.truncate(MAX_MOUNTS);
    found
}

/// A layer packed with gzip, in a file.
struct Packed {
    file: NamedTempFile,
    digest: Digest,
    size: u64,
}

impl Packed {
    fn new(tar: &mut impl io::Read, file: NamedTempFile) -> io::Result<Self> {
        let out = HashingWriter {
            inner: BufWriter::new(file.as_file().try_clone()?),
            hasher: Sha256::new(),
            size: 0,
        };
        let mut gzip = flate2::GzBuilder::new().mtime(0).write(out, flate2::Compression::default());
        io::copy(tar, &mut gzip)?;
        let mut out = gzip.finish()?;
        out.inner.flush()?;
        Ok(Self { file, digest: Digest::from(out.hasher), size: out.size })
    }
}

struct HashingWriter {
    inner: BufWriter<File>,
    hasher: Sha256,
    size: u64,
}

impl Write for HashingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

async fn tell_progress(
    events: &Events,
    diff_id: Digest,
    total: u64,
    mut progress: tokio::sync::watch::Receiver<u64>,
) -> Result<(), RegistryError> {
    let mut next = Instant::now();
    while progress.changed().await.is_ok() {
        tokio::time::sleep_until(next.into()).await;
        next = Instant::now() + INTERVAL;
        let current = *progress.borrow_and_update();
        tell(events, diff_id, PushStatus::Pushing { current, total }).await?;
    }
    // The upload ends on its own account.
    std::future::pending().await
}

/// Nobody who listens is nobody who wants it.
async fn tell(events: &Events, diff_id: Digest, status: PushStatus) -> Result<(), RegistryError> {
    events.send(PushEvent { diff_id, status }).await.map_err(|_| RegistryError::Cancelled)
}

/// Whether an answer says that the thing is there.
pub(super) fn is_there(method: &Method, status: StatusCode) -> Option<bool> {
    match status {
        StatusCode::OK => Some(true),
        StatusCode::NOT_FOUND if *method == Method::HEAD => Some(false),
        _ => None,
    }
}

/// A header's value from a number.
pub(super) fn number(value: u64) -> HeaderValue {
    HeaderValue::from(value)
}

/// `application/octet-stream`, as which blobs are sent.
pub(super) fn blob_headers(length: u64) -> header::HeaderMap {
    let mut headers = header::HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, number(length));
    headers
}
