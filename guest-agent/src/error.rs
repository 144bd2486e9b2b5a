//! How failures become the API's errors: every one says at which step the kernel said no, and keeps the error number
//! as data.

use std::fmt::Display;
use std::io;

use coracle_agent_api::{ApiError, ErrorKind};

/// What a fallible operation of the agent returns.
pub(crate) type Result<T, E = ApiError> = std::result::Result<T, E>;

/// Turns an error of the kernel into an [`ApiError`] that names the step.
pub(crate) trait AtStep<T> {
    /// A failure that is the fault of the container's own set-up.
    fn at(self, step: impl Display) -> Result<T>;
    /// A failure of another kind.
    fn at_kind(self, kind: ErrorKind, step: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> AtStep<T> for std::result::Result<T, E> {
    fn at(self, step: impl Display) -> Result<T> {
        self.at_kind(ErrorKind::StartFailed, step)
    }

    fn at_kind(self, kind: ErrorKind, step: impl Display) -> Result<T> {
        self.map_err(|error| from_io(kind, step, &error.into()))
    }
}

/// An error of `kind` (or [`ErrorKind::NoSpace`], if that was the reason) for a failed step.
pub(crate) fn from_io(kind: ErrorKind, step: impl Display, error: &io::Error) -> ApiError {
    let errno = error.raw_os_error();
    let full = matches!(errno, Some(libc::ENOSPC | libc::EDQUOT));
    let kind = if full { ErrorKind::NoSpace } else { kind };
    ApiError { kind, message: format!("{step}: {}", describe(error)), errno }
}

/// The kernel's own words, lower case as C programs print them and without Rust's `(os error N)`.
pub(crate) fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// A malformed request.
pub(crate) fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Invalid, message)
}

/// Something that is not in the state that the request needs.
pub(crate) fn conflict(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Conflict, message)
}

/// Something that does not exist.
pub(crate) fn not_found(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::NotFound, message)
}
