//! A pull: from a name to an image in the store. The registry's manifest tells the config, the config the layers' diff
//! ids, and only what agrees with all of them is kept; the image counts when all of it is there.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Registries;
use super::download::{Download, State};
use super::error::RegistryError;
use super::manifest::{Descriptor, Document, ImageManifest, choose};
use super::repository::{RawManifest, Repository};
use super::session::{Credentials, Session};
use super::settings::RegistrySettings;
use crate::config::{ImageConfig, Platform};
use crate::digest::{Digest, ImageId};
use crate::reference::Reference;
use crate::store::{LayerLease, NewImage};

/// Indexes may lead to indexes, but not for ever.
const MAX_NESTING: usize = 4;
/// Progress of one layer is told this often.
const INTERVAL: Duration = Duration::from_millis(100);

/// What to pull.
#[derive(Debug, Clone)]
pub struct Pull {
    /// The name, with a tag or a digest.
    pub reference: Reference,
    /// For which platform; without it, for this machine's containers, and whatever there is if there is only one.
    pub platform: Option<Platform>,
    /// As whom.
    pub credentials: Option<Credentials>,
}

/// How far one layer is, in Docker's words.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are Docker's own words")]
pub enum LayerStatus {
    AlreadyExists,
    PullingFsLayer,
    Waiting,
    Downloading { current: u64, total: u64 },
    Retrying { seconds: u64 },
    VerifyingChecksum,
    DownloadComplete,
    Extracting { current: u64, total: u64 },
    PullComplete,
}

/// What happens during a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullEvent {
    /// The registry has it.
    Pulling {
        /// The repository in the registry.
        repository: String,
        /// The tag or digest.
        name: String,
    },
    /// A layer got on.
    Layer {
        /// The digest of its blob.
        blob: Digest,
        /// How far it is.
        status: LayerStatus,
    },
}

/// What a pull brought.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The image's id.
    pub id: ImageId,
    /// The digest under which the registry has it: of an index, if it was chosen from one.
    pub digest: Digest,
    /// Nothing has changed: the name meant this image before.
    pub was_up_to_date: bool,
}

type Events = mpsc::Sender<PullEvent>;

impl Registries {
    /// Pulls an image. Whoever no longer wants it drops the future: what was not finished leaves nothing behind.
    pub async fn pull(
        &self,
        settings: &RegistrySettings,
        pull: &Pull,
        events: &Events,
    ) -> Result<Pulled, RegistryError> {
        let mut first_error: Option<RegistryError> = None;
        for endpoint in settings.endpoints(pull.reference.domain(), false)? {
            let opened = Session::open(settings, &endpoint, pull.credentials.as_ref()).await;
            let result = match opened {
                Ok(session) => {
                    let is_mirror = session.is_mirror;
                    let repository = Repository::new(session, &pull.reference, "pull");
                    let result = self.pull_from(pull, repository, events).await;
                    if !is_mirror {
                        return result;
                    }
                    result
                }
                Err(error) => Err(error),
            };
            match result {
                Ok(pulled) => return Ok(pulled),
                Err(error) => {
                    tracing::info!(endpoint = %endpoint.base, %error, "cannot pull from there");
                    // The registry itself has the last word, a mirror none; of an insecure registry without TLS, what it
                    // says without is of interest.
                    let is_telling = matches!(first_error, None | Some(RegistryError::Settings(_)));
                    if endpoint.is_mirror {
                        continue;
                    }
                    if is_telling {
                        first_error = Some(error);
                    }
                }
            }
        }
        Err(first_error.unwrap_or_else(|| RegistryError::Settings("there is no registry to ask".to_owned())))
    }

