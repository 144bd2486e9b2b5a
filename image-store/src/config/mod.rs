//! Image configs as Docker and OCI define them: what to run and as whom, the layers' diff ids, the history. They
//! come from whoever made the image: unknown fields are skipped, `null` means "not there", and what has the wrong type
//! or no valid digest is an error, so that a bad image fails when it is loaded and not when it is run.

mod changes;
mod syntax;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use changes::{ChangeError, apply as apply_changes};

use crate::digest::Digest;

/// A whole config.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// CPU architecture by Go's name (`amd64`); empty if the image does not say.
    #[serde(default, deserialize_with = "or_default")]
    pub architecture: String,
    /// Operating system by Go's name (`linux`); empty if the image does not say.
    #[serde(default, deserialize_with = "or_default")]
    pub os: String,
    /// Variant of the architecture (`v8`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Version of the operating system, which only Windows images have.
    #[serde(default, rename = "os.version", skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Who made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// When it was made.
    #[serde(default, deserialize_with = "timestamp", skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// How to run it.
    #[serde(default, deserialize_with = "or_default")]
    pub config: ContainerConfig,
    /// Its layers.
    #[serde(default)]
    pub rootfs: RootFs,
    /// How it came to be, oldest first.
    #[serde(default, deserialize_with = "or_default")]
    pub history: Vec<History>,
}

/// The layers of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Digests of the uncompressed layers, lowest first.
    #[serde(default, deserialize_with = "or_default")]
    pub diff_ids: Vec<Digest>,
}

/// One step of an image's making.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// When.
    #[serde(default, deserialize_with = "timestamp", skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// By which command.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub created_by: String,
    /// By whom.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub author: String,
    /// With what remark.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// It made no layer.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

/// What a container of the image runs unless told otherwise. Absent fields are empty or `None`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerConfig {
    /// `user[:group]`, by name or number; empty for root.
    #[serde(default, deserialize_with = "or_default")]
    pub user: String,
    /// Ports that the image documents: `80/tcp`.
    #[serde(default, with = "key_set", skip_serializing_if = "BTreeSet::is_empty")]
    pub exposed_ports: BTreeSet<String>,
    /// `NAME=value` pairs.
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// The program and its first arguments.
    #[serde(default, deserialize_with = "words")]
    pub entrypoint: Option<Vec<String>>,
    /// Arguments, or the program if there is no entrypoint.
    #[serde(default, deserialize_with = "words")]
    pub cmd: Option<Vec<String>>,
    /// Paths that become anonymous volumes.
    #[serde(default, with = "key_set", skip_serializing_if = "BTreeSet::is_empty")]
    pub volumes: BTreeSet<String>,
    /// Where the program starts; empty for `/`.
    #[serde(default, deserialize_with = "or_default")]
    pub working_dir: String,
    /// Labels.
    #[serde(default, deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// Signal that stops it, by name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Seconds to wait after that signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<i64>,
    /// The health check, as it stands in the config.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<serde_json::Value>,
    /// The shell for commands in shell form.
    #[serde(default, deserialize_with = "words", skip_serializing_if = "Option::is_none")]
    pub shell: Option<Vec<String>>,
    /// Triggers for builds on top.
    #[serde(default, deserialize_with = "or_default")]
    pub on_build: Vec<String>,
    /// The command is already escaped (Windows only).
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "std::ops::Not::not")]
    pub args_escaped: bool,
}

/// Why a config is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is no JSON of the right shape.
    #[error("the image config is malformed")]
    Json(#[source] serde_json::Error),
    /// Its `rootfs` is of another kind.
    #[error("the image config's rootfs is of type `{0}`, not `layers`")]
    RootFs(String),
}

impl ImageConfig {
    /// Parses and checks a config.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(json).map_err(ConfigError::Json)?;
        match config.rootfs.kind.as_str() {
            "layers" => Ok(config),
            other => Err(ConfigError::RootFs(other.chars().take(64).collect())),
        }
    }

    /// The platform that the image is made for.
    pub fn platform(&self) -> Platform {
        let or =
            |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
        let host = Platform::host();
        Platform {
            os: or(&self.os, &host.os),
            architecture: or(&self.architecture, &host.architecture),
            variant: self.variant.clone().filter(|variant| !variant.is_empty()),
        }
    }
}

