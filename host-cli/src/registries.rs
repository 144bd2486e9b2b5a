//! How the daemon speaks to registries: what the person chose with `coracle up`, read anew for each pull, and the places
//! where Docker keeps certificates for registries.

use std::{env, path::PathBuf};

use anyhow::Result;
use coracle_engine::RegistrySource;
use coracle_image_store::registry::RegistrySettings;

use crate::{docker_context, failure::describe, paths::Home, settings::Settings};

/// Settings as they are when they are asked for.
pub(crate) fn source(home: &Home) -> RegistrySource {
    let home = home.clone();
    RegistrySource::new(move || load(&home).map_err(|error| describe(&error)))
}

fn load(home: &Home) -> Result<RegistrySettings> {
    let chosen = Settings::load(&home.settings())?;
    Ok(RegistrySettings {
        insecure_registries: chosen.insecure_registries.unwrap_or_default(),
        mirrors: chosen.registry_mirrors.unwrap_or_default(),
        certificate_folders: certificate_folders(home),
        ..RegistrySettings::default()
    })
}

/// Coracle's own, the person's Docker's, the system's Docker's.
fn certificate_folders(home: &Home) -> Vec<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    let of_docker = docker_context::config_folder();
    [
        Some(home.root().to_owned()),
        of_docker,
        config.map(|config| config.join("docker")),
        Some("/etc/docker".into()),
    ]
    .into_iter()
    .flatten()
    .map(|folder| folder.join("certs.d"))
    .collect()
}
