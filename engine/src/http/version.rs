//! Versions of the Docker API, and which of them a client may ask for.

use std::fmt;

use crate::error::{Error, Result};

/// A version of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ApiVersion(pub(crate) u16, pub(crate) u16);

/// The newest that is served, and what a path without a version means.
pub(crate) const NEWEST: ApiVersion = ApiVersion(1, 51);
/// The oldest that is served.
pub(crate) const OLDEST: ApiVersion = ApiVersion(1, 24);

impl fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Reads a path's first piece: `v1.43`.
pub(crate) fn parse(segment: &str) -> Option<ApiVersion> {
    let (major, minor) = segment.strip_prefix('v')?.split_once('.')?;
    let number = |text: &str| -> Option<u16> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if digits { text.parse().ok() } else { None }
    };
    Some(ApiVersion(number(major)?, number(minor)?))
}

/// Refuses versions that are not served, in Docker's words.
pub(crate) fn check(version: ApiVersion) -> Result<ApiVersion> {
    if version < OLDEST {
        return Err(Error::invalid(format!(
            "client version {version} is too old. Minimum supported API version is {OLDEST}, please upgrade your client to a newer version"
        )));
    }
    if version > NEWEST {
        return Err(Error::invalid(format!(
            "client version {version} is too new. Maximum supported API version is {NEWEST}"
        )));
    }
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_bounded() {
        assert_eq!(parse("v1.41"), Some(ApiVersion(1, 41)));
        for no in ["1.41", "v1", "v1.", "v.1", "v1.x", "version", "v1.+4", "v99999.1"] {
            assert_eq!(parse(no), None, "{no}");
        }
        assert!(check(ApiVersion(1, 24)).is_ok() && check(NEWEST).is_ok());
        assert!(check(ApiVersion(1, 23)).unwrap_err().to_string().contains("too old"));
        assert!(check(ApiVersion(1, 52)).unwrap_err().to_string().contains("too new"));
        assert!(check(ApiVersion(2, 0)).is_err());
    }
}
