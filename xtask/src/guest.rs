//! What goes into the virtual machine: the kernel, an initramfs with the agent, and the template of the data disk, all in `target/guest/`.
//! A file is rewritten only when its bytes change, so that what depends on it knows.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{cache, cpio, kernel, packages, shell, workspace};

/// The target that static binaries are built for; naming it keeps the flags from build scripts and macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The files that were made.
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) data: PathBuf,
}

/// Makes everything for the virtual machine.
pub(crate) fn build() -> Result<Guest> {
    let folder = workspace().join("target/guest");
    let guest = Guest {
        kernel: folder.join("vmlinux"),
        initramfs: folder.join("initramfs.cpio"),
        data: folder.join("data.ext4.zst"),
    };
    let built = kernel::build()?;
    copy(&built, &guest.kernel)?;
    let agent = static_binary("coracle-guest-agent", "coracle-guest-agent")?;
    let agent = fs::read(&agent).with_context(|| format!("cannot read {}", agent.display()))?;
    cache::write_if_changed(&guest.initramfs, &initramfs(&agent))?;
    copy(&data_disk()?, &guest.data)?;
    Ok(guest)
}

/// Builds a binary of ours for release, linked statically so that it runs on any Linux, and returns its path.
pub(crate) fn static_binary(package: &str, name: &str) -> Result<PathBuf> {
    let target = workspace().join("target/static");
    let mut command = cargo();
    command
        .args(["build", "--release", "--target", TARGET, "-p", package, "--bin", name])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_TARGET_DIR", &target);
    shell::run(&mut command)?;
    Ok(target.join(TARGET).join("release").join(name))
}

/// Cargo, in the workspace, as it was called for us, but with nothing of that call.
pub(crate) fn cargo() -> std::process::Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = shell::command::<[&str; 0], _>(&cargo, []);
    command.current_dir(workspace());
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    command
}

fn initramfs(agent: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::default();
    for folder in ["dev", "proc", "sys"] {
        archive.folder(folder, 0o755);
    }
    archive.device("dev/console", 0o600, 5, 1);
    archive.device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, agent);
    archive.finish()
}

/// The data disk's template: a small ext4 that the guest grows to the disk's size. Its group descriptors leave room for growth to 1 TiB (beyond
/// that the kernel lays them out anew); more room costs every growth more writes. Everything random in it is fixed, so that the same tools make
/// the same bytes.
const MKFS: &[&str] = &[
    "-F",
    "-q",
    "-b",
    "4096",
    "-i",
    "16384",
    "-I",
    "256",
    "-m",
    "0",
    "-G",
    "64",
    "-J",
    "size=32",
    "-L",
    "coracle-data",
    "-O",
    "has_journal,ext_attr,extent,64bit,flex_bg,resize_inode,sparse_super,metadata_csum,dir_index,huge_file,large_file,dir_nlink,extra_isize",
    "-U",
    "c0aac1e0-da7a-4d15-8000-000000000001",
    "-E",
    "hash_seed=c0aac1e0-da7a-4d15-8000-000000000002,resize=268435456,nodiscard,lazy_itable_init=0,assume_storage_prezeroed=1,root_owner=0:0",
];
const TEMPLATE_BYTES: u64 = 128 << 20;

fn data_disk() -> Result<PathBuf> {
    packages::ensure(packages::DISK)?;
    let key = cache::Key::default()
        .input("recipe", b"1")
        .input("mkfs", MKFS.join("\n").as_bytes())
        .input("size", &TEMPLATE_BYTES.to_le_bytes())
        .finish();
    let place = cache::entry("data", &key, |folder| {
        let image = folder.join("data.ext4");
        fs::File::create(&image)
            .and_then(|file| file.set_len(TEMPLATE_BYTES))
            .context("cannot make the data disk's image")?;
        let mut mkfs = shell::command(tool("mkfs.ext4"), MKFS);
        shell::output(
            mkfs.arg(&image).env("E2FSPROGS_FAKE_TIME", "1735689600").env("MKE2FS_CONFIG", "/dev/null"),
        )?;
        shell::output(shell::command("zstd", ["-q", "-19", "--rm"]).arg(&image)).map(drop)
    })?;
    Ok(place.join("data.ext4.zst"))
}

/// A system program that may not be on an ordinary user's PATH.
fn tool(name: &str) -> &str {
    match name {
        "mkfs.ext4" if Path::new("/usr/sbin/mkfs.ext4").exists() => "/usr/sbin/mkfs.ext4",
        "mkfs.ext4" if Path::new("/sbin/mkfs.ext4").exists() => "/sbin/mkfs.ext4",
        other => other,
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    cache::write_if_changed(to, &bytes)
}
