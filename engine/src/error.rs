//! Errors as Docker's clients see them: a class, which decides the HTTP status in one place, and a message for people.
//!
//! Modules have errors of their own where a caller tells them apart; on the way to a client all become this one.

use std::error::Error as StdError;

use coracle_agent_api as agent_api;
use http::StatusCode;

use crate::{agent::AgentError, logs::LogError, sandbox::SandboxError, store::StoreError};

/// A result with the engine's error.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Classes of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is malformed or asks for something illegal.
    Invalid,
    /// It names something that does not exist.
    NotFound,
    /// It cannot be done in the present state.
    Conflict,
    /// There is nothing to do.
    NotModified,
    /// The user name or the password for a registry is missing or wrong.
    Unauthorized,
    /// A registry denies it.
    Denied,
    /// Coracle cannot do that (yet).
    Unsupported,
    /// The sandbox is not there to do it.
    Unavailable,
    /// A bug, or the machine failed us.
    Internal,
}

/// What an API call failed with.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
}

impl Error {
    /// An error of a class.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(Kind::Conflict, message)
    }

    pub(crate) fn not_modified() -> Self {
        Self::new(Kind::NotModified, "")
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// The class.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The HTTP status that goes with it.
    pub fn status(&self) -> StatusCode {
        match self.kind {
            Kind::Invalid => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict => StatusCode::CONFLICT,
            Kind::NotModified => StatusCode::NOT_MODIFIED,
            Kind::Unauthorized => StatusCode::UNAUTHORIZED,
            Kind::Denied => StatusCode::FORBIDDEN,
            Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The same error with words before its message.
    pub(crate) fn context(mut self, words: impl std::fmt::Display) -> Self {
        self.message = format!("{words}: {}", self.message);
        self
    }
}

/// An error and its sources in one line.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

impl From<SandboxError> for Error {
    fn from(error: SandboxError) -> Self {
        let kind = match &error {
            // It is there, and says no.
            SandboxError::Tree { .. } => Kind::Internal,
            _ => Kind::Unavailable,
        };
        Self::new(kind, chain(&error))
    }
}

impl From<AgentError> for Error {
    fn from(error: AgentError) -> Self {
        use agent_api::ErrorKind as Agent;
        let kind = match &error {
            AgentError::Refused(refusal) => match refusal.kind {
                Agent::Invalid
                | Agent::CommandNotFound
                | Agent::CommandNotExecutable
                | Agent::StartFailed => Kind::Invalid,
                Agent::NotFound => Kind::NotFound,
                Agent::Conflict => Kind::Conflict,
                Agent::Unsupported => Kind::Unsupported,
                Agent::NoSpace | Agent::Internal => Kind::Internal,
            },
            AgentError::Sandbox(_) => Kind::Unavailable,
            _ => Kind::Internal,
        };
        Self::new(kind, chain(&error))
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        Self::internal(chain(&error))
    }
}

impl From<LogError> for Error {
    fn from(error: LogError) -> Self {
        Self::internal(chain(&error))
    }
}

impl From<coracle_image_store::Error> for Error {
    fn from(error: coracle_image_store::Error) -> Self {
        use coracle_image_store::ErrorKind as Images;
        let kind = match error.kind() {
            Images::NotFound => Kind::NotFound,
            Images::Conflict => Kind::Conflict,
            Images::InvalidInput => Kind::Invalid,
            _ => Kind::Internal,
        };
        Self::new(kind, chain(&error))
    }
}

impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::internal(format!("a task of the daemon ended early: {error}"))
    }
}
