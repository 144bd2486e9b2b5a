//! One repository at one registry: its manifests, tags and small blobs. All of it is checked against its digest.

use std::collections::BTreeSet;
use std::sync::Arc;

use http::header::{self, HeaderValue};
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use url::Url;

use super::error::RegistryError;
use super::http_client::Call;
use super::manifest::{ACCEPT, Descriptor, Document, MAX_MANIFEST};
use super::session::Session;
use crate::digest::Digest;
use crate::reference::Reference;

/// A config is a few kilobytes.
const MAX_CONFIG: usize = 4 << 20;
const MAX_TAGS: usize = 10_000;

/// A manifest as it came, verified if it was asked for by digest.
#[derive(Debug, Clone)]
pub(super) struct RawManifest {
    pub(super) bytes: bytes::Bytes,
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) document: Document,
}

/// A repository with what is needed to ask for it.
#[derive(Debug, Clone)]
pub(super) struct Repository {
    pub(super) session: Arc<Session>,
    pub(super) reference: Reference,
    scopes: Arc<[String]>,
}

impl Repository {
    pub(super) fn new(session: Arc<Session>, reference: &Reference, actions: &str) -> Self {
        let scopes = Arc::from([format!("repository:{}:{actions}", reference.path())]);
        Self { session, reference: reference.clone(), scopes }
    }

    /// The same, with more to be allowed by the token.
    pub(super) fn with_scopes(mut self, more: impl IntoIterator<Item = String>) -> Self {
        self.scopes = self.scopes.iter().cloned().chain(more).collect();
        self
    }

    pub(super) fn url(&self, path: &str) -> Result<Url, RegistryError> {
        self.session.url(&format!("{}/{path}", self.reference.path()))
    }

    pub(super) async fn send(&self, call: &Call<'_>) -> Result<Response<Incoming>, RegistryError> {
        self.session.send(call, &self.scopes).await
    }

    pub(super) async fn send_retrying(&self, call: &Call<'_>) -> Result<Response<Incoming>, RegistryError> {
        self.session.send_retrying(call, &self.scopes).await
    }

    /// What a refusal means for someone who pulls; Docker's words.
    pub(super) async fn pull_refused(&self, url: &Url, response: Response<Incoming>) -> RegistryError {
        let status = response.status();
        let reason = match self.session.refused(url, response).await {
            RegistryError::Refused(refusal) => refusal,
            other => return other,
        };
        let repository = self.reference.familiar_name();
        let is_unauthorized_anonymous = reason.is("UNAUTHORIZED") && self.reference.domain() == "docker.io";
        if reason.is("DENIED") || is_unauthorized_anonymous {
            return RegistryError::AccessDenied { repository, reason };
        }
        if reason.is("NAME_UNKNOWN") {
            return RegistryError::RepositoryUnknown { repository, reason };
        }
        if reason.is("MANIFEST_UNKNOWN") || status == StatusCode::NOT_FOUND {
            let mut reason = reason;
            if reason.code.is_empty() {
                "MANIFEST_UNKNOWN".clone_into(&mut reason.code);
            }
            return RegistryError::ManifestUnknown { reference: self.reference.to_string(), reason };
        }
        RegistryError::Refused(reason)
    }

    /// The manifest or index under a tag or a digest.
    pub(super) async fn manifest(
        &self,
        name: &str,
        expected: Option<&Digest>,
    ) -> Result<RawManifest, RegistryError> {
        let url = self.url(&format!("manifests/{name}"))?;
        let mut call = Call::new(Method::GET, url.clone());
        for kind in ACCEPT {
            call.headers.append(header::ACCEPT, HeaderValue::from_static(kind));
        }
        let response = self.send_retrying(&call).await?;
        if response.status() != StatusCode::OK {
            return Err(self.pull_refused(&url, response).await);
        }
        let text = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let content_type = text("content-type");
        let stated = text("docker-content-digest").and_then(|digest| digest.parse::<Digest>().ok());
        let http = &self.session.http;
        let bytes = http.read(&url, response, "a manifest", MAX_MANIFEST).await?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = expected.copied().or(stated).filter(|expected| *expected != digest) {
            return Err(RegistryError::DigestMismatch {
                what: "manifest".to_owned(),
                expected,
                found: digest,
            });
        }
        let (document, media_type) = Document::parse(content_type.as_deref(), &bytes)?;
        Ok(RawManifest { bytes, digest, media_type, document })
    }

