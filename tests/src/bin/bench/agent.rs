//! Create, start and end of a container: the agent on this machine, without a VM, against crun and runc from Debian.
//!
//! The same program from the same busybox, in new pid, mount, uts, ipc, net and cgroup namespaces. Ours also mounts an overlay
//! each time, which the peers' root folder does without; the peers' time includes their own start as processes, as it does in
//! use. crun refuses a machine that has cgroup v2 beside v1 ("hybrid"), so the bench unmounts v2 in a mount namespace of its own.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use coracle_agent_api::{DiffId, LayerSource};
use coracle_image_store::ImageStore;
use coracle_tests::{
    agent, image_archive,
    report::{self, Row, median},
    workspace,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// The peers, and how each runs a bundle.
const PEERS: [(&str, &[&str]); 2] = [("crun", &["run"]), ("runc", &["run"])];

/// Where systemd mounts cgroup v2 beside v1.
const HYBRID: &str = "/sys/fs/cgroup/unified";

pub(crate) fn bench(rounds: usize, json: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let ours = Agent::start(folder.path())?;
    let bundle = bundle(folder.path())?;
    leave_hybrid_cgroups()?;
    let peers: Vec<_> = PEERS.into_iter().filter(|(name, args)| runs(name, args, &bundle)).collect();
    let (mut own, mut theirs) = (Vec::new(), vec![Vec::new(); peers.len()]);
    for round in 0..rounds {
        own.push(ours.run(round)?);
        for ((name, args), times) in peers.iter().zip(&mut theirs) {
            times.push(run_peer(name, args, &bundle, round)?);
        }
    }
    let value = median(&own);
    let mut rows = Vec::new();
    for (name, _) in PEERS {
        let times = peers.iter().position(|(peer, _)| *peer == name).map(|at| median(&theirs[at]));
        let metric = if times.is_some() {
            "create, start, exit".to_owned()
        } else {
            format!("create, start, exit ({name} did not run)")
        };
        rows.push(Row {
            metric,
            value,
            unit: "ms",
            peer: times.map(|time| (name.to_owned(), time)),
            goal: Some(1.0),
        });
    }
    report::print("agent", "this machine", true, &rows, json)
}

/// An agent as an ordinary root process.
struct Agent {
    child: Child,
    socket: PathBuf,
    diff_id: DiffId,
    layer: String,
}

impl Agent {
    fn start(folder: &Path) -> Result<Self> {
        let store = ImageStore::open(&folder.join("images"))?;
        let loaded = store.load(fs::File::open(image_archive("busybox.docker.tar"))?, &mut |_| ())?;
        let image = store.image(&loaded.first().context("the archive has an image")?.id)?;
        let layer = image.layers.first().context("the image has a layer")?;
        let (socket, ready) = (folder.join("agent.sock"), folder.join("ready.sock"));
        let listener = UnixListener::bind(&ready)?;
        let binary = env::var_os("CORACLE_AGENT").map_or_else(
            || workspace().join("target/static/x86_64-unknown-linux-gnu/release/coracle-guest-agent"),
            PathBuf::from,
        );
        let child = Command::new(&binary)
            .args(["--listen-unix".as_ref(), socket.as_os_str(), "--ready-unix".as_ref(), ready.as_os_str()])
            .args(["--data-dir".as_ref(), folder.join("data").as_os_str()])
            .env("CORACLE_LOG", "warn")
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        let (ready, _) = listener.accept()?;
        let mut hello = String::new();
        BufReader::new(ready).read_line(&mut hello)?;
        ensure!(!hello.is_empty(), "the agent ended without a word");
        let layer = layer.path.to_str().context("a UTF-8 path")?;
        let diff_id = image.layers[0].diff_id.hex().parse()?;
        Ok(Self { child, socket, diff_id, layer: layer.to_owned() })
    }

    /// Milliseconds from the start request to the end of the output.
    fn run(&self, round: usize) -> Result<f64> {
        let id = format!("{round:064x}");
        let source = LayerSource::File { path: self.layer.clone() };
        let spec = agent::container(&self.diff_id, source, &["/bin/busybox", "true"]);
        let mut api = UnixStream::connect(&self.socket)?;
        let begin = Instant::now();
        agent::start(&mut api, &id, &spec)?;
        let (_, code) = agent::output(&mut UnixStream::connect(&self.socket)?, &id, &mut || ())?;
        agent::call(&mut api, "DELETE", &format!("/v1/processes/{id}"), b"")?;
        agent::call(&mut api, "DELETE", &format!("/v1/containers/{id}"), b"")?;
        ensure!(code == 0, "true ended with {code}");
        Ok(begin.elapsed().as_secs_f64() * 1e3)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let ended = UnixStream::connect(&self.socket)
            .map_err(anyhow::Error::from)
            .and_then(|mut api| agent::call(&mut api, "POST", "/v1/shutdown", b""));
        if ended.is_err() {
            drop(self.child.kill());
        }
        drop(self.child.wait());
    }
}

/// Gives this process, and the peers that it runs, a view of the machine without cgroup v2 beside v1.
fn leave_hybrid_cgroups() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace needs root")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    if fs::read_to_string("/proc/self/mounts")?.contains(&format!(" {HYBRID} ")) {
        umount2(HYBRID, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// An OCI bundle of the same busybox, with the configuration that crun writes itself.
fn bundle(folder: &Path) -> Result<PathBuf> {
    let bundle = folder.join("bundle");
    fs::create_dir_all(bundle.join("rootfs/bin"))?;
    fs::copy("/bin/busybox", bundle.join("rootfs/bin/busybox")).context("busybox-static is not installed")?;
    let made =
        Command::new("crun").arg("spec").current_dir(&bundle).status().context("crun is not installed")?;
    ensure!(made.success(), "`crun spec` failed");
    let path = bundle.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!(["/bin/busybox", "true"]);
    fs::write(&path, config.to_string())?;
    Ok(bundle)
}

fn run_peer(name: &str, args: &[&str], bundle: &Path, round: usize) -> Result<f64> {
    let begin = Instant::now();
    let ended = Command::new(name)
        .args(args)
        .args(["--bundle".as_ref(), bundle.as_os_str()])
        .arg(format!("coracle-bench-{}-{round}", std::process::id()))
        .stdin(Stdio::null())
        .output()?;
    if !ended.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// Whether a peer runs here at all; if not, it says why.
fn runs(name: &str, args: &[&str], bundle: &Path) -> bool {
    match run_peer(name, args, bundle, usize::MAX) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("{name} is left out: {error:#}");
            false
        }
    }
}