    async fn pull_from(
        &self,
        pull: &Pull,
        repository: Repository,
        events: &Events,
    ) -> Result<Pulled, RegistryError> {
        let reference = &pull.reference;
        let by_digest = reference.digest();
        let name = match (by_digest, reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let top = repository.manifest(&name, by_digest).await?;
        tell(events, PullEvent::Pulling { repository: reference.path().to_owned(), name }).await?;
        let digest = top.digest;
        let (raw, image) = resolve(&repository, top, pull.platform.as_ref()).await?;
        let tag = reference.tag_only().filter(|_| by_digest.is_none());
        let by_digest = reference.by_digest(digest);
        let id = ImageId::from(image.config.digest);
        let name = tag.clone().unwrap_or_else(|| by_digest.clone());
        let store = Arc::clone(&self.store);
        let known = blocking(move || {
            let was_up_to_date = store.lookup(&name)? == Some(id);
            if was_up_to_date || store.has_image(&id)? {
                // Another image may have had the name.
                return Ok(Some((store.name_image(&id, tag.as_ref(), &by_digest)?, was_up_to_date)));
            }
            Ok(None)
        });
        if let Some((true, was_up_to_date)) = known.await? {
            if let Some(wanted) = &pull.platform {
                let store = Arc::clone(&self.store);
                let found = blocking(move || Ok(store.image(&id)?.platform)).await?;
                check_platform(reference, wanted, &found)?;
            }
            return Ok(Pulled { id, digest, was_up_to_date });
        }
        let config_raw = repository.config(&image.config).await?;
        let config = ImageConfig::parse(&config_raw)
            .map_err(|source| RegistryError::Config { digest: image.config.digest, source })?;
        if let Some(wanted) = &pull.platform {
            check_platform(reference, wanted, &config.platform())?;
        }
        let layers = self.layers(&repository, &image, &config, events).await?;
        let (store, reference) = (Arc::clone(&self.store), reference.clone());
        let tag = reference.tag_only().filter(|_| reference.digest().is_none());
        blocking(move || {
            let kept = store.keep_image(&NewImage {
                config_raw: &config_raw,
                config: &config,
                manifest: &raw.bytes,
                layers: &layers,
                tag: tag.as_ref(),
                by_digest: &reference.by_digest(digest),
            });
            // Leases take the store's lock when they go.
            drop(layers);
            Ok(kept?)
        })
        .await?;
        tracing::info!(image = %id.short(), "pulled");
        Ok(Pulled { id, digest, was_up_to_date: false })
    }

    /// Brings all layers, each once.
    async fn layers(
        &self,
        repository: &Repository,
        image: &ImageManifest,
        config: &ImageConfig,
        events: &Events,
    ) -> Result<Vec<Arc<LayerLease>>, RegistryError> {
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != image.layers.len() {
            return Err(RegistryError::Unsupported(format!(
                "the manifest lists {} layers, but the image config has {} diff ids",
                image.layers.len(),
                diff_ids.len()
            )));
        }
        let mut leases: HashMap<Digest, Arc<LayerLease>> = HashMap::new();
        let mut missing: Vec<(Descriptor, Digest)> = Vec::new();
        for (layer, diff_id) in image.layers.iter().zip(diff_ids) {
            let is_repeated =
                leases.contains_key(diff_id) || missing.iter().any(|(_, other)| other == diff_id);
            if is_repeated {
                continue;
            }
            let (store, diff_id) = (Arc::clone(&self.store), *diff_id);
            let status = match blocking(move || Ok(store.lease_layer(&diff_id))).await? {
                Some(lease) => {
                    leases.insert(diff_id, Arc::new(lease));
                    LayerStatus::AlreadyExists
                }
                None => {
                    missing.push((layer.clone(), diff_id));
                    LayerStatus::PullingFsLayer
                }
            };
            tell(events, PullEvent::Layer { blob: layer.digest, status }).await?;
        }
        let following = missing.into_iter().map(|(layer, diff_id)| {
            let download = self.downloads.join(&self.store, repository, &layer, diff_id);
            follow(download, layer, diff_id, events.clone())
        });
        leases.extend(try_join_all(following).await?);
        Ok(diff_ids.iter().filter_map(|diff_id| leases.get(diff_id).cloned()).collect())
    }
}

/// From what a name leads to, to one image's manifest.
async fn resolve(
    repository: &Repository,
    mut manifest: RawManifest,
    platform: Option<&Platform>,
) -> Result<(RawManifest, ImageManifest), RegistryError> {
    let wanted = platform.cloned().unwrap_or_else(Platform::host);
    for _ in 0..MAX_NESTING {
        match &manifest.document {
            Document::Image(image) => {
                let image = image.clone();
                return Ok((manifest, image));
            }
            Document::Index(entries) => {
                manifest = repository.described_manifest(choose(entries, &wanted)?).await?;
            }
        }
    }
    Err(RegistryError::Unsupported("the image's indexes are nested too deeply".to_owned()))
}

fn check_platform(reference: &Reference, wanted: &Platform, found: &Platform) -> Result<(), RegistryError> {
    if wanted.accepts(found).is_some() {
        return Ok(());
    }
    let (found, wanted) = (found.to_string(), wanted.to_string());
    Err(RegistryError::OtherPlatform { reference: reference.to_string(), found, wanted })
}

/// Tells how a download goes until it has ended.
async fn follow(
    download: Arc<Download>,
    layer: Descriptor,
    diff_id: Digest,
    events: Events,
) -> Result<(Digest, Arc<LayerLease>), RegistryError> {
    let total = layer.size;
    let mut state = download.state.clone();
    let mut teller = Teller { events, layer, told: Told::Nothing };
    loop {
        let now = state.borrow_and_update().clone();
        match now {
            State::Waiting => teller.say(LayerStatus::Waiting).await?,
            State::Downloading { current } => teller.say(LayerStatus::Downloading { current, total }).await?,
            State::Retrying { delay } => {
                teller.say(LayerStatus::Retrying { seconds: delay.as_secs().max(1) }).await?;
            }
            State::Verifying => teller.up_to(Told::Verifying).await?,
            State::Converting => teller.up_to(Told::Extracting).await?,
            State::Done(lease) => {
                teller.up_to(Told::Complete).await?;
                return Ok((diff_id, lease));
            }
            State::Failed(error) => return Err(error.into()),
        }
        next_news(&mut state).await?;
    }
}

/// Waits for a new state; for mere progress, a little longer.
async fn next_news(state: &mut watch::Receiver<State>) -> Result<(), RegistryError> {
    let until = Instant::now() + INTERVAL;
    state.changed().await.map_err(|_| RegistryError::Cancelled)?;
    let is_more = |state: &State| !matches!(state, State::Downloading { .. });
    match tokio::time::timeout_at(until, state.wait_for(is_more)).await {
        Ok(Err(_)) => Err(RegistryError::Cancelled),
        Ok(Ok(_)) | Err(_) => Ok(()),
    }
}

/// What was told of the end of a layer: Docker tells all of it, even if it went by too quickly to be seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Nothing,
    Verifying,
    Extracting,
    Complete,
}