    /// The manifest that a descriptor of an index leads to.
    pub(super) async fn described_manifest(
        &self,
        descriptor: &Descriptor,
    ) -> Result<RawManifest, RegistryError> {
        let manifest = self.manifest(&descriptor.digest.to_string(), Some(&descriptor.digest)).await?;
        check_size("manifest", descriptor, manifest.bytes.len())?;
        Ok(manifest)
    }

    /// A config.
    pub(super) async fn config(&self, descriptor: &Descriptor) -> Result<bytes::Bytes, RegistryError> {
        let url = self.blob_url(&descriptor.digest)?;
        let response = self.send_retrying(&Call::new(Method::GET, url.clone())).await?;
        if response.status() != StatusCode::OK {
            return Err(self.session.refused(&url, response).await);
        }
        let bytes = self.session.http.read(&url, response, "an image config", MAX_CONFIG).await?;
        let found = Digest::of(&bytes);
        if found != descriptor.digest {
            let expected = descriptor.digest;
            return Err(RegistryError::DigestMismatch { what: "image config".to_owned(), expected, found });
        }
        check_size("image config", descriptor, bytes.len())?;
        Ok(bytes)
    }

    pub(super) fn blob_url(&self, digest: &Digest) -> Result<Url, RegistryError> {
        self.url(&format!("blobs/{digest}"))
    }

    /// A blob, from `offset` on if the registry can; its answer's status tells. One attempt.
    pub(super) async fn blob(
        &self,
        digest: &Digest,
        offset: u64,
    ) -> Result<Response<Incoming>, RegistryError> {
        let url = self.blob_url(digest)?;
        let mut call = Call::new(Method::GET, url.clone());
        if offset > 0 {
            let range = HeaderValue::try_from(format!("bytes={offset}-"));
            call.headers.insert(header::RANGE, range.map_err(|_| RegistryError::Cancelled)?);
        }
        let response = self.send(&call).await?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            _ => Err(self.session.refused(&url, response).await),
        }
    }

    /// All tags of the repository.
    pub(super) async fn tags(&self) -> Result<BTreeSet<String>, RegistryError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default, deserialize_with = "crate::config::or_default")]
            tags: Vec<String>,
        }
        let http = &self.session.http;
        let mut tags = BTreeSet::new();
        let mut next = Some(self.url("tags/list")?);
        while let Some(url) = next {
            let response = self.send_retrying(&Call::new(Method::GET, url.clone())).await?;
            if response.status() != StatusCode::OK {
                return Err(self.pull_refused(&url, response).await);
            }
            let link = next_page(response.headers());
            let page: Page = http.read_json(&url, response, "list of tags", MAX_MANIFEST).await?;
            let before = tags.len();
            tags.extend(page.tags);
            if tags.len() > MAX_TAGS {
                return Err(RegistryError::TooLarge { what: "tags", limit: MAX_TAGS });
            }
            // A page that brings nothing new would be followed by itself for ever.
            next = match link.filter(|_| tags.len() > before) {
                Some(link) => Some(http.resolve(&url, &link)?),
                None => None,
            };
        }
        Ok(tags)
    }
}

/// `Link: </v2/…>; rel="next"`.
fn next_page(headers: &http::HeaderMap) -> Option<HeaderValue> {
    let text = headers.get(header::LINK)?.to_str().ok()?;
    let (target, rest) = text.strip_prefix('<')?.split_once('>')?;
    rest.contains("next").then(|| HeaderValue::try_from(target).ok()).flatten()
}

fn check_size(what: &'static str, descriptor: &Descriptor, found: usize) -> Result<(), RegistryError> {
    if descriptor.size == found as u64 {
        return Ok(());
    }
    Err(RegistryError::SizeMismatch {
        what,
        digest: descriptor.digest,
        expected: descriptor.size,
        found: format!("it has {found}"),
    })
}
