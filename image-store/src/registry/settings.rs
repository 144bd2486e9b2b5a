//! What the person says of registries: which may be spoken to without TLS, which stand in for Docker Hub, where further
//! certificates are; and from it, where a registry is to be asked. Names come from clients and are untrusted, settings are not.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use url::Url;

use super::error::RegistryError;

/// Docker Hub's name in references, and where its registry is.
pub(super) const HUB: &str = "docker.io";
const HUB_REGISTRY: &str = "https://registry-1.docker.io/";
const HUB_INDEX: &str = "https://index.docker.io/";

/// How registries are spoken to.
#[derive(Debug, Clone)]
pub struct RegistrySettings {
    /// Registries (`host`, `host:port`, or networks as `10.0.0.0/8`) whose certificate is not checked, and that may speak
    /// plain HTTP. Loopback addresses and `localhost` always count as such, unless a CA is there for them.
    pub insecure_registries: Vec<String>,
    /// Registries that are asked before Docker Hub for Docker Hub's images, by URL. They never see its credentials.
    pub mirrors: Vec<String>,
    /// Folders that may hold a folder `HOST:PORT` with `*.crt` (CAs) and `*.cert` and `*.key` (this client's own).
    pub certificate_folders: Vec<PathBuf>,
    /// Which proxies to use.
    pub proxies: Proxies,
    /// How this program introduces itself.
    pub user_agent: String,
    /// When to try again.
    pub retries: Retries,
}

impl Default for RegistrySettings {
    fn default() -> Self {
        Self {
            insecure_registries: Vec::new(),
            mirrors: Vec::new(),
            certificate_folders: Vec::new(),
            proxies: Proxies::default(),
            user_agent: concat!("coracle/", env!("CARGO_PKG_VERSION")).to_owned(),
            retries: Retries::default(),
        }
    }
}

/// Which proxies to use. Loopback addresses are never reached through one.
#[derive(Debug, Clone, Default)]
pub enum Proxies {
    /// What `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` say.
    #[default]
    Environment,
    /// These, whatever the environment says.
    Fixed {
        /// For `http:`.
        http: String,
        /// For `https:`.
        https: String,
        /// Not for these hosts.
        no: String,
    },
}

impl Proxies {
    pub(super) fn matcher(&self) -> Matcher {
        match self {
            Self::Environment => Matcher::from_env(),
            Self::Fixed { http, https, no } => {
                Matcher::builder().http(http.as_str()).https(https.as_str()).no(no.as_str()).build()
            }
        }
    }
}

/// When to try again after a broken connection, a 429 or a 5xx.
#[derive(Debug, Clone, Copy)]
pub struct Retries {
    /// How often at most, without any progress between.
    pub attempts: u32,
    /// How long to wait before the second attempt; doubled for each further one.
    pub delay: Duration,
    /// The longest wait, also if the registry asks for more.
    pub max_delay: Duration,
    /// How long to wait for the next bytes.
    pub idle: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            attempts: 5,
            delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(60),
            idle: Duration::from_secs(60),
        }
    }
}

impl Retries {
    /// How long to wait after this many failures in a row.
    pub(super) fn delay_after(&self, failures: u32) -> Duration {
        self.delay.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(self.max_delay)
    }
}

/// One place where a registry's API may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// With a path of `/`.
    pub(super) base: Url,
    /// It stands in for Docker Hub.
    pub(super) is_mirror: bool,
    /// Its certificate is not checked, and it may lead to plain HTTP.
    pub(super) is_insecure: bool,
}

impl RegistrySettings {
    /// Where to ask for images of this registry, in order.
    pub(super) fn endpoints(&self, domain: &str, for_push: bool) -> Result<Vec<Endpoint>, RegistryError> {
        if domain != HUB {
            return self.own_endpoints(domain);
        }
        let mut endpoints = Vec::new();
        if !for_push {
            for mirror in &self.mirrors {
                endpoints.push(self.mirror(mirror)?);
            }
        }
        endpoints.push(Endpoint { base: parse(HUB_REGISTRY)?, is_mirror: false, is_insecure: false });
        Ok(endpoints)
    }

    /// Where `docker search` asks.
    pub(super) fn search_endpoints(&self, domain: &str) -> Result<Vec<Endpoint>, RegistryError> {
        match domain {
            HUB => Ok(vec![Endpoint { base: parse(HUB_INDEX)?, is_mirror: false, is_insecure: false }]),
            other => self.own_endpoints(other),
        }
    }

    fn own_endpoints(&self, domain: &str) -> Result<Vec<Endpoint>, RegistryError> {
        let is_insecure = self.is_insecure(domain);
        let endpoint = |scheme: &str| {
            let base = parse(&format!("{scheme}://{domain}/"))?;
            Ok::<_, RegistryError>(Endpoint { base, is_mirror: false, is_insecure })
        };
        let mut endpoints = vec![endpoint("https")?];
        if is_insecure {
            endpoints.push(endpoint("http")?);
        }
        Ok(endpoints)
    }

