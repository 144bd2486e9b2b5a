//! What `docker search` and `docker manifest` ask: the old search API, and what is behind a name without pulling it.

use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};

use super::error::RegistryError;
use super::http_client::Call;
use super::manifest::{Descriptor, Document};
use super::repository::Repository;
use super::session::{Credentials, Session};
use super::settings::RegistrySettings;
use super::{Registries, open_first};
use crate::config::{ImageConfig, Platform, or_default};
use crate::digest::Digest;
use crate::reference::Reference;

const MAX_ANSWER: usize = 4 << 20;
const HUB: &str = "docker.io";

/// One repository that was found; the fields are the search API's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Its name.
    #[serde(default, deserialize_with = "or_default")]
    pub name: String,
    /// What it is about, in its owner's words.
    #[serde(default, deserialize_with = "or_default")]
    pub description: String,
    /// How many people like it.
    #[serde(default, deserialize_with = "or_default")]
    pub star_count: i64,
    /// Docker looks after it.
    #[serde(default, deserialize_with = "or_default")]
    pub is_official: bool,
    /// Always false nowadays.
    #[serde(default, deserialize_with = "or_default")]
    pub is_automated: bool,
}

/// What is behind a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// Media type of the manifest or index.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
    /// What there are images for.
    pub platforms: Vec<Platform>,
}

impl Registries {
    /// Searches Docker Hub, or the registry that the term begins with (`host:5000/term`).
    pub async fn search(
        &self,
        settings: &RegistrySettings,
        term: &str,
        limit: u32,
        credentials: Option<&Credentials>,
    ) -> Result<Vec<Found>, RegistryError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default, deserialize_with = "or_default")]
            results: Vec<Found>,
        }
        let (domain, term) = split(term)?;
        let mut first_error = None;
        for endpoint in settings.search_endpoints(&domain)? {
            let result = async {
                let session = Session::unopened(settings, &endpoint, credentials)?;
                let mut url = session.http.base.clone();
                url.set_path("/v1/search");
                url.query_pairs_mut().append_pair("q", &term).append_pair("n", &limit.to_string());
                let response = session.send_retrying(&Call::new(Method::GET, url.clone()), &[]).await?;
                match response.status() {
                    StatusCode::OK => {
                        let what = "search result";
                        let answer: Answer = session.http.read_json(&url, response, what, MAX_ANSWER).await?;
                        Ok(answer.results)
                    }
                    StatusCode::NOT_FOUND => Err(RegistryError::Unsupported(format!(
                        "the registry {domain} cannot be searched: it has no /v1/search"
                    ))),
                    _ => Err(session.refused(&url, response).await),
                }
            };
            match result.await {
                Ok(results) => return Ok(results),
                Err(error) => {
                    let is_more_telling = matches!(first_error, None | Some(RegistryError::Settings(_)));
                    if is_more_telling {
                        first_error = Some(error);
                    }
                }
            }
        }
        Err(first_error.unwrap_or_else(|| RegistryError::Settings("there is no registry to ask".to_owned())))
    }

    /// Looks at a manifest or index without pulling what it describes.
    pub async fn inspect(
        &self,
        settings: &RegistrySettings,
        reference: &Reference,
        credentials: Option<&Credentials>,
    ) -> Result<Inspected, RegistryError> {
        let endpoints = settings.endpoints(reference.domain(), true)?;
        let session = open_first(settings, &endpoints, credentials).await?;
        let repository = Repository::new(session, reference, "pull");
        let name = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let manifest = repository.manifest(&name, reference.digest()).await?;
        let platforms = match &manifest.document {
            Document::Index(entries) => entries.iter().filter_map(|entry| entry.platform.clone()).collect(),
            Document::Image(image) => vec![platform(&repository, &image.config).await?],
        };
        Ok(Inspected {
            media_type: manifest.media_type,
            digest: manifest.digest,
            size: manifest.bytes.len() as u64,
            platforms,
        })
    }
}

async fn platform(repository: &Repository, config: &Descriptor) -> Result<Platform, RegistryError> {
    let raw = repository.config(config).await?;
    let parsed = ImageConfig::parse(&raw);
    let parsed = parsed.map_err(|source| RegistryError::Config { digest: config.digest, source })?;
    Ok(parsed.platform())
}

/// A term's registry and the rest; what looks like a host is one.
fn split(term: &str) -> Result<(String, String), RegistryError> {
    if term.contains("://") {
        return Err(RegistryError::Settings(
            "invalid repository name: repository name should not have a scheme".to_owned(),
        ));
    }
    let (domain, rest) = match term.split_once('/') {
        Some((first, rest)) if first == "localhost" || first.contains(['.', ':']) => (first, rest),
        _ => (HUB, term),
    };
    let domain = if matches!(domain, "index.docker.io") { HUB } else { domain };
    // Whatever is no host must not become part of a URL.
    let is_host =
        Reference::parse(&format!("{domain}/x")).is_ok_and(|reference| reference.domain() == domain);
    if !is_host {
        return Err(RegistryError::Settings(format!("`{domain}` is no registry's name")));
    }
    let rest = if domain == HUB { rest.strip_prefix("library/").unwrap_or(rest) } else { rest };
    Ok((domain.to_owned(), rest.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_may_begin_with_a_registry() {
        for (term, domain, rest) in [
            ("busybox", HUB, "busybox"),
            ("library/busybox", HUB, "busybox"),
            ("a/b", HUB, "a/b"),
            ("docker.io/library/x", HUB, "x"),
            ("localhost:5000/x", "localhost:5000", "x"),
            ("quay.io/a/b", "quay.io", "a/b"),
        ] {
            assert_eq!(split(term).unwrap(), (domain.to_owned(), rest.to_owned()), "{term}");
        }
        for bad in ["http://x/y", "a:b@c.d/x", "x.y:z/q"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
