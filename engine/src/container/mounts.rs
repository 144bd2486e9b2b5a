//! What a container wants to be mounted: `--volume`, `--mount`, `--volumes-from` and the image's `VOLUME`s, by Docker's rules and in its words.
//! All of it comes from clients and images and is checked here; paths are cleaned, so that two ways to write one path count as one.

pub(crate) mod confine;
mod request;
pub(crate) mod source;

use std::collections::{BTreeMap, HashSet};

use coracle_agent_api::TmpfsMount;
use serde_json::{Value, json};

use super::{
    config::{Config, HostConfig},
    record::{Attachment, Bind, Record},
};
use crate::{
    core::Core,
    error::{Error, Kind, Result},
};
use request::{bind_or_volume, destination, mount, target, tmpfs_options};
pub(crate) use request::{no_driver, no_driver_options};

/// A volume that a container wants. It is made if there is none of this name, or if it has no name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WantedVolume {
    pub(crate) name: Option<String>,
    /// Of the volume, if it is made.
    pub(crate) labels: BTreeMap<String, String>,
    /// Everything but the volume's name.
    pub(crate) attachment: Attachment,
}

impl WantedVolume {
    fn new(name: Option<String>, path: String) -> Self {
        let attachment = Attachment {
            volume: String::new(),
            path,
            subpath: String::new(),
            readonly: false,
            no_copy: false,
            mode: String::new(),
        };
        Self { name, labels: BTreeMap::new(), attachment }
    }
}

/// What a container wants in one place.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Mount {
    Volume(WantedVolume),
    Bind(Bind),
}

impl Mount {
    fn path(&self) -> &str {
        match self {
            Self::Volume(wanted) => &wanted.attachment.path,
            Self::Bind(bind) => &bind.path,
        }
    }
}

/// Everything that a container wants to be mounted, in no particular order.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) volumes: Vec<WantedVolume>,
    pub(crate) binds: Vec<Bind>,
}

/// Checks what a request says, without a look at other containers or at the host.
pub(super) fn check(config: &Config, host: &HostConfig) -> Result<()> {
    if !matches!(host.volume_driver.as_str(), "" | "local") {
        return Err(no_driver(Kind::Invalid, &host.volume_driver));
    }
    for path in config.volumes.keys() {
        destination(path)?;
    }
    for from in &host.volumes_from {
        volumes_from(from)?;
    }
    own(host).map(drop)
}

/// What a container wants. The image's volumes are among `config`'s already.
pub(crate) fn wanted(core: &Core, config: &Config, host: &HostConfig) -> Result<Wanted> {
    let own = own(host)?;
    let mut all = BTreeMap::new();
    for from in &host.volumes_from {
        let (container, readonly) = volumes_from(from)?;
        // As above, not a 404.
        let found = core.containers.find(container).map_err(|error| Error::invalid(error.to_string()))?;
        let inherited = inherited(&found.record(), readonly);
        all.extend(inherited.into_iter().map(|mount| (mount.path().to_owned(), mount)));
    }
    all.extend(own.into_iter().map(|mount| (mount.path().to_owned(), mount)));
    let tmpfs: HashSet<String> = host.tmpfs.keys().map(|path| clean(path)).collect();
    let mounted: HashSet<String> = tmpfs_targets(host).collect();
    for path in config.volumes.keys() {
        let path = destination(path)?;
        if !tmpfs.contains(&path) && !mounted.contains(&path) {
            all.entry(path.clone()).or_insert_with(|| Mount::Volume(WantedVolume::new(None, path)));
        }
    }
    let mut wanted = Wanted::default();
    for mount in all.into_values() {
        match mount {
            Mount::Volume(volume) => wanted.volumes.push(volume),
            Mount::Bind(bind) => wanted.binds.push(bind),
        }
    }
    Ok(wanted)
}

/// What `--volumes-from` takes over of a container.
fn inherited(record: &Record, readonly: bool) -> Vec<Mount> {
    let volumes = record.volumes.iter().cloned().map(move |attachment| {
        let name = Some(attachment.volume.clone());
        let readonly = attachment.readonly | readonly;
        Mount::Volume(WantedVolume {
            name,
            labels: BTreeMap::new(),
            attachment: Attachment { readonly, ..attachment },
        })
    });
    let binds = record.binds.iter().cloned().map(move |bind| {
        let readonly = bind.readonly | readonly;
        // As Docker: the mode was the other container's.
        Mount::Bind(Bind { readonly, mode: String::new(), ..bind })
    });
    volumes.chain(binds).collect()
}

/// What `--mount type=tmpfs` asks for.
pub(super) fn tmpfs(host: &HostConfig) -> Result<Vec<TmpfsMount>> {
    let tmpfs = host.mounts.iter().filter(|mount| mount.kind == "tmpfs");
    tmpfs
        .map(|mount| {
            Ok(TmpfsMount { path: target(&mount.kind, &mount.target)?, options: tmpfs_options(mount)? })
        })
        .collect()
}

