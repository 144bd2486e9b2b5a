//! One `--volume` or `--mount` as the client wrote it, read and checked.

use std::collections::HashSet;

use super::{Mount, WantedVolume, clean, shown, source};
use crate::{
    container::{
        config::{MountRequest, VolumeOptions},
        record::Bind,
    },
    error::{Error, Kind, Result},
};

/// How mounts beneath a bind mount spread unless something else is asked for.
const DEFAULT_PROPAGATION: &str = "rprivate";

/// What stands behind the second colon of `--volume`.
#[derive(Debug, Default)]
struct Mode<'a> {
    readonly: bool,
    no_copy: bool,
    propagation: Option<&'a str>,
}

impl<'a> Mode<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let bad = || Error::invalid(format!("invalid mode: {}", shown(text)));
        let mut mode = Self::default();
        let mut seen = HashSet::new();
        for option in text.split(',').filter(|_| !text.is_empty()) {
            let class = match option {
                "ro" | "rw" => "access",
                "z" | "Z" => "label",
                "nocopy" => "copy",
                "consistent" | "cached" | "delegated" | "default" => "consistency",
                option if is_propagation(option) => "propagation",
                _ => return Err(bad()),
            };
            if !seen.insert(class) {
                return Err(bad());
            }
            match class {
                "access" => mode.readonly = option == "ro",
                "copy" => mode.no_copy = true,
                "propagation" => mode.propagation = Some(option),
                // There are no labels of SELinux in the guest, and one kernel sees all of a volume's files.
                _ => {}
            }
        }
        Ok(mode)
    }
}

fn is_propagation(word: &str) -> bool {
    matches!(word, "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared")
}

