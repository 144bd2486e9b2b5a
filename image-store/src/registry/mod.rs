//! Registries: pull, push, log in, look around. Speaks Docker Registry v2 and the OCI distribution specification, with no
//! system call that only Linux has. A registry, its token server and whatever they lead to are untrusted: all is bounded,
//! checked against digests and lengths, and what does not fit leaves the store as it was.

pub mod challenge;
mod connect;
mod download;
mod error;
mod http_client;
pub mod manifest;
mod pull;
mod push;
mod repository;
mod search;
mod session;
mod settings;
mod tls;
mod upload;

use std::sync::Arc;

use crate::reference::Reference;
use crate::store::ImageStore;

pub use error::{Refusal, RegistryError, RegistryErrorKind};
pub use pull::{LayerStatus, Pull, PullEvent, Pulled};
pub use push::{PushEvent, PushStatus, Pushed};
pub use search::{Found, Inspected};
pub use session::Credentials;
pub use settings::{Proxies, RegistrySettings, Retries, check_mirror};

use session::Session;
use settings::Endpoint;

/// The way to registries, for one store.
#[derive(Debug)]
pub struct Registries {
    store: Arc<ImageStore>,
    downloads: download::Downloads,
}

impl Registries {
    /// For images that go into this store or come from it.
    pub fn new(store: Arc<ImageStore>) -> Self {
        Self { store, downloads: download::Downloads::default() }
    }

    /// Whether the registry accepts these credentials; a token that can be kept in place of the password, if it gives one.
    pub async fn log_in(
        &self,
        settings: &RegistrySettings,
        domain: &str,
        credentials: &Credentials,
    ) -> Result<Option<String>, RegistryError> {
        // A mirror's opinion of Docker Hub's credentials does not matter.
        let session = open_first(settings, &settings.endpoints(domain, true)?, Some(credentials)).await?;
        session.log_in().await
    }

    /// All tags of a repository.
    pub async fn tags(
        &self,
        settings: &RegistrySettings,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Result<Vec<String>, RegistryError> {
        let endpoints = settings.endpoints(reference.domain(), true)?;
        let session = open_first(settings, &endpoints, credentials).await?;
        let repository = repository::Repository::new(session, reference, "pull");
        Ok(repository.tags().await?.into_iter().collect())
    }
}

/// The first endpoint behind which there is a registry; the first one's error if there is none.
async fn open_first(
    settings: &RegistrySettings,
    endpoints: &[Endpoint],
    credentials: Option<&Credentials>,
) -> Result<Arc<Session>, RegistryError> {
    let mut first_error = None;
    for endpoint in endpoints {
        match Session::open(settings, endpoint, credentials).await {
            Ok(session) => return Ok(session),
            Err(error) => {
                tracing::debug!(endpoint = %endpoint.base, %error, "no registry");
                // Of an insecure registry that speaks no TLS, what it says without is of interest.
                let is_more_telling = matches!(first_error, None | Some(RegistryError::Settings(_)));
                if is_more_telling {
                    first_error = Some(error);
                }
            }
        }
    }
    Err(first_error.unwrap_or_else(|| RegistryError::Settings("there is no registry to ask".to_owned())))
}
