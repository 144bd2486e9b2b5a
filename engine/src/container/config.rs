//! What a client asked a container to be: the supported part of Docker's `Config` and `HostConfig`.
//!
//! One definition serves requests, the record on disk, and `inspect`. Everything else that Docker knows is in
//! [`super::refused`], and is refused by name.

use std::collections::BTreeMap;

use coracle_image_store::config::ContainerConfig as ImageConfig;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::health::Healthcheck;
use super::isolation::DeviceMapping;
use super::resources::{ThrottleDevice, WeightDevice};
use crate::error::{Error, Result};

/// A JSON object without members, as Docker writes the elements of sets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Empty {}

/// Docker's `Config`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct Config {
    pub(crate) hostname: String,
    pub(crate) domainname: String,
    pub(crate) user: String,
    pub(crate) attach_stdin: bool,
    pub(crate) attach_stdout: bool,
    pub(crate) attach_stderr: bool,
    pub(crate) exposed_ports: BTreeMap<String, Empty>,
    pub(crate) tty: bool,
    pub(crate) open_stdin: bool,
    pub(crate) stdin_once: bool,
    pub(crate) env: Vec<String>,
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) cmd: Option<Vec<String>>,
    pub(crate) image: String,
    pub(crate) volumes: BTreeMap<String, Empty>,
    pub(crate) working_dir: String,
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) entrypoint: Option<Vec<String>>,
    pub(crate) network_disabled: bool,
    /// Of the first network, as older clients say it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) mac_address: String,
    pub(crate) labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_signal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_timeout: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) healthcheck: Option<Healthcheck>,
}

/// Docker's `HostConfig`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct HostConfig {
    #[serde(rename = "ContainerIDFile")]
    pub(crate) container_id_file: String,
    pub(crate) log_config: LogConfig,
    pub(crate) network_mode: String,
    pub(crate) restart_policy: RestartPolicy,
    pub(crate) auto_remove: bool,
    pub(crate) console_size: [u32; 2],
    pub(crate) cap_add: Vec<String>,
    pub(crate) cap_drop: Vec<String>,
    pub(crate) extra_hosts: Vec<String>,
    pub(crate) dns: Vec<String>,
    pub(crate) dns_options: Vec<String>,
    pub(crate) dns_search: Vec<String>,
    pub(crate) links: Vec<String>,
    pub(crate) port_bindings: BTreeMap<String, Vec<PortBinding>>,
    pub(crate) publish_all_ports: bool,
    pub(crate) group_add: Vec<String>,
    pub(crate) oom_score_adj: i64,
    pub(crate) readonly_rootfs: bool,
    pub(crate) security_opt: Vec<String>,
    pub(crate) tmpfs: BTreeMap<String, String>,
    pub(crate) binds: Vec<String>,
    pub(crate) mounts: Vec<MountRequest>,
    pub(crate) volumes_from: Vec<String>,
    pub(crate) volume_driver: String,
    pub(crate) shm_size: i64,
    pub(crate) ulimits: Vec<Ulimit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) init: Option<bool>,
    pub(crate) memory: i64,
    pub(crate) memory_swap: i64,
    pub(crate) memory_reservation: i64,
    pub(crate) nano_cpus: i64,
    pub(crate) cpu_period: i64,
    pub(crate) cpu_quota: i64,
    pub(crate) cpu_shares: i64,
    pub(crate) cpuset_cpus: String,
    pub(crate) cpuset_mems: String,
    pub(crate) blkio_weight: u16,
    pub(crate) blkio_weight_device: Vec<WeightDevice>,
    pub(crate) blkio_device_read_bps: Vec<ThrottleDevice>,
    pub(crate) blkio_device_write_bps: Vec<ThrottleDevice>,
    #[serde(rename = "BlkioDeviceReadIOps")]
    pub(crate) blkio_device_read_iops: Vec<ThrottleDevice>,
    #[serde(rename = "BlkioDeviceWriteIOps")]
    pub(crate) blkio_device_write_iops: Vec<ThrottleDevice>,
    pub(crate) memory_swappiness: Option<i64>,
    pub(crate) oom_kill_disable: Option<bool>,
    #[serde(skip_serializing)]
    pub(crate) kernel_memory: i64,
    #[serde(rename = "KernelMemoryTCP", skip_serializing)]
    pub(crate) kernel_memory_tcp: i64,
    pub(crate) pids_limit: Option<i64>,
    pub(crate) privileged: bool,
    pub(crate) devices: Vec<DeviceMapping>,
    pub(crate) device_cgroup_rules: Vec<String>,
    pub(crate) sysctls: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) ipc_mode: String,
    pub(crate) pid_mode: String,
    #[serde(rename = "UTSMode")]
    pub(crate) uts_mode: String,
    pub(crate) userns_mode: String,
    pub(crate) cgroupns_mode: String,
    pub(crate) cgroup_parent: String,
    pub(crate) runtime: String,
    pub(crate) isolation: String,
    pub(crate) masked_paths: Option<Vec<String>>,
    pub(crate) readonly_paths: Option<Vec<String>>,
}

/// Which log driver, with its options.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct LogConfig {
    #[serde(rename = "Type")]
    pub(crate) driver: String,
    pub(crate) config: BTreeMap<String, String>,
}

/// When to start again; [`super::restart`] reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct RestartPolicy {
    pub(crate) name: String,
    pub(crate) maximum_retry_count: i64,
}

/// Docker's `PortBinding`: where on the host a container's port is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct PortBinding {
    pub(crate) host_ip: String,
    pub(crate) host_port: String,
}

