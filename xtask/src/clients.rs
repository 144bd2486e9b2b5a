//! Clients of the Docker API that are no Debian packages, for the tests: docker-py from PyPI.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{packages, shell, workspace};

/// docker-py's version.
const DOCKER_PY: &str = "7.1.0";

/// Installs them in `target/clients` unless they are there; a folder to put on PYTHONPATH.
pub(crate) fn build() -> Result<PathBuf> {
    let folder = workspace().join("target/clients");
    let (place, half) = (folder.join(format!("docker-py-{DOCKER_PY}")), folder.join("half"));
    if place.is_dir() {
        return Ok(place);
    }
    packages::ensure(&["python3-pip"])?;
    eprintln!("installing docker-py {DOCKER_PY}");
    if half.exists() {
        fs::remove_dir_all(&half).with_context(|| format!("cannot remove {}", half.display()))?;
    }
    let wanted = format!("docker=={DOCKER_PY}");
    // Debian's Python: another one on the PATH may be none that other people have.
    let mut pip = shell::command(
        "/usr/bin/python3",
        ["-m", "pip", "install", "--quiet", "--root-user-action", "ignore", "--target"],
    );
    shell::output(pip.arg(&half).arg(wanted)).context("cannot install docker-py")?;
    fs::rename(&half, &place).with_context(|| format!("cannot make {}", place.display()))?;
    Ok(place)
}
