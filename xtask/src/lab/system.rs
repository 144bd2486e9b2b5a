//! What the lab's machine runs: a stock Debian kernel (unpacked, never installed) and an initramfs of busybox, the modules it needs and
//! `init.sh`. Made once and kept in the user's cache; the packages come from apt, which checks their signatures.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{cache, cpio, packages, shell};

const INIT: &str = include_str!("init.sh");

/// Modules that the lab needs; what they depend on is added.
const MODULES: &[&str] = &[
    "crc32c_generic",
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm_amd",
    "vhost_vsock",
    "vhost_net",
    "tun",
    "fuse",
    "virtiofs",
    "erofs",
    "loop",
    "ext4",
];

/// The files that QEMU starts.
pub(super) struct System {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

/// Returns the lab's system, made first if need be.
pub(super) fn get() -> Result<System> {
    packages::ensure(packages::LAB)?;
    let busybox = fs::read("/bin/busybox").context("cannot read /bin/busybox")?;
    let key = cache::Key::default()
        .input("recipe", b"1")
        .input("init", INIT.as_bytes())
        .input("modules", MODULES.join(" ").as_bytes())
        .input("busybox", &busybox)
        .finish();
    let place = cache::entry("lab", &key, |folder| make(folder, &busybox))?;
    Ok(System { kernel: place.join("vmlinuz"), initramfs: place.join("initramfs.cpio") })
}

fn make(folder: &Path, busybox: &[u8]) -> Result<()> {
    eprintln!("making the lab: fetching Debian's kernel");
    let work = tempfile::tempdir().context("cannot make a temporary folder")?;
    let depends =
        shell::output(&mut shell::command("apt-cache", ["depends", "--important", "linux-image-amd64"]))?;
    let name = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .context("linux-image-amd64 depends on no kernel; try `apt-get update`")?;
    // As root, apt drops its privileges for the download where it can; the folder must then be open to it.
    fs::set_permissions(work.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    shell::output(
        shell::command("apt-get", ["-o", "APT::Sandbox::User=root", "download", name])
            .current_dir(work.path()),
    )
    .context("cannot fetch the lab's kernel")?;
    let package =
        files(work.path(), &|name| name.ends_with(".deb"))?.pop().context("apt-get downloaded no package")?;
    let tree = work.path().join("tree");
    shell::output(shell::command("dpkg-deb", ["-x"]).arg(&package).arg(&tree))?;

    let kernel = files(&tree.join("boot"), &|name| name.starts_with("vmlinuz-"))?
        .pop()
        .context("the package has no kernel")?;
    fs::copy(&kernel, folder.join("vmlinuz")).context("cannot copy the kernel")?;
    let initramfs = initramfs(&tree, busybox)?;
    fs::write(folder.join("initramfs.cpio"), initramfs).context("cannot write the initramfs")
}

fn initramfs(tree: &Path, busybox: &[u8]) -> Result<Vec<u8>> {
    let mut archive = cpio::Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "modules", "lower", "changes", "root"] {
        archive.folder(folder, 0o755);
    }
    archive.device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, busybox);
    archive.file("init", 0o755, INIT.as_bytes());
    let mut order = Vec::new();
    let modules: BTreeMap<String, PathBuf> = files(tree, &|name| name.ends_with(".ko"))?
        .into_iter()
        .filter_map(|path| Some((path.file_stem()?.to_str()?.replace('-', "_"), path)))
        .collect();
    for name in MODULES {
        add_module(name, &modules, &mut order)?;
    }
    for name in &order {
        let contents = fs::read(&modules[name]).with_context(|| format!("cannot read module {name}"))?;
        archive.file(&format!("modules/{name}.ko"), 0o644, &contents);
    }
    archive.file("modules/order", 0o644, format!("{}\n", order.join("\n")).as_bytes());
    Ok(archive.finish())
}

fn add_module(name: &str, modules: &BTreeMap<String, PathBuf>, order: &mut Vec<String>) -> Result<()> {
    if order.iter().any(|known| known == name) {
        return Ok(());
    }
    let Some(path) = modules.get(name) else { bail!("the kernel has no module {name}") };
    let needs = shell::output(shell::command("/sbin/modinfo", ["-F", "depends"]).arg(path))?;
    for need in needs.trim().split(',').filter(|need| !need.is_empty()) {
        add_module(&need.replace('-', "_"), modules, order)?;
    }
    order.push(name.to_owned());
    Ok(())
}

/// Files below `folder` whose names please `wanted`, sorted.
fn files(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path(), wanted)?);
        } else if entry.file_name().to_str().is_some_and(wanted) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