    fn mirror(&self, text: &str) -> Result<Endpoint, RegistryError> {
        let base = check_mirror(text)?;
        let host = base.host_str().unwrap_or_default();
        let authority = base.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let is_insecure = base.scheme() == "http" || self.is_insecure(&authority);
        Ok(Endpoint { base, is_mirror: true, is_insecure })
    }

    /// Whether a registry may be spoken to without a checked certificate.
    pub(super) fn is_insecure(&self, domain: &str) -> bool {
        let host = host_of(domain);
        let address: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
        let is_listed = self.insecure_registries.iter().any(|entry| {
            entry == domain
                || entry == host
                || address.is_some_and(|address| network(entry).is_some_and(|net| net.contains(address)))
        });
        is_listed || (is_loopback(host) && !self.has_ca(domain))
    }

    fn has_ca(&self, domain: &str) -> bool {
        self.certificate_folders.iter().any(|folder| folder.join(domain).is_dir())
    }
}

/// A mirror as the settings may have it: the root of an HTTP server.
pub fn check_mirror(text: &str) -> Result<Url, RegistryError> {
    let refused = |reason: &str| {
        RegistryError::Settings(format!("the registry mirror `{text}` cannot be used: {reason}"))
    };
    let url = Url::parse(text).map_err(|error| refused(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(refused("it must be a URL such as https://mirror.example"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused("it must not contain a user name or a password"));
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
        return Err(refused("it must not have a path, a query or a fragment"));
    }
    Ok(url)
}

fn parse(text: &str) -> Result<Url, RegistryError> {
    Url::parse(text)
        .map_err(|error| RegistryError::Settings(format!("`{text}` is no registry's address: {error}")))
}

/// A domain without its port.
fn host_of(domain: &str) -> &str {
    match domain.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.ends_with(':') => host,
        _ => domain,
    }
}

/// Whether a host is this machine by its very name; other names are not looked up, because whoever answers could lie.
pub(super) fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost")
        || host.to_ascii_lowercase().ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    fn contains(&self, other: IpAddr) -> bool {
        match (self.address, other) {
            (IpAddr::V4(net), IpAddr::V4(other)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                (net.to_bits() ^ other.to_bits()) & mask == 0
            }
            (IpAddr::V6(net), IpAddr::V6(other)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                (net.to_bits() ^ other.to_bits()) & mask == 0
            }
            _ => false,
        }
    }
}

fn network(text: &str) -> Option<Network> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= most)?;
    Some(Network { address, prefix })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(settings: &RegistrySettings, domain: &str) -> Vec<String> {
        settings.endpoints(domain, false).unwrap().into_iter().map(|e| e.base.to_string()).collect()
    }

    #[test]
    fn loopback_and_listed_registries_may_speak_plain_http() {
        let settings = RegistrySettings {
            insecure_registries: vec!["plain.example:5000".to_owned(), "10.0.0.0/8".to_owned()],
            ..RegistrySettings::default()
        };
        for domain in [
            "localhost:5000",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]:5000",
            "plain.example:5000",
            "10.1.2.3:5000",
        ] {
            assert_eq!(
                bases(&settings, domain),
                [format!("https://{domain}/"), format!("http://{domain}/")]
                    .map(|base| Url::parse(&base).unwrap().to_string()),
                "{domain}"
            );
        }
        for domain in ["plain.example", "other.example:5000", "11.0.0.1", "localhost.example"] {
            assert_eq!(bases(&settings, domain), [format!("https://{domain}/")], "{domain}");
        }
    }

    #[test]
    fn a_loopback_registry_with_a_ca_is_checked() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("localhost:5000")).unwrap();
        let settings = RegistrySettings {
            certificate_folders: vec![folder.path().to_owned()],
            ..RegistrySettings::default()
        };
        assert_eq!(bases(&settings, "localhost:5000"), ["https://localhost:5000/"]);
        assert!(settings.is_insecure("localhost:5001"));
    }

    #[test]
    fn mirrors_stand_before_docker_hub_only_and_not_for_pushes() {
        let settings = RegistrySettings {
            mirrors: vec!["http://127.0.0.1:5000".to_owned(), "https://mirror.example/".to_owned()],
            ..RegistrySettings::default()
        };
        assert_eq!(
            bases(&settings, "docker.io"),
            ["http://127.0.0.1:5000/", "https://mirror.example/", HUB_REGISTRY]
        );
        assert_eq!(bases(&settings, "quay.io"), ["https://quay.io/"]);
        assert_eq!(settings.endpoints("docker.io", true).unwrap().len(), 1);
    }

    #[test]
    fn mirrors_that_are_no_plain_servers_are_refused() {
        for bad in ["mirror.example", "ftp://x/", "https://a:b@x/", "https://x/v2", "https://x/?y", ""] {
            assert!(check_mirror(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn waits_grow_and_are_bounded() {
        let retries = Retries::default();
        assert_eq!(retries.delay_after(1), Duration::from_secs(1));
        assert_eq!(retries.delay_after(3), Duration::from_secs(4));
        assert_eq!(retries.delay_after(u32::MAX), retries.max_delay);
    }
}
