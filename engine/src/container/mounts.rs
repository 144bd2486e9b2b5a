//! Which volumes a container wants: `--volume`, `--mount`, `--volumes-from` and the image's `VOLUME`s, by Docker's rules and in its words.
//! All of it comes from clients and images and is checked here; paths are cleaned, so that two ways to write one path count as one.

use std::collections::{BTreeMap, HashSet};

use coracle_agent_api::TmpfsMount;
use serde_json::{Value, json};

use super::{
    config::{Config, HostConfig, MountRequest},
    record::{Attachment, Record},
};
use crate::{
    core::Core,
    error::{Error, Result},
};

/// A volume that a container wants. It is made if there is none of this name, or if it has no name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) name: Option<String>,
    /// Of the volume, if it is made.
    pub(crate) labels: BTreeMap<String, String>,
    /// Everything but the volume's name.
    pub(crate) attachment: Attachment,
}

impl Wanted {
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

/// Checks what a request says, without a look at other containers.
pub(super) fn check(config: &Config, host: &HostConfig) -> Result<()> {
    if !matches!(host.volume_driver.as_str(), "" | "local") {
        return Err(no_driver(&host.volume_driver));
    }
    for path in config.volumes.keys() {
        destination(path)?;
    }
    for from in &host.volumes_from {
        volumes_from(from)?;
    }
    own(host).map(drop)
}

/// The volumes of a container, in no particular order. The image's are among `config`'s already.
pub(crate) fn wanted(core: &Core, config: &Config, host: &HostConfig) -> Result<Vec<Wanted>> {
    let own = own(host)?;
    let mut all = BTreeMap::new();
    for from in &host.volumes_from {
        let (container, readonly) = volumes_from(from)?;
        // As above, not a 404.
        let found = core.containers.find(container).map_err(|error| Error::invalid(error.to_string()))?;
        for attachment in &found.record().volumes {
            let name = Some(attachment.volume.clone());
            let mut attachment = attachment.clone();
            attachment.readonly |= readonly;
            all.insert(attachment.path.clone(), Wanted { name, labels: BTreeMap::new(), attachment });
        }
    }
    all.extend(own.into_iter().map(|wanted| (wanted.attachment.path.clone(), wanted)));
    let tmpfs: HashSet<String> = host.tmpfs.keys().map(|path| clean(path)).collect();
    let mounted: HashSet<String> = tmpfs_targets(host).collect();
    for path in config.volumes.keys() {
        let path = destination(path)?;
        if !tmpfs.contains(&path) && !mounted.contains(&path) {
            all.entry(path.clone()).or_insert_with(|| Wanted::new(None, path));
        }
    }
    Ok(all.into_values().collect())
}

/// What `--mount type=tmpfs` asks for.
pub(super) fn tmpfs(host: &HostConfig) -> Result<Vec<TmpfsMount>> {
    let tmpfs = host.mounts.iter().filter(|mount| mount.kind == "tmpfs");
    tmpfs.map(|mount| Ok(TmpfsMount { path: target(mount)?, options: tmpfs_options(mount)? })).collect()
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
    record.volumes.iter().map(volume).chain(tmpfs).collect()
}

/// Binds and mounts; none of them may have the same place as another one.
fn own(host: &HostConfig) -> Result<Vec<Wanted>> {
    let mut places: HashSet<String> = host.tmpfs.keys().map(|path| clean(path)).collect();
    let mut take = |path: &str| match places.insert(path.to_owned()) {
        true => Ok(()),
        false => Err(Error::invalid(format!("Duplicate mount point: {}", shown(path)))),
    };
    let mut all = Vec::new();
    for text in &host.binds {
        let wanted = bind(text)?;
        take(&wanted.attachment.path)?;
        all.push(wanted);
    }
    for mount in &host.mounts {
        take(&target(mount)?)?;
        match mount.kind.as_str() {
            "volume" => all.push(volume(mount)?),
            "tmpfs" => drop(tmpfs_options(mount)?),
            "bind" => return Err(no_host_directories()),
            "image" | "cluster" | "npipe" => {
                let kind = &mount.kind;
                return Err(Error::unsupported(format!(
                    "--mount type={kind} (HostConfig.Mounts) is not supported by Coracle: use a volume"
                )));
            }
            other => {
                return Err(Error::invalid(format!(
                    "invalid mount config: mount type unknown: {:?}",
                    shown(other)
                )));
            }
        }
    }
    Ok(all)
}

/// `NAME:PATH[:OPTIONS]`, or a path alone for a volume without a name.
fn bind(text: &str) -> Result<Wanted> {
    let bad = |why: &str| {
        let why = if why.is_empty() { String::new() } else { format!(": {why}") };
        Error::invalid(format!("invalid volume specification: '{}'{why}", shown(text)))
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (name, path, mode) = match parts[..] {
        [path] => (None, path, ""),
        [name, path] => (Some(name), path, ""),
        [name, path, mode] => (Some(name), path, mode),
        _ => return Err(bad("")),
    };
    if name.is_some_and(str::is_empty) || path.is_empty() {
        return Err(bad(""));
    }
    if name.is_some_and(|name| name.starts_with(['/', '.', '~'])) {
        return Err(no_host_directories());
    }
    let path = destination(path).map_err(|error| bad(&error.to_string()))?;
    let mut wanted = Wanted::new(name.map(str::to_owned), path);
    let attachment = &mut wanted.attachment;
    mode.clone_into(&mut attachment.mode);
    let mut seen = HashSet::new();
    for option in mode.split(',').filter(|_| !mode.is_empty()) {
        let class = match option {
            "ro" | "rw" => "access",
            "z" | "Z" => "label",
            "nocopy" => "copy",
            "consistent" | "cached" | "delegated" | "default" => "consistency",
            other => return Err(bad(&format!("invalid mode: {}", shown(other)))),
        };
        if !seen.insert(class) {
            return Err(bad(&format!("invalid mode: {}", shown(mode))));
        }
        match option {
            "ro" => attachment.readonly = true,
            "nocopy" => attachment.no_copy = true,
            // There are no labels of SELinux in the guest, and one kernel sees all of a volume's files.
            _ => {}
        }
    }
    Ok(wanted)
}

fn volume(mount: &MountRequest) -> Result<Wanted> {
    let options = mount.volume_options.clone().unwrap_or_default();
    if !matches!(options.driver_config.name.as_str(), "" | "local") {
        return Err(no_driver(&options.driver_config.name));
    }
    if let Some(option) = options.driver_config.options.keys().next() {
        return Err(no_driver_options(option));
    }
    if mount.source.starts_with('/') {
        return Err(no_host_directories());
    }
    let name = Some(mount.source.clone()).filter(|name| !name.is_empty());
    if name.is_none() && !options.subpath.is_empty() {
        return Err(Error::invalid("must not set Subpath when using anonymous volumes"));
    }
    let climbs = options.subpath.split('/').any(|part| part == "..");
    if options.subpath.starts_with('/') || climbs || options.subpath.contains('\0') {
        return Err(Error::invalid(format!(
            "invalid mount config for type \"volume\": invalid Subpath {:?}: it must be a relative path within the volume",
            shown(&options.subpath)
        )));
    }
    let mut wanted = Wanted::new(name, target(mount)?);
    wanted.labels = options.labels;
    wanted.attachment.subpath = options.subpath;
    wanted.attachment.readonly = mount.read_only;
    wanted.attachment.no_copy = options.no_copy;
    "z".clone_into(&mut wanted.attachment.mode);
    Ok(wanted)
}

/// The error for a driver that is not ours.
pub(crate) fn no_driver(name: &str) -> Error {
    let name = shown(name);
    // Docker's 404 would make its CLI pull the image and ask again.
    Error::invalid(format!(
        "error looking up volume plugin {name}: plugin \"{name}\" not found: Coracle has the driver `local` only"
    ))
}

/// The error for an option of the local driver, with which Docker mounts other file systems.
pub(crate) fn no_driver_options(option: &str) -> Error {
    Error::unsupported(format!(
        "the volume option `{}` is not supported by Coracle: a volume is a directory on the machine's data disk",
        shown(option)
    ))
}

fn no_host_directories() -> Error {
    Error::unsupported(
        "bind mounts of the host's directories are not supported by Coracle yet: use a volume (--volume NAME:/path), or copy files",
    )
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

fn target(mount: &MountRequest) -> Result<String> {
    let kind = shown(&mount.kind);
    if mount.target.is_empty() {
        return Err(Error::invalid(format!(
            "invalid mount config for type \"{kind}\": field Target must not be empty"
        )));
    }
    destination(&mount.target)
        .map_err(|error| Error::invalid(format!("invalid mount config for type \"{kind}\": {error}")))
}

/// A place in a container, cleaned.
fn destination(path: &str) -> Result<String> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4000 {
        let path = shown(path);
        return Err(Error::invalid(format!("invalid mount path: '{path}' mount path must be absolute")));
    }
    match clean(path) {
        root if root == "/" => Err(Error::invalid("invalid specification: destination can't be '/'")),
        path => Ok(path),
    }
}

fn tmpfs_targets(host: &HostConfig) -> impl Iterator<Item = String> {
    host.mounts.iter().filter(|mount| mount.kind == "tmpfs").map(|mount| clean(&mount.target))
}

fn tmpfs_options(mount: &MountRequest) -> Result<String> {
    if !mount.source.is_empty() {
        return Err(Error::invalid(
            "invalid mount config for type \"tmpfs\": field Source must not be specified",
        ));
    }
    let given = mount.tmpfs_options.clone().unwrap_or_default();
    let mut options = Vec::new();
    if mount.read_only {
        options.push("ro".to_owned());
    }
    match given.size_bytes {
        0 => {}
        size if size > 0 => options.push(format!("size={size}")),
        _ => {
            return Err(Error::invalid(
                "invalid mount config for type \"tmpfs\": SizeBytes must not be negative",
            ));
        }
    }
    // Go's bits for setuid, setgid and sticky are not the kernel's.
    let special = [(1 << 23, 0o4000), (1 << 22, 0o2000), (1 << 20, 0o1000)];
    let mode = special
        .iter()
        .fold(given.mode & 0o7777, |mode, (go, unix)| mode | if given.mode & go != 0 { *unix } else { 0 });
    if mode != 0 {
        options.push(format!("mode={mode:o}"));
    }
    for option in &given.options {
        match &option[..] {
            [flag] => options.push(flag.clone()),
            [key, value] => options.push(format!("{key}={value}")),
            _ => {
                return Err(Error::invalid(
                    "invalid mount config for type \"tmpfs\": an option has one or two parts",
                ));
            }
        }
    }
    Ok(options.join(","))
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
    fn binds_are_read_as_docker_reads_them() {
        for (text, name, path, readonly, no_copy) in [
            ("db:/var/lib/db", Some("db"), "/var/lib/db", false, false),
            ("db:/a/../b//c/:ro,nocopy", Some("db"), "/b/c", true, true),
            ("db:/b:z,rw", Some("db"), "/b", false, false),
            ("/alone", None, "/alone", false, false),
        ] {
            let wanted = bind(text).unwrap();
            assert_eq!(wanted.name.as_deref(), name, "{text}");
            let attachment = wanted.attachment;
            assert_eq!(
                (attachment.path.as_str(), attachment.readonly, attachment.no_copy),
                (path, readonly, no_copy)
            );
        }
    }

    #[test]
    fn bad_binds_are_refused() {
        for bad in [
            "",
            ":",
            "db:",
            ":/x",
            "db:rel",
            "db:/",
            "db:/x/..",
            "db:/x:fly",
            "db:/x:ro,rw",
            "a:b:c:d",
            "db:/x:shared",
        ] {
            assert_eq!(bind(bad).unwrap_err().status(), 400, "{bad}");
        }
        for directory in ["/etc:/x", "./here:/x", "~/x:/y", "/a:/b:ro"] {
            assert_eq!(bind(directory).unwrap_err().status(), 501, "{directory}");
        }
    }

    #[test]
    fn one_place_can_be_taken_once() {
        for twice in [
            r#"{"Binds":["a1:/x","b1:/x/."]}"#,
            r#"{"Binds":["a1:/x"],"Mounts":[{"Type":"volume","Target":"/x"}]}"#,
            r#"{"Tmpfs":{"/x":""},"Mounts":[{"Type":"tmpfs","Target":"/x/"}]}"#,
        ] {
            let error = own(&host(twice)).unwrap_err();
            assert_eq!(error.to_string(), "Duplicate mount point: /x", "{twice}");
        }
    }

    #[test]
    fn mounts_say_more_and_are_checked() {
        let config = host(
            r#"{"Mounts":[{"Type":"volume","Source":"db","Target":"/x","ReadOnly":true,
                "VolumeOptions":{"NoCopy":true,"Subpath":"in/side","Labels":{"a":"1"}}}]}"#,
        );
        let wanted = own(&config).unwrap().remove(0);
        assert!(wanted.attachment.readonly && wanted.attachment.no_copy);
        assert_eq!((wanted.attachment.subpath.as_str(), wanted.labels["a"].as_str()), ("in/side", "1"));
        for (bad, status) in [
            (r#"{"Type":"volume","Target":""}"#, 400),
            (r#"{"Type":"volume","Target":"rel"}"#, 400),
            (r#"{"Type":"fly","Target":"/x"}"#, 400),
            (r#"{"Type":"volume","Source":"db","Target":"/x","VolumeOptions":{"Subpath":"../y"}}"#, 400),
            (r#"{"Type":"volume","Target":"/x","VolumeOptions":{"Subpath":"y"}}"#, 400),
            (r#"{"Type":"volume","Target":"/x","VolumeOptions":{"DriverConfig":{"Name":"nfs"}}}"#, 400),
            (
                r#"{"Type":"volume","Target":"/x","VolumeOptions":{"DriverConfig":{"Options":{"device":"/dev/sda"}}}}"#,
                501,
            ),
            (r#"{"Type":"bind","Source":"/etc","Target":"/x"}"#, 501),
            (r#"{"Type":"image","Source":"busybox","Target":"/x"}"#, 501),
            (r#"{"Type":"tmpfs","Target":"/x","Source":"y"}"#, 400),
            (r#"{"Type":"tmpfs","Target":"/x","TmpfsOptions":{"SizeBytes":-1}}"#, 400),
        ] {
            let config = host(&format!(r#"{{"Mounts":[{bad}]}}"#));
            assert_eq!(own(&config).unwrap_err().status(), status, "{bad}");
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
