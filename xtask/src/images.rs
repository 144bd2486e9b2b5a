//! Image archives for trials, made by tools that others wrote: umoci puts Debian's static busybox into OCI images, skopeo writes them as archives.
//! `busybox` is one layer; `layered` has five, with a whiteout, an opaque folder, a file that a later layer replaces, and a user.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{cache, packages, shell, workspace};

/// Part of the cache's key: to be raised when what this file does changes what comes out.
const RECIPE: &[u8] = b"3";
const IMAGES: [&str; 2] = ["busybox", "layered"];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nsailor:x:1000:1000:sailor:/home/sailor:/bin/sh\n";
const GROUP: &str = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\nsailor:x:1000:\n";

/// Makes the archives in `target/images` and returns that folder.
pub(crate) fn build() -> Result<PathBuf> {
    packages::ensure(packages::IMAGES)?;
    let busybox = fs::read("/bin/busybox").context("cannot read /bin/busybox")?;
    let key = cache::Key::default().input("recipe", RECIPE).input("busybox", &busybox).finish();
    let place = cache::entry("images", &key, make)?;
    let folder = workspace().join("target/images");
    for image in IMAGES {
        for kind in ["docker", "oci"] {
            let name = format!("{image}.{kind}.tar");
            let bytes = fs::read(place.join(&name))
                .with_context(|| format!("cannot read {name} in {}", place.display()))?;
            cache::write_if_changed(&folder.join(&name), &bytes)?;
        }
    }
    Ok(folder)
}

fn make(folder: &Path) -> Result<()> {
    eprintln!("making images with umoci and skopeo");
    let work = tempfile::tempdir().context("cannot make a temporary folder")?;
    let umoci = Umoci { work: work.path(), layout: work.path().join("layout") };
    umoci.run(&["init", "--layout", umoci.layout()?])?;

    let root = work.path().join("rootfs");
    root_file_system(&root)?;
    umoci.run(&["new", "--image", &umoci.image("busybox")?])?;
    umoci.insert("busybox", &root, "/", &[])?;
    umoci.run(&["tag", "--image", &umoci.image("busybox")?, "layered"])?;
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    umoci.configure("busybox", &["--config.cmd", "sh", "--config.env", path])?;

    let second = work.path().join("second");
    for (name, contents) in
        [("kept", "one\n"), ("removed", "gone\n"), ("replaced", "old\n"), ("opaque/lower", "gone\n")]
    {
        write(&second.join(name), contents, 0o644)?;
    }
    umoci.insert("layered", &second, "/data", &[])?;
    umoci.run(&["insert", "--image", &umoci.image("layered")?, "--whiteout", "/data/removed"])?;
    let opaque = work.path().join("opaque");
    write(&opaque.join("upper"), "here\n", 0o644)?;
    umoci.insert("layered", &opaque, "/data/opaque", &["--opaque"])?;
    let replaced = work.path().join("replaced");
    write(&replaced, "new\n", 0o600)?;
    umoci.insert("layered", &replaced, "/data/replaced", &[])?;
    let user = [
        "--config.user",
        "sailor",
        "--config.workingdir",
        "/home/sailor",
        "--config.label",
        "org.example.boat=coracle",
    ];
    umoci.configure(
        "layered",
        &[&["--config.cmd", "sh", "--config.env", path, "--config.env", "BOAT=coracle"], &user[..]].concat(),
    )?;

    for image in IMAGES {
        for (kind, transport) in [("docker", "docker-archive"), ("oci", "oci-archive")] {
            let file = folder.join(format!("{image}.{kind}.tar"));
            let to = format!("{transport}:{}:{image}:latest", file.display());
            let mut skopeo = shell::command("skopeo", ["--insecure-policy", "--tmpdir"]);
            skopeo.arg(work.path()).args(["copy", "--quiet", &format!("oci:{}", umoci.image(image)?), &to]);
            shell::output(&mut skopeo)?;
        }
    }
    Ok(())
}

struct Umoci<'a> {
    work: &'a Path,
    layout: PathBuf,
}

impl Umoci<'_> {
    fn layout(&self) -> Result<&str> {
        self.layout.to_str().context("the temporary folder's path is not UTF-8")
    }

    fn image(&self, tag: &str) -> Result<String> {
        Ok(format!("{}:{tag}", self.layout()?))
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        shell::output(shell::command("umoci", arguments).current_dir(self.work)).map(drop)
    }

    fn configure(&self, tag: &str, settings: &[&str]) -> Result<()> {
        self.run(&[&["config", "--image", &self.image(tag)?], settings].concat())
    }

    /// Adds a layer with what is at `from`.
    fn insert(&self, tag: &str, from: &Path, to: &str, options: &[&str]) -> Result<()> {
        let image = self.image(tag)?;
        let mut arguments = vec!["insert", "--image", &image];
        if !nix::unistd::geteuid().is_root() {
            arguments.push("--rootless");
        }
        arguments.extend(options);
        arguments.extend([from.to_str().context("the temporary folder's path is not UTF-8")?, to]);
        self.run(&arguments)
    }
}

fn root_file_system(root: &Path) -> Result<()> {
    for folder in ["bin", "dev", "etc", "home/sailor", "proc", "root", "sys", "tmp", "usr", "var/tmp"] {
        fs::create_dir_all(root.join(folder)).context("cannot make a folder")?;
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
    for (folder, mode) in [("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o700)] {
        fs::set_permissions(root.join(folder), fs::Permissions::from_mode(mode))?;
    }
    symlink("bin", root.join("sbin"))?;
    symlink("../bin", root.join("usr/bin"))?;
    let busybox = root.join("bin/busybox");
    fs::copy("/bin/busybox", &busybox).context("cannot copy /bin/busybox")?;
    for applet in shell::output(&mut shell::command("/bin/busybox", ["--list"]))?.lines() {
        if applet != "busybox" {
            fs::hard_link(&busybox, root.join("bin").join(applet))
                .with_context(|| format!("cannot link {applet}"))?;
        }
    }
    write(&root.join("etc/passwd"), PASSWD, 0o644)?;
    write(&root.join("etc/group"), GROUP, 0o644)?;
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(root.join("home/sailor"), Some(1000), Some(1000))
            .context("cannot give a folder to its user")?;
    }
    Ok(())
}

fn write(path: &Path, contents: &str, mode: u32) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}
