//! What is known of a container; one JSON record on disk.

use std::collections::BTreeMap;

use coracle_agent_api::ProcessId;
use coracle_image_store::ImageId;
use serde::{Deserialize, Serialize};

use super::{
    config::{Config, HostConfig},
    signal,
    state::State,
};
use crate::{networks::endpoint::Attached, ports::Published, sandbox::SandboxId, time::UnixNanos};

/// A container is called by the id of its first process.
pub(crate) type ContainerId = ProcessId;

/// Seconds that Docker gives a container to end when nothing else is said.
const DEFAULT_STOP_TIMEOUT: i64 = 10;

/// Form of the records; rises when an old daemon could not read a new one's.
const FORMAT: u32 = 1;

/// See the module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    format: u32,
    pub(crate) id: ContainerId,
    pub(crate) name: String,
    pub(crate) created: UnixNanos,
    pub(crate) sandbox: SandboxId,
    image: String,
    pub(crate) platform: String,
    pub(crate) config: Config,
    pub(crate) host_config: HostConfig,
    /// The volumes that are mounted.
    #[serde(default)]
    pub(crate) volumes: Vec<Attachment>,
    /// The directories and files of the host that are mounted.
    #[serde(default)]
    pub(crate) binds: Vec<Bind>,
    /// The networks that it is on, by name.
    #[serde(default)]
    pub(crate) networks: BTreeMap<String, Attached>,
    /// Where its ports are on the host, while it runs; where they were last, otherwise.
    #[serde(default)]
    pub(crate) ports: Vec<Published>,
    pub(crate) state: State,
}

/// A volume in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// The volume's name.
    pub(crate) volume: String,
    /// Where it is mounted.
    pub(crate) path: String,
    /// Which directory of it; empty for all of it.
    pub(crate) subpath: String,
    pub(crate) readonly: bool,
    /// It is not filled from the image.
    pub(crate) no_copy: bool,
    /// The mode as the client wrote it.
    pub(crate) mode: String,
}

/// A directory or a file of the host in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bind {
    /// Where it is on the host: an absolute path, cleaned, whose symbolic links are followed at each start.
    pub(crate) source: String,
    /// Where it is mounted.
    pub(crate) path: String,
    pub(crate) readonly: bool,
    /// If there is nothing, an empty directory is made.
    pub(crate) create: bool,
    /// The mode as the client wrote it.
    pub(crate) mode: String,
    /// How mounts beneath it spread, in Docker's word.
    pub(crate) propagation: String,
    /// It is the engine's own socket, whatever is at that path on the host.
    #[serde(default)]
    pub(crate) engine: bool,
    /// It must not lead out of the last of these trees of the host, nor that one out of the one before it: a container asked for it, which
    /// has the last one.
    #[serde(default)]
    pub(crate) within: Vec<String>,
}

/// Why bytes are no record.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("it is not readable")]
    Json(#[from] serde_json::Error),
    #[error("it was written by a newer version (format {0})")]
    Format(u32),
    #[error("it names no image")]
    Image,
}

impl Record {
    pub(crate) fn new(
        id: ContainerId,
        name: String,
        sandbox: SandboxId,
        image: &ImageId,
        platform: String,
        config: Config,
        host_config: HostConfig,
    ) -> Self {
        let created = UnixNanos::now();
        let image = image.to_string();
        let state = State::created();
        Self {
            format: FORMAT,
            id,
            name,
            created,
            sandbox,
            image,
            platform,
            config,
            host_config,
            volumes: Vec::new(),
            binds: Vec::new(),
            networks: BTreeMap::new(),
            ports: Vec::new(),
            state,
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let record: Self = serde_json::from_slice(bytes)?;
        if record.format > FORMAT {
            return Err(RecordError::Format(record.format));
        }
        record.image.parse::<ImageId>().map_err(|_| RecordError::Image)?;
        Ok(record)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record has no map with odd keys")
    }

    pub(crate) fn image(&self) -> ImageId {
        self.image.parse().expect("checked when the record was made or read")
    }

    /// The signal that asks it to end.
    pub(crate) fn stop_signal(&self) -> u8 {
        self.config
            .stop_signal
            .as_deref()
            .and_then(|text| signal::parse(text).ok())
            .unwrap_or(signal::SIGTERM)
    }

    /// Seconds between that signal and SIGKILL; negative is for ever.
    pub(crate) fn stop_timeout(&self) -> i64 {
        self.config.stop_timeout.unwrap_or(DEFAULT_STOP_TIMEOUT)
    }

    /// What its events carry.
    pub(crate) fn event_attributes(&self) -> BTreeMap<String, String> {
        let mut attributes = self.config.labels.clone();
        attributes.insert("image".to_owned(), self.config.image.clone());
        attributes.insert("name".to_owned(), self.name.clone());
        attributes
    }
}