/// Operating system and architecture by Go's names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// `v7`, `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// What containers on this machine run: Linux, on the machine's own architecture.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// How well an image for `offered` serves where this platform is asked for, 0 being best; `None` if not at all. A
    /// processor runs what was made for an older variant of itself.
    pub(crate) fn accepts(&self, offered: &Self) -> Option<u8> {
        if (&self.os, &self.architecture) != (&offered.os, &offered.architecture) {
            return None;
        }
        let (wanted, offered) = (self.variant_number()?, offered.variant_number()?);
        wanted.checked_sub(offered)
    }

    /// The variant as a number; what is usual for the architecture if none is said.
    fn variant_number(&self) -> Option<u8> {
        let usual = match self.architecture.as_str() {
            "arm64" => 8,
            "arm" => 7,
            _ => 1,
        };
        match self.variant.as_deref().filter(|variant| !variant.is_empty()) {
            None => Some(usual),
            Some(variant) => variant.strip_prefix('v')?.split('.').next()?.parse().ok(),
        }
    }

    /// Whether this machine's containers can run it.
    pub fn runs_on_host(&self) -> bool {
        let host = Self::host();
        (&self.os, &self.architecture) == (&host.os, &host.architecture)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// Why a text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no platform of the form OS/ARCHITECTURE[/VARIANT], for example linux/amd64")]
pub struct InvalidPlatform(String);

/// As people write it: `linux/arm64/v8`, `linux/amd64`, or the architecture alone. Other names of architectures count.
impl FromStr for Platform {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Self, InvalidPlatform> {
        let invalid = || InvalidPlatform(text.chars().take(80).collect());
        let is_word = |word: &str| {
            word.starts_with(|first: char| first.is_ascii_alphanumeric())
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        };
        let parts: Vec<String> = text.split('/').map(str::to_ascii_lowercase).collect();
        if !parts.iter().all(|part| is_word(part)) {
            return Err(invalid());
        }
        let (os, architecture, variant) = match parts.as_slice() {
            [one] if is_os(one) => (one.clone(), Self::host().architecture, None),
            [architecture] => ("linux".to_owned(), architecture.clone(), None),
            [os, architecture] => (os.clone(), architecture.clone(), None),
            [os, architecture, variant] => (os.clone(), architecture.clone(), Some(variant.clone())),
            _ => return Err(invalid()),
        };
        let (architecture, variant) = match (architecture.as_str(), variant) {
            ("x86_64" | "x86-64", variant) => ("amd64".to_owned(), variant),
            ("i386" | "i686", _) => ("386".to_owned(), None),
            ("aarch64", variant) => ("arm64".to_owned(), variant),
            ("armhf", _) => ("arm".to_owned(), Some("v7".to_owned())),
            ("armel", _) => ("arm".to_owned(), Some("v6".to_owned())),
            (_, variant) => (architecture, variant),
        };
        Ok(Self { os, architecture, variant })
    }
}

fn is_os(word: &str) -> bool {
    matches!(
        word,
        "linux" | "windows" | "darwin" | "freebsd" | "netbsd" | "openbsd" | "solaris" | "aix" | "plan9"
    )
}

/// `null` is the default.
pub(crate) fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
}

/// RFC 3339; empty text counts as absent.
fn timestamp<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Timestamp>, D::Error> {
    match Option::<String>::deserialize(from)?.filter(|text| !text.is_empty()) {
        Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
        None => Ok(None),
    }
}

/// Old builders wrote a single word where a list belongs.
fn words<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Words {
        One(String),
        Many(Vec<String>),
    }
    Ok(Option::<Words>::deserialize(from)?.map(|words| match words {
        Words::One(word) => vec![word],
        Words::Many(words) => words,
    }))
}

/// Sets that Docker writes as objects with empty values.
mod key_set {
    use super::*;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeSet<String>, D::Error> {
        let keys = Option::<BTreeMap<String, serde::de::IgnoredAny>>::deserialize(from)?;
        Ok(keys.unwrap_or_default().into_keys().collect())
    }

    pub(super) fn serialize<S: Serializer>(keys: &BTreeSet<String>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(keys.iter().map(|key| (key, BTreeMap::<(), ()>::new())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_with_nulls_and_old_forms_parses() {
        let json = br#"{"architecture":"amd64","os":"linux","created":"2020-01-02T03:04:05.000000006Z",
            "config":{"Env":null,"Entrypoint":"/bin/x","Cmd":["a"],"ExposedPorts":{"80/tcp":{}},"Volumes":null,
                      "Labels":null,"Healthcheck":{"Test":["NONE"]},"Unknown":1},
            "rootfs":{"type":"layers","diff_ids":null},"history":[{"created_by":"x","empty_layer":true}]}"#;
        let config = ImageConfig::parse(json).unwrap();
        assert_eq!(config.config.entrypoint.as_deref(), Some(&["/bin/x".to_owned()][..]));
        assert_eq!(config.config.exposed_ports.len(), 1);
        assert!(config.history[0].empty_layer);
        assert_eq!(config.created.unwrap().subsec_nanosecond(), 6);
        let again = serde_json::to_vec(&config).unwrap();
        assert_eq!(ImageConfig::parse(&again).unwrap(), config);
    }

    #[test]
    fn platforms_are_read_as_people_write_them() {
        for (text, platform) in [
            ("linux/amd64", "linux/amd64"),
            ("Linux/ARM64/v8", "linux/arm64/v8"),
            ("x86_64", "linux/amd64"),
            ("linux/armhf", "linux/arm/v7"),
            ("windows/amd64", "windows/amd64"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), platform);
        }
        for bad in ["", "/", "linux/", "a/b/c/d", "linux/am d64", "../x"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
        let host = Platform { os: "linux".to_owned(), ..Platform::host() };
        assert_eq!("linux".parse(), Ok(host));
    }

    #[test]
    fn malformed_configs_are_refused() {
        for json in [
            &b""[..],
            b"[]",
            b"{}",
            br#"{"rootfs":{"type":"windows"}}"#,
            br#"{"rootfs":{"type":"layers","diff_ids":["sha256:../../etc"]}}"#,
            br#"{"rootfs":{"type":"layers"},"config":{"Env":"x"}}"#,
            br#"{"rootfs":{"type":"layers"},"created":"yesterday"}"#,
        ] {
            assert!(ImageConfig::parse(json).is_err(), "{}", String::from_utf8_lossy(json));
        }
    }
}
