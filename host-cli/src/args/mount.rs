//! The word that `--mount` takes, and the volumes' own commands.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

#[derive(Debug, Args)]
pub(crate) struct VolumeArgs {
    #[command(subcommand)]
    pub(crate) command: VolumeCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume
    Create {
        /// Labels, KEY=VALUE
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        /// Its name; one is made up if it is not said
        name: Option<String>,
    },
    /// List volumes
    #[command(alias = "list")]
    Ls {
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
        /// Only those that fit: dangling=true, label=KEY[=VALUE], name=PART
        #[arg(short, long, value_name = "NAME=VALUE")]
        filter: Vec<String>,
    },
    /// Show everything known of volumes as JSON
    Inspect {
        /// The volumes
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove volumes and what they hold
    #[command(alias = "remove")]
    Rm {
        /// One that does not exist is no failure
        #[arg(short, long)]
        force: bool,
        /// The volumes
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove volumes that no container uses
    Prune {
        /// Those with a name, too
        #[arg(short, long)]
        all: bool,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
}

/// Docker's `Mount`.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Mount {
    #[serde(rename = "Type")]
    kind: String,
    source: String,
    target: String,
    read_only: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    consistency: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bind_options: Option<BindOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_options: Option<VolumeOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tmpfs_options: Option<TmpfsOptions>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct BindOptions {
    propagation: String,
    non_recursive: bool,
    create_mountpoint: bool,
    read_only_non_recursive: bool,
    read_only_force_recursive: bool,
}

impl BindOptions {
    /// Reads what `bind-recursive` says.
    fn recursive(&mut self, word: &str) -> Result<()> {
        match word {
            "enabled" => {}
            "disabled" => self.non_recursive = true,
            "writable" => self.read_only_non_recursive = true,
            "readonly" => self.read_only_force_recursive = true,
            _ => bail!("`bind-recursive={word}` in --mount is none of enabled, disabled, writable, readonly"),
        }
        Ok(())
    }
}

#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct VolumeOptions {
    no_copy: bool,
    labels: BTreeMap<String, String>,
    subpath: String,
}

#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct TmpfsOptions {
    size_bytes: u64,
    mode: u32,
}

/// Reads `SOURCE:PATH[:OPTIONS]`, as far as it depends on where this program runs.
pub(super) fn volume(text: &str) -> Result<String> {
    match text.split_once(':') {
        Some((source, rest)) => Ok(format!("{}:{rest}", from_here(source)?)),
        None => Ok(text.to_owned()),
    }
}

/// A path that begins with `.` is meant from the working directory, which the daemon does not know. Any other one is an absolute path or the
/// name of a volume.
fn from_here(source: &str) -> Result<String> {
    if !source.starts_with('.') {
        return Ok(source.to_owned());
    }
    let path = std::path::absolute(source).with_context(|| format!("cannot tell where `{source}` is"))?;
    let path = path.into_os_string().into_string();
    path.map_err(|path| anyhow!("the path {} is not UTF-8, which the API needs", path.display()))
}

/// Reads `type=volume,source=NAME,target=PATH,…`.
pub(super) fn mount(text: &str) -> Result<Mount> {
    let mut mount = Mount { kind: "volume".to_owned(), ..Mount::default() };
    for field in text.split(',') {
        let (key, value) = field.split_once('=').unwrap_or((field, ""));
        let is_true = || match value {
            "" | "1" | "true" => Ok(true),
            "0" | "false" => Ok(false),
            _ => bail!("`{field}` in --mount is neither true nor false"),
        };
        match key {
            "type" => value.clone_into(&mut mount.kind),
            "source" | "src" => mount.source = from_here(value)?,
            "target" | "dst" | "destination" => value.clone_into(&mut mount.target),
            "readonly" | "ro" => mount.read_only = is_true()?,
            "consistency" => value.clone_into(&mut mount.consistency),
            "bind-propagation" => {
                value.clone_into(&mut mount.bind_options.get_or_insert_default().propagation)
            }
            "bind-recursive" => mount.bind_options.get_or_insert_default().recursive(value)?,
            "bind-nonrecursive" => {
                mount.bind_options.get_or_insert_default().non_recursive = is_true()?;
            }
            "bind-create-src" => {
                mount.bind_options.get_or_insert_default().create_mountpoint = is_true()?;
            }
            "volume-nocopy" => mount.volume_options.get_or_insert_default().no_copy = is_true()?,
            "volume-subpath" => value.clone_into(&mut mount.volume_options.get_or_insert_default().subpath),
            "volume-label" => {
                let (name, value) = value.split_once('=').unwrap_or((value, ""));
                let labels = &mut mount.volume_options.get_or_insert_default().labels;
                labels.insert(name.to_owned(), value.to_owned());
            }
            "tmpfs-size" => {
                let size = super::size(value).map_err(anyhow::Error::msg);
                let size = size.with_context(|| format!("`{field}` in --mount is no size"))?;
                mount.tmpfs_options.get_or_insert_default().size_bytes = size;
            }
            "tmpfs-mode" => {
                let mode = u32::from_str_radix(value, 8).ok().filter(|mode| *mode <= 0o7777);
                let mode = mode.with_context(|| format!("`{field}` in --mount is no mode"))?;
                mount.tmpfs_options.get_or_insert_default().mode = mode;
            }
            _ => bail!("`{field}` in --mount is not known"),
        }
    }
    check(&mount)?;
    Ok(mount)
}

/// Options go with the kind that they are of.
fn check(mount: &Mount) -> Result<()> {
    let kind = &mount.kind;
    for (own, given) in [
        ("bind", mount.bind_options.is_some()),
        ("volume", mount.volume_options.is_some()),
        ("tmpfs", mount.tmpfs_options.is_some()),
    ] {
        if given && own != kind {
            bail!("cannot mix '{own}-*' options with mount type '{kind}'");
        }
    }
    if let Some(options) = mount.bind_options.as_ref().filter(|options| options.read_only_force_recursive) {
        if !mount.read_only {
            bail!("option 'bind-recursive=readonly' requires 'readonly' to be specified in conjunction");
        }
        if options.propagation != "rprivate" {
            bail!(
                "option 'bind-recursive=readonly' requires 'bind-propagation=rprivate' to be specified in conjunction"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_field_by_field() {
        let json = |text: &str| serde_json::to_value(mount(text).unwrap()).unwrap();
        let volume = json("type=volume,src=db,dst=/data,readonly,volume-nocopy,volume-label=a=b");
        assert_eq!((volume["Source"].as_str(), volume["Target"].as_str()), (Some("db"), Some("/data")));
        assert_eq!(
            (volume["ReadOnly"].as_bool(), volume["VolumeOptions"]["NoCopy"].as_bool()),
            (Some(true), Some(true))
        );
        assert_eq!(volume["VolumeOptions"]["Labels"]["a"], "b");
        let tmpfs = json("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1777");
        assert_eq!(tmpfs["TmpfsOptions"], serde_json::json!({"SizeBytes": 1 << 20, "Mode": 0o1777}));
    }

    #[test]
    fn a_path_from_here_becomes_absolute() {
        let here = std::env::current_dir().unwrap().into_os_string().into_string().unwrap();
        assert_eq!(volume("./x:/x:ro").unwrap(), format!("{here}/x:/x:ro"));
        assert_eq!(volume("..:/x").unwrap(), format!("{here}/..:/x"));
        for as_it_is in ["/a:/b", "name:/b", "a/b:/c", "/alone", "~/x:/x"] {
            assert_eq!(volume(as_it_is).unwrap(), as_it_is);
        }
        let bind = mount(
            "type=bind,src=./a,dst=/x,bind-propagation=rprivate,readonly,bind-recursive=readonly,consistency=cached",
        );
        let json = serde_json::to_value(bind.unwrap()).unwrap();
        assert_eq!(json["Source"], format!("{here}/a"));
        assert_eq!(json["BindOptions"]["Propagation"], "rprivate");
        assert_eq!(json["BindOptions"]["ReadOnlyForceRecursive"], true);
        assert_eq!(json["Consistency"], "cached");
        let create = mount("type=bind,src=/a,dst=/x,bind-create-src").unwrap();
        assert!(create.bind_options.unwrap().create_mountpoint);
    }

    #[test]
    fn what_a_mount_cannot_say_is_refused() {
        for bad in [
            "",
            "fly=1",
            "ro=perhaps",
            "tmpfs-size=big",
            "tmpfs-mode=9",
            "tmpfs-mode=77777",
            "type=bind,src=/a,dst=/b,bind-recursive=perhaps",
            "type=bind,src=/a,dst=/b,bind-recursive=readonly,bind-propagation=rprivate",
            "type=bind,src=/a,dst=/b,readonly,bind-recursive=readonly",
            "type=bind,src=/a,dst=/b,volume-nocopy",
            "type=volume,src=a,dst=/b,bind-propagation=private",
        ] {
            assert!(mount(bad).is_err(), "{bad}");
        }
    }
}