/// Tells of one layer.
struct Teller {
    events: Events,
    layer: Descriptor,
    told: Told,
}

impl Teller {
    async fn say(&self, status: LayerStatus) -> Result<(), RegistryError> {
        tell(&self.events, PullEvent::Layer { blob: self.layer.digest, status }).await
    }

    /// Tells all that was not told yet, up to here.
    async fn up_to(&mut self, goal: Told) -> Result<(), RegistryError> {
        let (told, total) = (self.told, self.layer.size);
        if told < Told::Verifying && goal >= Told::Verifying {
            self.say(LayerStatus::VerifyingChecksum).await?;
        }
        if told < Told::Extracting && goal >= Told::Extracting {
            self.say(LayerStatus::DownloadComplete).await?;
            self.say(LayerStatus::Extracting { current: total, total }).await?;
        }
        if told < Told::Complete && goal >= Told::Complete {
            self.say(LayerStatus::PullComplete).await?;
        }
        self.told = goal;
        Ok(())
    }
}

/// Nobody who listens is nobody who wants the image.
async fn tell(events: &Events, event: PullEvent) -> Result<(), RegistryError> {
    events.send(event).await.map_err(|_| RegistryError::Cancelled)
}

/// Does something of the store's, which is synchronous.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| RegistryError::Cancelled)?
}
