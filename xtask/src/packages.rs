//! Debian packages that the build needs: asks dpkg what is missing and installs only that.
//! Needs root or sudo only when something is missing, and says what to install where neither is to be had.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// What `cargo xtask kernel` needs.
pub(crate) const KERNEL: &[&str] = &[
    "linux-source-6.12",
    "make",
    "gcc",
    "libc6-dev",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "xz-utils",
    "binutils",
    "perl",
    "python3-minimal",
];
/// What makes the data disk's template.
pub(crate) const DISK: &[&str] = &["e2fsprogs", "zstd"];
/// What the lab needs.
pub(crate) const LAB: &[&str] = &["qemu-system-x86", "busybox-static", "cpio", "kmod", "util-linux"];
/// What makes the trial images.
pub(crate) const IMAGES: &[&str] = &["busybox-static", "umoci", "skopeo"];
/// The peers that benches compare with.
pub(crate) const PEERS: &[&str] = &["crun", "runc", "qemu-system-x86", "podman"];
/// What tests use besides.
pub(crate) const TESTS: &[&str] = &[
    "bsdutils",
    "curl",
    "docker-compose",
    "docker-registry",
    "erofs-utils",
    "git",
    "openssl",
    "python3",
    "tar",
];

/// Installs those of `wanted` that are missing.
pub(crate) fn ensure(wanted: &[&str]) -> Result<()> {
    let missing = missing(wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    eprintln!("installing Debian packages: {list}");
    if install(&missing).is_err() {
        // The package lists may be absent or older than the mirror.
        shell::output(&mut privileged("apt-get", &["update"])?)
            .context("cannot refresh the package lists")?;
        install(&missing).with_context(|| {
            format!("cannot install what is missing; try `apt-get install {list}` yourself")
        })?;
    }
    Ok(())
}

/// Installs the stock docker CLI unless there is one on the PATH.
pub(crate) fn ensure_docker_cli() -> Result<()> {
    if shell::on_path("docker") { Ok(()) } else { ensure(&["docker.io"]) }
}

fn missing<'a>(wanted: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query fails when it does not know one of the names, and still prints the others.
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(wanted)
        .output()
        .context("cannot start dpkg-query; this build tool knows Debian and its derivatives only")?;
    let known = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_installed =
        |name: &str| known.lines().any(|line| line.split_once(' ') == Some((name, "installed")));
    Ok(wanted.iter().copied().filter(|name| !is_installed(name)).collect())
}

fn install(names: &[&str]) -> Result<()> {
    let mut arguments = vec!["-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends"];
    arguments.extend(names);
    shell::output(&mut privileged("apt-get", &arguments)?).map(drop)
}

fn privileged(program: &str, arguments: &[&str]) -> Result<Command> {
    let mut command = if nix::unistd::geteuid().is_root() {
        shell::command(program, arguments)
    } else if shell::on_path("sudo") {
        let mut command = shell::command("sudo", ["DEBIAN_FRONTEND=noninteractive", program]);
        command.args(arguments);
        command
    } else {
        bail!("packages are missing and there is no sudo; as root, run: {program} {}", arguments.join(" "));
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}
