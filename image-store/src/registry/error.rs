//! What can go wrong between here and a registry. The texts are Docker's where Docker has a text; what a registry says is
//! cut short before it is shown.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;

use super::http_client::is_transient;
use crate::config::{ConfigError, Platform};
use crate::digest::Digest;
use crate::layer::LayerError;
use crate::store;

/// Any error, as a source.
pub(super) type Source = Box<dyn std::error::Error + Send + Sync>;

/// The most that is shown of what a registry says.
const MAX_SHOWN: usize = 512;

/// Why a registry could not be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The repository does not exist, or is not for this user.
    #[error(
        "pull access denied for {repository}, repository does not exist or may require 'docker login': {reason}"
    )]
    AccessDenied {
        /// The repository as people write it.
        repository: String,
        /// The registry's own words.
        reason: Refusal,
    },
    /// There is no such manifest.
    #[error("manifest for {reference} not found: {reason}")]
    ManifestUnknown {
        /// The reference as people write it.
        reference: String,
        /// The registry's own words.
        reason: Refusal,
    },
    /// There is no such repository.
    #[error("repository {repository} not found: {reason}")]
    RepositoryUnknown {
        /// The repository as people write it.
        repository: String,
        /// The registry's own words.
        reason: Refusal,
    },
    /// The registry refused.
    #[error("{0}")]
    Refused(Refusal),
    /// It wants a user name and a password, and there are none.
    #[error("no basic auth credentials for the registry {0}")]
    NoCredentials(String),
    /// What is to be pushed is not here.
    #[error("An image does not exist locally with the tag: {0}")]
    NotLocal(String),
    /// An index has no image for this platform.
    #[error("no matching manifest for {0} in the manifest list entries")]
    NoPlatform(Platform),
    /// The only image under this name is for another platform than the one that was asked for.
    #[error(
        "image with reference {reference} was found but its platform ({found}) does not match the specified \
         platform ({wanted})"
    )]
    OtherPlatform {
        /// The reference as people write it.
        reference: String,
        /// What it is for.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// It is something that cannot be used here.
    #[error("{0}")]
    Unsupported(String),
    /// Something is not what its digest says.
    #[error("{what} verification failed for digest {expected}: it is {found}")]
    DigestMismatch {
        /// What.
        what: String,
        /// The digest that was promised.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// Something is not as long as it should be.
    #[error("{what} {digest} should have {expected} bytes, but {found}")]
    SizeMismatch {
        /// What.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// The size that was promised.
        expected: u64,
        /// What came instead, in words.
        found: String,
    },
    /// A document that is longer than any honest one.
    #[error("the registry sent {what} of more than {limit} bytes")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much is read at most.
        limit: usize,
    },
    /// A document that is no JSON of the right shape.
    #[error("the registry sent a malformed {what}")]
    Json {
        /// What it should have been.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A document or a header that contradicts itself or the protocol.
    #[error("the registry {host} breaks the protocol: {reason}")]
    Protocol {
        /// The registry's host.
        host: String,
        /// How.
        reason: String,
    },
    /// An image's config is malformed.
    #[error("the image config {digest} is refused")]
    Config {
        /// Its digest.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// A layer is unusable.
    #[error("layer {digest} cannot be used")]
    Layer {
        /// Its digest.
        digest: Digest,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// No connection, or it broke.
    #[error("cannot talk to the registry at {url}")]
    Transport {
        /// What was asked for.
        url: String,
        /// Why it failed.
        #[source]
        source: Source,
    },
    /// Nothing came for too long.
    #[error("the registry at {url} sent nothing for {seconds} seconds")]
    Stalled {
        /// What was asked for.
        url: String,
        /// How long was waited.
        seconds: u64,
    },
    /// A setting cannot be used.
    #[error("{0}")]
    Settings(String),
    /// A certificate or a key cannot be used.
    #[error("the certificate file `{path}` cannot be used")]
    Certificate {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: Source,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A file that is being prepared failed.
    #[error("a file for the registry cannot be prepared")]
    Scratch(#[source] io::Error),
    /// The work was cut short.
    #[error("the transfer was cut short")]
    Cancelled,
    /// It failed for someone else, who wanted the same.
    #[error(transparent)]
    Shared(#[from] Arc<RegistryError>),
}

/// What kind of answer an error deserves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegistryErrorKind {
    /// The image, the repository or the platform does not exist.
    NotFound,
    /// The user name or the password is wrong or missing.
    Unauthorized,
    /// The user may not do that.
    Denied,
    /// The caller's input or the settings are bad.
    InvalidInput,
    /// The image is of a kind that cannot be used.
    Unsupported,
    /// The registry or the machine failed.
    Internal,
}

impl RegistryError {
    /// What kind of answer it deserves.
    pub fn kind(&self) -> RegistryErrorKind {
        use RegistryErrorKind as Kind;
        match self {
            Self::AccessDenied { .. }
            | Self::ManifestUnknown { .. }
            | Self::RepositoryUnknown { .. }
            | Self::NotLocal(_)
            | Self::NoPlatform(_)
            | Self::OtherPlatform { .. } => Kind::NotFound,
            Self::Refused(refusal) => refusal.kind(),
            Self::NoCredentials(_) => Kind::Unauthorized,
            Self::Unsupported(_) => Kind::Unsupported,
            Self::Settings(_) => Kind::InvalidInput,
            Self::Store(error) => match error.kind() {
                store::ErrorKind::NotFound => Kind::NotFound,
                store::ErrorKind::InvalidInput => Kind::InvalidInput,
                _ => Kind::Internal,
            },
            Self::Shared(error) => error.kind(),
            _ => Kind::Internal,
        }
    }

    /// Whether the same again may well succeed.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Transport { .. } | Self::Stalled { .. } => true,
            Self::Refused(refusal) => is_transient(refusal.status),
            _ => false,
        }
    }

    /// How long the registry wants to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) => refusal.retry_after,
            _ => None,
        }
    }

    pub(super) fn protocol(host: &str, reason: impl Into<String>) -> Self {
        Self::Protocol { host: host.to_owned(), reason: clip(&reason.into()) }
    }
}

/// What a registry says when it refuses, by the distribution specification: `manifest unknown: manifest unknown`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: StatusCode,
    /// `MANIFEST_UNKNOWN`; empty if the registry gives none.
    pub code: String,
    /// Its words.
    pub message: String,
    /// How long it wants to be left alone.
    pub retry_after: Option<Duration>,
}