/// Docker's `Mount`: what `--mount` asks for; [`super::mounts`] reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct MountRequest {
    #[serde(rename = "Type")]
    pub(crate) kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) source: String,
    pub(crate) target: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) read_only: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) consistency: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bind_options: Option<BindOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) volume_options: Option<VolumeOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tmpfs_options: Option<TmpfsOptions>,
    /// Known so that it is not overlooked: no kind of mount that there is has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image_options: Option<Value>,
}

/// What `--mount type=bind` can say more.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct BindOptions {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) propagation: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) non_recursive: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) create_mountpoint: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) read_only_non_recursive: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) read_only_force_recursive: bool,
}

/// What `--mount type=volume` can say more.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct VolumeOptions {
    pub(crate) no_copy: bool,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) driver_config: DriverConfig,
    pub(crate) subpath: String,
}

/// Who keeps a volume, and how.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct DriverConfig {
    pub(crate) name: String,
    pub(crate) options: BTreeMap<String, String>,
}

/// What `--mount type=tmpfs` can say more.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct TmpfsOptions {
    pub(crate) size_bytes: i64,
    pub(crate) mode: u32,
    pub(crate) options: Vec<Vec<String>>,
}

/// A resource limit; -1 is unlimited.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct Ulimit {
    pub(crate) name: String,
    pub(crate) soft: i64,
    pub(crate) hard: i64,
}

/// Docker takes a command as an array or, from old clients, as one string.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(Option::deserialize(deserializer)?.map(|value| match value {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    }))
}

impl Config {
    /// Fills in what the client left to the image, by Docker's rules.
    pub(crate) fn merge_image(&mut self, image: &ImageConfig) -> Result<()> {
        fill(&mut self.user, &image.user);
        fill(&mut self.working_dir, &image.working_dir);
        for port in &image.exposed_ports {
            self.exposed_ports.entry(port.clone()).or_default();
        }
        for volume in &image.volumes {
            self.volumes.entry(volume.clone()).or_default();
        }
        for (name, value) in &image.labels {
            self.labels.entry(name.clone()).or_insert_with(|| value.clone());
        }
        let given: Vec<String> = self.env.iter().map(|variable| env_name(variable).to_owned()).collect();
        let inherited =
            image.env.iter().filter(|variable| !given.iter().any(|name| name == env_name(variable)));
        self.env.extend(inherited.cloned());
        if self.entrypoint.as_ref().is_none_or(Vec::is_empty) {
            if self.cmd.as_ref().is_none_or(Vec::is_empty) {
                self.cmd = image.cmd.clone();
            }
            if self.entrypoint.is_none() {
                self.entrypoint = image.entrypoint.clone();
            }
        }
        if self.entrypoint.as_deref() == Some(&[String::new()]) {
            self.entrypoint = None;
        }
        if self.stop_signal.as_ref().is_none_or(String::is_empty) {
            self.stop_signal = image.stop_signal.clone().filter(|signal| !signal.is_empty());
        }
        self.stop_timeout = self.stop_timeout.or(image.stop_timeout);
        if let Some(declared) = Healthcheck::of_image(image) {
            self.healthcheck.get_or_insert_default().fill(&declared);
        }
        if self.command().is_empty() {
            return Err(Error::invalid("no command specified"));
        }
        Ok(())
    }

    /// Entry point and command in one.
    pub(crate) fn command(&self) -> Vec<String> {
        let parts = [&self.entrypoint, &self.cmd];
        parts.into_iter().flatten().flatten().cloned().collect()
    }
}

fn fill(own: &mut String, images: &str) {
    if own.is_empty() {
        images.clone_into(own);
    }
}

/// The part before `=`.
pub(crate) fn env_name(variable: &str) -> &str {
    variable.split_once('=').map_or(variable, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: Some(vec!["/entry".to_owned()]),
            cmd: Some(vec!["default".to_owned()]),
            env: vec!["PATH=/bin".to_owned(), "A=image".to_owned()],
            user: "app".to_owned(),
            ..ImageConfig::default()
        }
    }

    fn merged(json: &str) -> Config {
        let mut config: Config = serde_json::from_str(json).unwrap();
        config.merge_image(&image()).unwrap();
        config
    }

    #[test]
    fn the_images_command_yields_to_the_clients() {
        for (json, expected) in [
            ("{}", vec!["/entry", "default"]),
            (r#"{"Cmd":["x"]}"#, vec!["/entry", "x"]),
            (r#"{"Cmd":"x"}"#, vec!["/entry", "x"]),
            (r#"{"Entrypoint":["/mine"]}"#, vec!["/mine"]),
            (r#"{"Entrypoint":["/mine"],"Cmd":["x"]}"#, vec!["/mine", "x"]),
            (r#"{"Entrypoint":[""],"Cmd":["x"]}"#, vec!["x"]),
            (r#"{"Entrypoint":[],"Cmd":["x"]}"#, vec!["x"]),
        ] {
            assert_eq!(merged(json).command(), expected, "{json}");
        }
    }

    #[test]
    fn no_command_at_all_is_an_error() {
        let mut config: Config = serde_json::from_str(r#"{"Entrypoint":[""]}"#).unwrap();
        assert_eq!(config.merge_image(&image()).unwrap_err().to_string(), "no command specified");
    }

    #[test]
    fn the_clients_environment_wins() {
        let config = merged(r#"{"Env":["A=mine","B"],"User":"root"}"#);
        assert_eq!(config.env, ["A=mine", "B", "PATH=/bin"]);
        assert_eq!(config.user, "root");
        assert_eq!(merged("{}").user, "app");
    }
}