/// The `Mounts` of `inspect` and of lists.
pub(crate) fn describe(core: &Core, record: &Record) -> Value {
    let volume = |attachment: &Attachment| {
        json!({
            "Type": "volume",
            "Name": attachment.volume,
            "Source": core.volumes.find(&attachment.volume).map(|volume| volume.mountpoint()).unwrap_or_default(),
            "Destination": attachment.path,
            "Driver": "local",
            "Mode": attachment.mode,
            "RW": !attachment.readonly,
            "Propagation": "",
        })
    };
    let tmpfs = record.host_config.mounts.iter().filter(|mount| mount.kind == "tmpfs").map(|mount| {
        json!({
            "Type": "tmpfs",
            "Source": "",
            "Destination": clean(&mount.target),
            "Mode": "",
            "RW": !mount.read_only,
            "Propagation": "",
        })
    });
    let bind = |bind: &Bind| {
        json!({
            "Type": "bind",
            "Source": bind.source,
            "Destination": bind.path,
            "Mode": bind.mode,
            "RW": !bind.readonly,
            "Propagation": bind.propagation,
        })
    };
    record.binds.iter().map(bind).chain(record.volumes.iter().map(volume)).chain(tmpfs).collect()
}

/// Refuses a path in a stopped container that leads into a tree of the host that is mounted when it runs: what is there without it is not
/// what is meant.
pub(crate) fn check_stopped(record: &Record, path: &str) -> Result<()> {
    let path = clean(path);
    let inside =
        |place: &str| path.strip_prefix(place).filter(|rest| rest.is_empty() || rest.starts_with('/'));
    // The deepest mount is the one that counts.
    let binds = record.binds.iter().map(|bind| (bind.path.as_str(), Some(bind)));
    let volumes = record.volumes.iter().map(|volume| (volume.path.as_str(), None));
    let mounts = binds.chain(volumes).filter_map(|mount| inside(mount.0).map(|rest| (mount, rest)));
    match mounts.max_by_key(|((place, _), _)| place.len()) {
        Some(((_, Some(bind)), rest)) => {
            let on_host = format!("{}{rest}", bind.source.trim_end_matches('/'));
            Err(Error::unsupported(format!(
                "{} is {} on the host, which Coracle reaches only while the container runs: start it first",
                shown(&path),
                shown(&on_host)
            )))
        }
        _ => Ok(()),
    }
}

/// Binds and mounts; none of them may have the same place as another one.
fn own(host: &HostConfig) -> Result<Vec<Mount>> {
    let mut places: HashSet<String> = host.tmpfs.keys().map(|path| clean(path)).collect();
    let mut take = |path: &str| match places.insert(path.to_owned()) {
        true => Ok(()),
        false => Err(Error::invalid(format!("Duplicate mount point: {}", shown(path)))),
    };
    let mut all = Vec::new();
    for text in &host.binds {
        let wanted = bind_or_volume(text)?;
        take(wanted.path())?;
        all.push(wanted);
    }
    for request in &host.mounts {
        let wanted = mount(request)?;
        take(&target(&request.kind, &request.target)?)?;
        all.extend(wanted);
    }
    Ok(all)
}

fn volumes_from(text: &str) -> Result<(&str, bool)> {
    let (container, mode) = text.split_once(':').unwrap_or((text, "rw"));
    if container.is_empty() {
        return Err(Error::invalid(format!("malformed volumes-from specification: '{}'", shown(text))));
    }
    match mode {
        "rw" | "z" | "Z" | "rw,z" | "rw,Z" => Ok((container, false)),
        "ro" | "ro,z" | "ro,Z" => Ok((container, true)),
        other => Err(Error::invalid(format!("invalid mode for volumes-from: {}", shown(other)))),
    }
}

fn tmpfs_targets(host: &HostConfig) -> impl Iterator<Item = String> {
    host.mounts.iter().filter(|mount| mount.kind == "tmpfs").map(|mount| clean(&mount.target))
}

/// A path without `.`, `..` and double slashes, as Go's filepath.Clean has it.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn shown(text: &str) -> String {
    text.chars().take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(json: &str) -> HostConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn one_place_can_be_taken_once() {
        for twice in [
            r#"{"Binds":["a1:/x","b1:/x/."]}"#,
            r#"{"Binds":["/a:/x","/b:/x/"]}"#,
            r#"{"Binds":["/a:/x"],"Mounts":[{"Type":"bind","Source":"/a","Target":"/x"}]}"#,
            r#"{"Binds":["a1:/x"],"Mounts":[{"Type":"volume","Target":"/x"}]}"#,
            r#"{"Tmpfs":{"/x":""},"Mounts":[{"Type":"tmpfs","Target":"/x/"}]}"#,
        ] {
            let error = own(&host(twice)).unwrap_err();
            assert_eq!(error.to_string(), "Duplicate mount point: /x", "{twice}");
        }
    }

    #[test]
    fn a_tmpfs_mount_becomes_options() {
        let config = host(
            r#"{"Mounts":[{"Type":"tmpfs","Target":"/x","ReadOnly":true,"TmpfsOptions":{"SizeBytes":1048576,"Mode":1049087,"Options":[["exec"],["uid","5"]]}}]}"#,
        );
        assert_eq!(tmpfs(&config).unwrap()[0].options, "ro,size=1048576,mode=1777,exec,uid=5");
    }
}