impl Refusal {
    /// From the body of an answer.
    pub(super) fn parse(status: StatusCode, body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<Detail>,
        }
        #[derive(Deserialize)]
        struct Detail {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        /// Docker Hub's token server and others.
        #[derive(Deserialize)]
        struct Details {
            #[serde(alias = "message", alias = "error_description", alias = "error")]
            details: String,
        }
        let first =
            serde_json::from_slice::<Errors>(body).ok().and_then(|errors| errors.errors.into_iter().next());
        if let Some(detail) = first {
            return Self {
                status,
                code: clip(&detail.code),
                message: clip(&detail.message),
                retry_after: None,
            };
        }
        let code = match status {
            StatusCode::UNAUTHORIZED => "UNAUTHORIZED",
            StatusCode::FORBIDDEN => "DENIED",
            StatusCode::TOO_MANY_REQUESTS => "TOOMANYREQUESTS",
            _ => "",
        };
        let message = match serde_json::from_slice::<Details>(body) {
            Ok(details) => clip(&details.details),
            Err(_) => String::new(),
        };
        Self { status, code: code.to_owned(), message, retry_after: None }
    }

    /// Denied, in Docker's words.
    pub(super) fn denied() -> Self {
        let (code, message) = ("DENIED".to_owned(), String::new());
        Self { status: StatusCode::FORBIDDEN, code, message, retry_after: None }
    }

    pub(super) fn is(&self, code: &str) -> bool {
        self.code == code
    }

    fn kind(&self) -> RegistryErrorKind {
        match (self.code.as_str(), self.status) {
            ("UNAUTHORIZED", _) | (_, StatusCode::UNAUTHORIZED) => RegistryErrorKind::Unauthorized,
            ("DENIED", _) | (_, StatusCode::FORBIDDEN) => RegistryErrorKind::Denied,
            (_, StatusCode::NOT_FOUND) => RegistryErrorKind::NotFound,
            _ => RegistryErrorKind::Internal,
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let message = match (self.message.as_str(), self.code.as_str()) {
            ("", "DENIED") => "requested access to the resource is denied",
            ("", "UNAUTHORIZED") => "authentication required",
            ("", "MANIFEST_UNKNOWN") => "manifest unknown",
            ("", "NAME_UNKNOWN") => "repository name not known to registry",
            ("", "TOOMANYREQUESTS") => "too many requests",
            (message, _) => message,
        };
        match (self.code.is_empty(), message.is_empty()) {
            (false, _) => write!(f, "{}: {message}", self.code.to_lowercase().replace('_', " ")),
            (true, false) => write!(f, "the registry answered {}: {message}", self.status),
            (true, true) => write!(f, "the registry answered {}", self.status),
        }
    }
}

/// Keeps what others say short and printable.
pub(super) fn clip(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_read_as_dockers_do() {
        let parse = |status: u16, body: &str| {
            Refusal::parse(StatusCode::from_u16(status).unwrap(), body.as_bytes()).to_string()
        };
        let known = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{}}]}"#;
        assert_eq!(parse(404, known), "manifest unknown: manifest unknown");
        let bare = r#"{"errors":[{"code":"DENIED"}]}"#;
        assert_eq!(parse(403, bare), "denied: requested access to the resource is denied");
        assert_eq!(parse(401, "<html>"), "unauthorized: authentication required");
        assert_eq!(
            parse(401, r#"{"details":"incorrect username or password"}"#),
            "unauthorized: incorrect username or password"
        );
        assert_eq!(parse(500, ""), "the registry answered 500 Internal Server Error");
        let long = format!(r#"{{"errors":[{{"code":"X","message":"\u001b[2J{}"}}]}}"#, "y".repeat(9999));
        let shown = parse(500, &long);
        assert!(shown.len() < 600 && !shown.contains('\u{1b}'), "{shown}");
    }
}
