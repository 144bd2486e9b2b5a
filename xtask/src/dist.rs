//! The one file that people download: the `coracle` binary with everything for the virtual machine appended, in `target/dist/`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{guest, shell, workspace};

/// Builds it unless it is newer than everything that it is made of.
pub(crate) fn build() -> Result<PathBuf> {
    let guest = guest::build()?;
    let binary = guest::static_binary("coracle", "coracle")?;
    let output = workspace().join("target/dist/coracle");
    let parts = [&binary, &guest.kernel, &guest.initramfs, &guest.data];
    if !is_newer(&output, &parts)? {
        fs::create_dir_all(workspace().join("target/dist")).context("cannot make target/dist")?;
        let mut bundle =
            shell::command(binary.to_str().context("the workspace's path is not UTF-8")?, ["bundle"]);
        bundle
            .arg("--kernel")
            .arg(&guest.kernel)
            .arg("--initramfs")
            .arg(&guest.initramfs)
            .arg("--data")
            .arg(&guest.data);
        shell::output(bundle.arg("--output").arg(&output))?;
    }
    Ok(output)
}

fn is_newer(output: &Path, parts: &[&PathBuf]) -> Result<bool> {
    let Ok(made) = fs::metadata(output).and_then(|metadata| metadata.modified()) else { return Ok(false) };
    for part in parts {
        let changed = fs::metadata(part)
            .and_then(|metadata| metadata.modified())
            .with_context(|| format!("cannot read {}", part.display()))?;
        if changed >= made {
            return Ok(false);
        }
    }
    Ok(true)
}
