//! The engine's way to registries: the settings as they are at each call, and credentials as clients send them.

use std::{fmt, sync::Arc};

use coracle_image_store::{
    Reference,
    registry::{Credentials, RegistryError, RegistryErrorKind, RegistrySettings},
};
use http::HeaderMap;

use crate::error::{Error, Kind, Result, chain};

type Load = dyn Fn() -> Result<RegistrySettings, String> + Send + Sync;

/// Where the settings for registries come from; asked at each call, so that a change counts at once.
#[derive(Clone)]
pub struct RegistrySource(Arc<Load>);

impl RegistrySource {
    /// From whatever reads them.
    pub fn new(load: impl Fn() -> Result<RegistrySettings, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(load))
    }

    pub(crate) fn load(&self) -> Result<RegistrySettings> {
        (self.0)().map_err(Error::internal)
    }
}

impl Default for RegistrySource {
    fn default() -> Self {
        Self::new(|| Ok(RegistrySettings::default()))
    }
}

impl fmt::Debug for RegistrySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegistrySource")
    }
}

/// Whom the client says it is: the `X-Registry-Auth` header.
pub(crate) fn credentials(headers: &HeaderMap) -> Result<Option<Credentials>> {
    let Some(value) = headers.get("x-registry-auth") else { return Ok(None) };
    let text = value.to_str().map_err(|_| Error::invalid("the X-Registry-Auth header is not text"))?;
    Ok(Credentials::from_header(text)?)
}

/// A name of an image from a client.
pub(crate) fn reference(text: &str) -> Result<Reference> {
    Reference::parse(text).map_err(|error| Error::invalid(error.to_string()))
}

/// The registry that credentials are for: `https://index.docker.io/v1/`, `localhost:5000`, `https://quay.io`.
pub(crate) fn server_domain(address: &str) -> Result<String> {
    let bare =
        address.strip_prefix("https://").or_else(|| address.strip_prefix("http://")).unwrap_or(address);
    let host = bare.split('/').next().unwrap_or_default();
    if matches!(host, "" | "index.docker.io" | "docker.io" | "registry-1.docker.io") {
        return Ok("docker.io".to_owned());
    }
    // By way of a reference, so that nothing but a host gets through; a bare name is a host here, too.
    let shown: String = host.chars().take(80).collect();
    let bad = || Error::invalid(format!("invalid registry address: {shown}"));
    let is_dotted = host.contains(['.', ':']) || host == "localhost";
    let text = if is_dotted { format!("{host}/x") } else { format!("{host}:443/x") };
    let reference = Reference::parse(&text).map_err(|_| bad())?;
    let domain = reference.domain();
    Ok(if is_dotted { domain.to_owned() } else { domain.trim_end_matches(":443").to_owned() })
}

impl From<RegistryError> for Error {
    fn from(error: RegistryError) -> Self {
        let kind = match error.kind() {
            RegistryErrorKind::NotFound => Kind::NotFound,
            // Not 401, upon which Docker's CLI asks for a password in the middle of a pull: only a login is answered so.
            RegistryErrorKind::Unauthorized => Kind::Internal,
            RegistryErrorKind::Denied => Kind::Denied,
            RegistryErrorKind::InvalidInput | RegistryErrorKind::Unsupported => Kind::Invalid,
            RegistryErrorKind::Internal => Kind::Internal,
        };
        Self::new(kind, chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_servers_lead_to_registries() {
        for (address, domain) in [
            ("https://index.docker.io/v1/", "docker.io"),
            ("", "docker.io"),
            ("localhost:5000", "localhost:5000"),
            ("https://quay.io", "quay.io"),
            ("http://10.0.0.1:5000/v2/", "10.0.0.1:5000"),
            ("intranet", "intranet"),
        ] {
            assert_eq!(server_domain(address).unwrap(), domain, "{address}");
        }
        for bad in ["a b", "user@host.example", "host:port:1", "-x.y"] {
            assert!(server_domain(bad).is_err(), "{bad}");
        }
    }
}