/// `SOURCE:PATH[:OPTIONS]`, or a path alone for a volume without a name. An absolute path as the source is a bind mount.
pub(super) fn bind_or_volume(text: &str) -> Result<Mount> {
    let bad = |why: &str| {
        let why = if why.is_empty() { String::new() } else { format!(": {why}") };
        Error::invalid(format!("invalid volume specification: '{}'{why}", shown(text)))
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (source, path, mode) = match parts[..] {
        [path] => (None, path, ""),
        [_, mode] if !mode.is_empty() && Mode::parse(mode).is_ok() => return Err(bad("")),
        [source, path] => (Some(source), path, ""),
        [source, path, mode] => (Some(source), path, mode),
        _ => return Err(bad("")),
    };
    if parts[0].is_empty() {
        return Err(bad(""));
    }
    let options = Mode::parse(mode)?;
    let read = match source.filter(|source| source.starts_with('/')) {
        Some(source) => bind_mode(source, path, mode, &options).map(Mount::Bind),
        None => volume_mode(source, path, mode, &options).map(Mount::Volume),
    };
    // What is supported is no matter of how it is written.
    read.map_err(|error| if error.status().is_server_error() { error } else { bad(&error.to_string()) })
}

fn bind_mode(source: &str, path: &str, mode: &str, options: &Mode<'_>) -> Result<Bind> {
    if options.no_copy {
        return Err(not_of("bind", "VolumeOptions"));
    }
    let source = bind_source(source)?;
    Ok(Bind {
        engine: source::is_engine_socket(&source),
        within: Vec::new(),
        source,
        path: target("bind", path)?,
        readonly: options.readonly,
        create: true,
        mode: mode.to_owned(),
        propagation: propagation(options.propagation.unwrap_or_default())?,
    })
}

fn volume_mode(name: Option<&str>, path: &str, mode: &str, options: &Mode<'_>) -> Result<WantedVolume> {
    if options.propagation.is_some() {
        return Err(not_of("volume", "BindOptions"));
    }
    let mut wanted = WantedVolume::new(name.map(str::to_owned), target("volume", path)?);
    mode.clone_into(&mut wanted.attachment.mode);
    wanted.attachment.readonly = options.readonly;
    wanted.attachment.no_copy = options.no_copy;
    Ok(wanted)
}

/// What `--mount` asks for; nothing if that is a tmpfs, which [`super::tmpfs`] reads.
pub(super) fn mount(mount: &MountRequest) -> Result<Option<Mount>> {
    match mount.kind.as_str() {
        "volume" => volume(mount).map(|wanted| Some(Mount::Volume(wanted))),
        "bind" => bind(mount).map(|bind| Some(Mount::Bind(bind))),
        "tmpfs" => tmpfs_options(mount).map(|_| None),
        "image" | "cluster" | "npipe" => {
            let kind = &mount.kind;
            Err(Error::unsupported(format!(
                "--mount type={kind} (HostConfig.Mounts) is not supported by Coracle: use a volume"
            )))
        }
        other => Err(Error::invalid(format!("invalid mount config: mount type unknown: {:?}", shown(other)))),
    }
}

fn bind(mount: &MountRequest) -> Result<Bind> {
    let path = target("bind", &mount.target)?;
    if mount.source.is_empty() {
        return Err(wrong("bind", "field Source must not be empty"));
    }
    only_options_of(mount)?;
    let options = mount.bind_options.clone().unwrap_or_default();
    let propagation = propagation(&options.propagation)?;
    if options.non_recursive {
        return Err(Error::unsupported(
            "bind-recursive=disabled (BindOptions.NonRecursive) is not supported by Coracle: what the host has mounted beneath the source is always seen",
        ));
    }
    if options.read_only_non_recursive {
        return Err(Error::unsupported(
            "bind-recursive=writable (BindOptions.ReadOnlyNonRecursive) is not supported by Coracle: what is mounted read-only is so with all that is beneath it",
        ));
    }
    if options.read_only_force_recursive && !mount.read_only {
        return Err(wrong("bind", "ReadOnlyForceRecursive must not be set without ReadOnly"));
    }
    let source = bind_source(&mount.source)?;
    Ok(Bind {
        engine: source::is_engine_socket(&source),
        within: Vec::new(),
        source,
        path,
        readonly: mount.read_only,
        create: options.create_mountpoint,
        mode: String::new(),
        propagation,
    })
}

fn volume(mount: &MountRequest) -> Result<WantedVolume> {
    let path = target("volume", &mount.target)?;
    only_options_of(mount)?;
    let VolumeOptions { no_copy, labels, driver_config, subpath } =
        mount.volume_options.clone().unwrap_or_default();
    if !matches!(driver_config.name.as_str(), "" | "local") {
        return Err(no_driver(Kind::Invalid, &driver_config.name));
    }
    if let Some(option) = driver_config.options.keys().next() {
        return Err(no_driver_options(option));
    }
    let name = Some(mount.source.clone()).filter(|name| !name.is_empty());
    if name.is_none() && !subpath.is_empty() {
        return Err(Error::invalid("must not set Subpath when using anonymous volumes"));
    }
    if name.is_none() && mount.read_only {
        return Err(wrong("volume", "must not set ReadOnly mode when using anonymous volumes"));
    }
    let climbs = subpath.split('/').any(|part| part == "..");
    if subpath.starts_with('/') || climbs || subpath.contains('\0') {
        return Err(Error::invalid(format!(
            "invalid mount config for type \"volume\": invalid Subpath {:?}: it must be a relative path within the volume",
            shown(&subpath)
        )));
    }
    let mut wanted = WantedVolume::new(name, path);
    wanted.labels = labels;
    wanted.attachment.subpath = subpath;
    wanted.attachment.readonly = mount.read_only;
    wanted.attachment.no_copy = no_copy;
    "z".clone_into(&mut wanted.attachment.mode);
    Ok(wanted)
}

/// Refuses options of another kind of mount.
fn only_options_of(mount: &MountRequest) -> Result<()> {
    for (kind, member, given) in [
        ("bind", "BindOptions", mount.bind_options.is_some()),
        ("volume", "VolumeOptions", mount.volume_options.is_some()),
        ("tmpfs", "TmpfsOptions", mount.tmpfs_options.is_some()),
        ("image", "ImageOptions", mount.image_options.is_some()),
    ] {
        if given && kind != mount.kind {
            return Err(not_of(&mount.kind, member));
        }
    }
    Ok(())
}

fn not_of(kind: &str, member: &str) -> Error {
    wrong(kind, &format!("field {member} must not be specified"))
}

fn wrong(kind: &str, why: &str) -> Error {
    Error::invalid(format!("invalid mount config for type \"{}\": {why}", shown(kind)))
}

/// Checks a propagation. A mount that one side makes later cannot come to the other one, which has another kernel.
fn propagation(word: &str) -> Result<String> {
    match word {
        "" => Ok(DEFAULT_PROPAGATION.to_owned()),
        "private" | "rprivate" => Ok(word.to_owned()),
        word if is_propagation(word) => Err(Error::unsupported(format!(
            "bind-propagation={word} is not supported by Coracle, whose containers have a kernel of their own: use `rprivate`, or leave it out"
        ))),
        other => Err(wrong("bind", &format!("invalid propagation mode: {}", shown(other)))),
    }
}

/// A place on the host, cleaned.
fn bind_source(path: &str) -> Result<String> {
    absolute(path).map(clean).map_err(|error| wrong("bind", &error.to_string()))
}

/// A place in a container, cleaned.
pub(super) fn target(kind: &str, path: &str) -> Result<String> {
    if path.is_empty() {
        return Err(wrong(kind, "field Target must not be empty"));
    }
    destination(path).map_err(|error| wrong(kind, &error.to_string()))
}

/// As [`target`], of something that has no kind.
pub(super) fn destination(path: &str) -> Result<String> {
    match clean(absolute(path)?) {
        root if root == "/" => Err(Error::invalid("invalid specification: destination can't be '/'")),
        path => Ok(path),
    }
}

fn absolute(path: &str) -> Result<&str> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4000 {
        let path = shown(path);
        return Err(Error::invalid(format!("invalid mount path: '{path}' mount path must be absolute")));
    }
    Ok(path)
}

