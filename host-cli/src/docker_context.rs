//! The docker context `coracle`, in the store of the docker CLI: `contexts/meta/<SHA-256 of the name>/meta.json`. It is
//! written as the docker CLI writes it, so that none need be installed.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::files;

/// The context's name.
const NAME: &str = "coracle";

/// Makes the context, or brings it up to date.
pub(crate) fn create(docker_host: &str) -> Result<()> {
    match config_folder() {
        Some(folder) => create_in(&folder, docker_host).context("cannot make the docker context `coracle`"),
        None => Ok(()),
    }
}

/// `DOCKER_CONFIG`, or `~/.docker`; nothing where there is no home.
pub(crate) fn config_folder() -> Option<PathBuf> {
    let named = std::env::var_os("DOCKER_CONFIG").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let home = std::env::var_os("HOME").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    named.or_else(|| home.map(|home| home.join(".docker")))
}

fn create_in(config: &Path, docker_host: &str) -> Result<()> {
    let meta = json!({
        "Name": NAME,
        "Metadata": { "Description": "Linux containers inside a tiny virtual machine" },
        "Endpoints": { "docker": { "Host": docker_host, "SkipTLSVerify": false } },
    });
    let text = serde_json::to_vec(&meta)?;
    let folder = config.join("contexts/meta").join(hex::encode(Sha256::digest(NAME)));
    let path = folder.join("meta.json");
    match fs::read(&path) {
        Ok(there) if there == text => return Ok(()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
        _ => {}
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    files::replace(&path, &text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_where_the_docker_cli_looks_for_it() {
        let folder = tempfile::tempdir().unwrap();
        create_in(folder.path(), "unix:///a").unwrap();
        create_in(folder.path(), "unix:///b").unwrap();
        let hash = hex::encode(Sha256::digest("coracle"));
        let text = fs::read(folder.path().join("contexts/meta").join(hash).join("meta.json")).unwrap();
        let meta: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(meta["Name"], "coracle");
        assert_eq!(meta["Endpoints"]["docker"]["Host"], "unix:///b");
    }
}
