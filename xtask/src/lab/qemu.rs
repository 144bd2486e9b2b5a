//! The QEMU that emulates the lab.
//!
//! QEMU before 8.1 can miss it when one emulated processor changes code that another one translates at that moment, and then runs the
//! old code for ever. Kernels change their own code all the time (the kernel's include/linux/jump_label.h), the lab's as well as that
//! of the guests in it, so that both hang or fail now and then. Debian 12 has 7.2; its backports have a newer one, which is unpacked
//! into the user's cache and never installed. The libraries that it needs are those of the installed one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::system::files;
use crate::{cache, packages, shell};

const PROGRAM: &str = "qemu-system-x86_64";
/// The first version without the fault.
const WANTED: (u32, u32) = (8, 1);
const PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-system-data", "seabios"];
const SUITE: &str = "bookworm-backports";

/// How to start it.
pub(super) struct Qemu {
    pub(super) program: PathBuf,
    /// Where it finds its firmware, when not where it was built to look.
    firmware: Vec<PathBuf>,
}

impl Qemu {
    /// The arguments that come before all others.
    pub(super) fn arguments(&self) -> impl Iterator<Item = &std::ffi::OsStr> {
        self.firmware.iter().flat_map(|folder| ["-L".as_ref(), folder.as_os_str()])
    }
}

/// Returns the installed QEMU if it will do, else the one of Debian's backports. Where that cannot be had, the installed one must do.
pub(super) fn get() -> Result<Qemu> {
    packages::ensure(packages::LAB)?;
    let installed = Qemu { program: PROGRAM.into(), firmware: Vec::new() };
    if version(&installed.program)? >= WANTED {
        return Ok(installed);
    }
    let key = cache::Key::default().input("recipe", b"1").input("packages", PACKAGES.join(" ").as_bytes());
    match cache::entry("qemu", &key.finish(), unpack) {
        Ok(place) => Ok(Qemu {
            program: place.join("usr/bin").join(PROGRAM),
            firmware: vec![place.join("usr/share/qemu"), place.join("usr/share/seabios")],
        }),
        Err(error) => {
            eprintln!(
                "warning: the lab may hang with QEMU before 8.1, and a newer one cannot be had: {error:#}"
            );
            Ok(installed)
        }
    }
}

fn version(program: &Path) -> Result<(u32, u32)> {
    let said = shell::output(Command::new(program).arg("--version"))?;
    parse_version(&said).with_context(|| format!("cannot make out QEMU's version: {said}"))
}

fn parse_version(said: &str) -> Option<(u32, u32)> {
    let number = said.split_once("version ")?.1;
    let mut parts = number.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn unpack(folder: &Path) -> Result<()> {
    eprintln!("fetching a newer QEMU from Debian's backports");
    let work = tempfile::tempdir().context("cannot make a temporary folder")?;
    fs::set_permissions(work.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let path = |name: &str| -> Result<String> {
        let path = work.path().join(name);
        Ok(path.to_str().context("the temporary folder's path is not UTF-8")?.to_owned())
    };
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    fs::write(path("list")?, format!("deb [signed-by={keyring}] {} {SUITE} main\n", mirror()))?;
    fs::create_dir_all(work.path().join("lists/partial"))?;
    // Lists of its own: what is installed, and from where, is not touched.
    let options = [
        format!("Dir::Etc::SourceList={}", path("list")?),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        format!("Dir::State::Lists={}", path("lists")?),
        format!("Dir::Cache::pkgcache={}", path("packages.bin")?),
        format!("Dir::Cache::srcpkgcache={}", path("sources.bin")?),
        "APT::Sandbox::User=root".to_owned(),
    ];
    let apt = |arguments: &[&str]| {
        let mut command = shell::command("apt-get", options.iter().flat_map(|option| ["-o", option]));
        command.args(arguments).current_dir(work.path());
        shell::output(&mut command)
    };
    apt(&["update"]).context("cannot read the list of Debian's backports")?;
    apt(&[&["download"], &PACKAGES[..]].concat()).context("cannot fetch QEMU from Debian's backports")?;
    let archives = files(work.path(), &|name| name.ends_with(".deb"))?;
    if archives.len() != PACKAGES.len() {
        bail!("apt-get downloaded {} packages instead of {}", archives.len(), PACKAGES.len());
    }
    for archive in archives {
        shell::output(shell::command("dpkg-deb", ["-x"]).arg(&archive).arg(folder))?;
    }
    let program = folder.join("usr/bin").join(PROGRAM);
    let found = version(&program).context("the newer QEMU does not start here")?;
    if found < WANTED {
        bail!("Debian's backports have only QEMU {}.{}", found.0, found.1);
    }
    Ok(())
}

/// Where this machine gets Debian's packages from.
fn mirror() -> String {
    let known = shell::output(&mut shell::command(
        "apt-get",
        ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: bookworm"],
    ));
    let first = known.ok().and_then(|text| text.lines().next().map(str::to_owned));
    first.filter(|uri| !uri.is_empty()).unwrap_or_else(|| "http://deb.debian.org/debian".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_made_out() {
        let newer =
            "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright (c) 2003-2025";
        assert_eq!(parse_version(newer), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"), Some((7, 2)));
        assert_eq!(parse_version("what?"), None);
    }
}