/// The options of a tmpfs as one string.
pub(super) fn tmpfs_options(mount: &MountRequest) -> Result<String> {
    only_options_of(mount)?;
    if !mount.source.is_empty() {
        return Err(not_of("tmpfs", "Source"));
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

/// The error for a driver that is not ours. At the creation of a container it must not be Docker's 404, at which its CLI pulls the image
/// and asks again.
pub(crate) fn no_driver(kind: Kind, name: &str) -> Error {
    let name = shown(name);
    let words = "Coracle has the driver `local` only";
    Error::new(kind, format!("error looking up volume plugin {name}: plugin \"{name}\" not found: {words}"))
}

/// The error for an option of the local driver, with which Docker mounts other file systems.
pub(crate) fn no_driver_options(option: &str) -> Error {
    Error::unsupported(format!(
        "the volume option `{}` is not supported by Coracle: a volume is a directory on the machine's data disk",
        shown(option)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounted(json: &str) -> Result<Option<Mount>> {
        mount(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn volumes_are_read_as_docker_reads_them() {
        for (text, name, path, readonly, no_copy) in [
            ("db:/var/lib/db", Some("db"), "/var/lib/db", false, false),
            ("db:/a/../b//c/:ro,nocopy", Some("db"), "/b/c", true, true),
            ("db:/b:z,rw", Some("db"), "/b", false, false),
            ("/alone", None, "/alone", false, false),
        ] {
            let Mount::Volume(wanted) = bind_or_volume(text).unwrap() else { panic!("{text}") };
            assert_eq!(wanted.name.as_deref(), name, "{text}");
            let attachment = wanted.attachment;
            assert_eq!(
                (attachment.path.as_str(), attachment.readonly, attachment.no_copy),
                (path, readonly, no_copy)
            );
        }
    }

    #[test]
    fn bind_mounts_are_read_as_docker_reads_them() {
        for (text, source, path, readonly, propagation) in [
            ("/a:/b", "/a", "/b", false, "rprivate"),
            ("/a//./c/../d/:/x/../b/:ro", "/a/d", "/b", true, "rprivate"),
            ("/a:/b:Z,rw,private,delegated", "/a", "/b", false, "private"),
            ("/:/host:ro", "/", "/host", true, "rprivate"),
        ] {
            let Mount::Bind(bind) = bind_or_volume(text).unwrap() else { panic!("{text}") };
            assert_eq!((bind.source.as_str(), bind.path.as_str()), (source, path), "{text}");
            assert_eq!((bind.readonly, bind.propagation.as_str()), (readonly, propagation), "{text}");
            assert!(bind.create && !bind.engine, "{text}");
        }
        for text in ["/var/run/docker.sock:/var/run/docker.sock:ro", "/run//docker.sock:/x"] {
            assert!(matches!(bind_or_volume(text), Ok(Mount::Bind(bind)) if bind.engine), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_in_dockers_words() {
        for (bad, words) in [
            ("", "invalid volume specification: ''"),
            (":", "invalid volume specification: ':'"),
            ("db:", "field Target must not be empty"),
            (":/x", "invalid volume specification: ':/x'"),
            ("db:rel", "invalid mount path: 'rel' mount path must be absolute"),
            ("/a:rel", "for type \"bind\": invalid mount path: 'rel' mount path must be absolute"),
            ("db:/", "invalid specification: destination can't be '/'"),
            ("/a:/x/..", "invalid specification: destination can't be '/'"),
            ("/a:ro", "invalid volume specification: '/a:ro'"),
            ("db:/x:fly", "invalid mode: fly"),
            ("/a:/x:ro,fly", "invalid mode: ro,fly"),
            ("db:/x:ro,rw", "invalid mode: ro,rw"),
            ("/a:/b:private,rprivate", "invalid mode: private,rprivate"),
            ("a:b:c:d", "invalid volume specification: 'a:b:c:d'"),
            (
                "db:/x:shared",
                "invalid volume specification: 'db:/x:shared': invalid mount config for type \"volume\": field BindOptions must not be specified",
            ),
            (
                "/a:/x:nocopy",
                "invalid volume specification: '/a:/x:nocopy': invalid mount config for type \"bind\": field VolumeOptions must not be specified",
            ),
        ] {
            let error = bind_or_volume(bad).unwrap_err();
            assert_eq!(error.status(), 400, "{bad}");
            assert!(error.to_string().contains(words), "{bad}: {error}");
        }
        for unsupported in ["/a:/b:shared", "/a:/b:rslave"] {
            assert_eq!(bind_or_volume(unsupported).unwrap_err().status(), 501, "{unsupported}");
        }
    }

    #[test]
    fn mounts_say_more_and_are_checked() {
        let volume = mounted(
            r#"{"Type":"volume","Source":"db","Target":"/x","ReadOnly":true,
                "VolumeOptions":{"NoCopy":true,"Subpath":"in/side","Labels":{"a":"1"}}}"#,
        );
        let Ok(Some(Mount::Volume(wanted))) = volume else { panic!("{volume:?}") };
        assert!(wanted.attachment.readonly && wanted.attachment.no_copy);
        assert_eq!((wanted.attachment.subpath.as_str(), wanted.labels["a"].as_str()), ("in/side", "1"));
        let bind = mounted(
            r#"{"Type":"bind","Source":"/s/","Target":"/x","ReadOnly":true,"Consistency":"cached",
                "BindOptions":{"Propagation":"private","CreateMountpoint":true,"ReadOnlyForceRecursive":true}}"#,
        );
        let Ok(Some(Mount::Bind(bind))) = bind else { panic!("{bind:?}") };
        assert!(bind.readonly && bind.create);
        assert_eq!((bind.source.as_str(), bind.propagation.as_str()), ("/s", "private"));
        let Ok(Some(Mount::Bind(bind))) = mounted(r#"{"Type":"bind","Source":"/s","Target":"/x"}"#) else {
            panic!("it is a bind mount")
        };
        assert!(!bind.create && !bind.readonly);
    }

    #[test]
    fn mounts_that_cannot_be_given_are_refused() {
        for (bad, status, words) in [
            (r#"{"Type":"volume","Target":""}"#, 400, "field Target must not be empty"),
            (r#"{"Type":"volume","Target":"rel"}"#, 400, "mount path must be absolute"),
            (r#"{"Type":"fly","Target":"/x"}"#, 400, "mount type unknown"),
            (
                r#"{"Type":"volume","Source":"db","Target":"/x","VolumeOptions":{"Subpath":"../y"}}"#,
                400,
                "Subpath",
            ),
            (r#"{"Type":"volume","Target":"/x","VolumeOptions":{"Subpath":"y"}}"#, 400, "Subpath"),
            (r#"{"Type":"volume","Target":"/x","ReadOnly":true}"#, 400, "anonymous"),
            (
                r#"{"Type":"volume","Target":"/x","VolumeOptions":{"DriverConfig":{"Name":"nfs"}}}"#,
                400,
                "nfs",
            ),
            (
                r#"{"Type":"volume","Target":"/x","VolumeOptions":{"DriverConfig":{"Options":{"device":"/dev/sda"}}}}"#,
                501,
                "`device`",
            ),
            (r#"{"Type":"image","Source":"busybox","Target":"/x"}"#, 501, "type=image"),
            (r#"{"Type":"tmpfs","Target":"/x","Source":"y"}"#, 400, "field Source must not be specified"),
            (r#"{"Type":"tmpfs","Target":"/x","TmpfsOptions":{"SizeBytes":-1}}"#, 400, "SizeBytes"),
            (r#"{"Type":"bind","Target":"/x"}"#, 400, "field Source must not be empty"),
            (r#"{"Type":"bind","Source":"a","Target":"/x"}"#, 400, "'a' mount path must be absolute"),
            (r#"{"Type":"bind","Source":"/a","Target":"/"}"#, 400, "destination can't be '/'"),
            (
                r#"{"Type":"bind","Source":"/a","Target":"/x","BindOptions":{"Propagation":"fly"}}"#,
                400,
                "invalid propagation mode: fly",
            ),
            (
                r#"{"Type":"bind","Source":"/a","Target":"/x","BindOptions":{"Propagation":"rshared"}}"#,
                501,
                "bind-propagation=rshared",
            ),
            (
                r#"{"Type":"bind","Source":"/a","Target":"/x","BindOptions":{"NonRecursive":true}}"#,
                501,
                "NonRecursive",
            ),
            (
                r#"{"Type":"bind","Source":"/a","Target":"/x","BindOptions":{"ReadOnlyNonRecursive":true}}"#,
                501,
                "ReadOnlyNonRecursive",
            ),
            (
                r#"{"Type":"bind","Source":"/a","Target":"/x","VolumeOptions":{}}"#,
                400,
                "field VolumeOptions must not be specified",
            ),
            (
                r#"{"Type":"volume","Source":"db","Target":"/x","BindOptions":{}}"#,
                400,
                "invalid mount config for type \"volume\": field BindOptions must not be specified",
            ),
            (
                r#"{"Type":"tmpfs","Target":"/x","BindOptions":{}}"#,
                400,
                "field BindOptions must not be specified",
            ),
            (
                r#"{"Type":"volume","Source":"db","Target":"/x","ImageOptions":{"Subpath":"y"}}"#,
                400,
                "field ImageOptions must not be specified",
            ),
        ] {
            let error = mounted(bad).unwrap_err();
            assert_eq!(error.status(), status, "{bad}: {error}");
            assert!(error.to_string().contains(words), "{bad}: {error}");
        }
    }
}
