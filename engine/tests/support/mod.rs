//! An engine in this process, a real agent as an ordinary root process, and the stock `docker` CLI as the client.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod registry;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex, OnceLock},
    thread,
    time::{Duration, Instant},
};

use coracle_engine::{
    Engine, EngineConfig, HostFiles, RegistrySource, ServeEnd,
    sandbox::{Sandbox, SandboxId, process::ProcessSandbox},
};
use coracle_image_store::{
    ImageStore,
    registry::{Proxies, RegistrySettings, Retries},
};
use tokio::sync::oneshot;

/// The agent's program, built once.
pub(crate) fn agent_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests start the agent without a VM, so they must run as root"
        );
        let test = std::env::current_exe().unwrap();
        let folder = test.parent().and_then(Path::parent).expect("tests are in deps/ of the target folder");
        let target = folder.parent().expect("a profile's folder is in the target folder");
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "coracle-guest-agent", "--target-dir"])
            .arg(target)
            .status();
        assert!(built.expect("cargo can be run").success(), "the agent cannot be built");
        target.join("debug/coracle-guest-agent")
    })
}

/// What is kept from one daemon to the next.
pub(crate) struct Machine {
    pub(crate) home: tempfile::TempDir,
    small_disk: bool,
    /// How its engines speak to registries; nothing leaves this machine.
    pub(crate) registries: Mutex<RegistrySettings>,
    /// How its engines resolve names; none is asked of anybody outside.
    pub(crate) host_files: Mutex<HostFiles>,
}

/// A running engine.
pub(crate) struct Daemon {
    machine: Arc<Machine>,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<ServeEnd>>,
}

impl Machine {
    pub(crate) fn new() -> Arc<Self> {
        let home = tempfile::tempdir().unwrap();
        Arc::new(Self {
            home,
            small_disk: false,
            registries: Mutex::new(no_way_out()),
            host_files: Mutex::new(no_names()),
        })
    }

    /// With a disk of its own of this many MiB.
    pub(crate) fn with_disk(size: u32) -> Arc<Self> {
        let home = tempfile::tempdir().unwrap();
        let options = format!("size={size}m");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(home.path()).status();
        assert!(mounted.unwrap().success(), "these tests mount a small disk, so they must run as root");
        Arc::new(Self {
            home,
            small_disk: true,
            registries: Mutex::new(no_way_out()),
            host_files: Mutex::new(no_names()),
        })
    }

    fn agent_pid(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.home.path().join("vms/default/agent.pid")).ok()?;
        Some(text.trim().to_owned())
    }

    /// Kills the agent, as when a VM is killed from outside.
    pub(crate) fn kill_sandbox(&self) {
        let pid = self.agent_pid().expect("the sandbox runs");
        assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end_sandbox();
        if self.small_disk {
            let _ = Command::new("umount").arg(self.home.path()).status();
        }
    }
}

impl Machine {
    fn end_sandbox(&self) {
        let Some(pid) = self.agent_pid() else { return };
        let _ = Command::new("kill").arg(&pid).stderr(Stdio::null()).status();
        // It unmounts what is in the folder that is about to go.
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let begun = Instant::now();
        while proc.exists() && begun.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Daemon {
    pub(crate) fn start(machine: &Arc<Machine>) -> Self {
        let (shutdown, asked) = oneshot::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let home = machine.home.path().to_owned();
        let agent = agent_program();
        let settings = Arc::clone(machine);
        let host_files = settings.host_files.lock().unwrap().clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let images = Arc::new(ImageStore::open(&home.join("images")).unwrap());
                let folder = home.join("vms");
                let factory = move |id: &SandboxId| -> Arc<dyn Sandbox> {
                    Arc::new(ProcessSandbox::new(id.clone(), agent, &folder.join(id.as_str())))
                };
                let config = EngineConfig {
                    home: home.clone(),
                    version: "0.0.0-test".to_owned(),
                    git_commit: String::new(),
                    registries: RegistrySource::new(move || Ok(settings.registries.lock().unwrap().clone())),
                    host_files,
                };
                let engine = Engine::new(config, images, Arc::new(factory)).await.unwrap();
                let socket = home.join("docker.sock");
                let _ = std::fs::remove_file(&socket);
                let listener = tokio::net::UnixListener::bind(&socket).unwrap();
                ready.send(()).unwrap();
                engine.serve(listener, async { drop(asked.await) }).await
            })
        });
        is_ready.recv().expect("the engine starts");
        Self { machine: Arc::clone(machine), shutdown: Some(shutdown), thread: Some(thread) }
    }

    /// Ends the engine; containers run on.
    pub(crate) fn end(mut self) -> ServeEnd {
        self.shutdown.take().map(|shutdown| shutdown.send(()));
        self.thread.take().unwrap().join().unwrap()
    }

    /// Waits until the engine ends by itself.
    pub(crate) fn wait(mut self) -> ServeEnd {
        self.thread.take().unwrap().join().unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.machine.home.path().join("docker.sock")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(args);
        command.env("DOCKER_HOST", format!("unix://{}", self.socket().display()));
        command.env("DOCKER_CONFIG", self.machine.home.path().join("docker-config"));
        command.env_remove("DOCKER_CONTEXT").env_remove("DOCKER_API_VERSION");
        command
    }

    pub(crate) fn docker(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().expect("docker is on PATH")
    }

    /// Runs docker, which must succeed; gives what it printed.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.docker(args);
        assert!(output.status.success(), "docker {args:?}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs docker, which must fail with this code; gives what it printed on stderr.
    pub(crate) fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.docker(args);
        assert_eq!(
            output.status.code(),
            Some(code),
            "docker {args:?}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stderr)
    }

    /// Waits until an `inspect` says this.
    pub(crate) fn until(&self, name: &str, format: &str, wanted: &str) {
        let mut seen = String::new();
        for _ in 0..200 {
            seen = self.ok(&["inspect", "-f", format, name]);
            if seen.trim() == wanted {
                return;
            }
            thread::sleep(Duration::from_millis(25));
        }
        panic!("{name}: {format} is {seen}, not {wanted}");
    }

    /// Runs docker with bytes on its standard input.
    pub(crate) fn with_input(&self, args: &[&str], input: Vec<u8>) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let writer = thread::spawn(move || {
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    }

    /// A request to the API without the CLI: status and body.
    pub(crate) fn api(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "30", "--unix-socket"])
            .arg(self.socket())
            .args(["--request", method, "--header", "Content-Type: application/json", "--data", body])
            .args(["--write-out", "\n%{http_code}", &format!("http://docker{path}")])
            .output()
            .expect("curl is on PATH");
        let answer = text(&output.stdout);
        let (body, status) =
            answer.rsplit_once('\n').unwrap_or_else(|| panic!("{method} {path}: {}", text(&output.stderr)));
        (status.parse().unwrap(), body.to_owned())
    }

    /// Loads a one-layer busybox image.
    pub(crate) fn load_busybox(&self) {
        self.load_image("busybox", "{}", |_| ());
    }

    /// Loads a one-layer image of busybox and what is added to its root file system, with further words of configuration.
    pub(crate) fn load_image(&self, name: &str, config: &str, add: impl FnOnce(&Path)) {
        let folder = tempfile::tempdir_in(self.machine.home.path()).unwrap();
        let root = busybox_rootfs(folder.path());
        add(&root);
        let archive = self.machine.home.path().join(format!("{name}.tar"));
        make_archive(&archive, folder.path(), &root, name, config);
        let loaded = self.ok(&["load", "-i", archive.to_str().unwrap()]);
        assert!(loaded.contains(&format!("Loaded image: {name}:latest")), "{loaded}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let (Some(shutdown), Some(thread)) = (self.shutdown.take(), self.thread.take()) {
            let _ = shutdown.send(());
            let _ = thread.join();
        }
    }
}

/// An engine with busybox loaded.
pub(crate) fn with_busybox() -> (Arc<Machine>, Daemon) {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    (machine, daemon)
}

/// An OCI layout with busybox in two layers, made by umoci; `oci:FOLDER:latest` for skopeo.
pub(crate) fn layout(machine: &Machine) -> String {
    let folder = machine.home.path().join("layout");
    let image = format!("{}:latest", folder.display());
    let root = busybox_rootfs(machine.home.path());
    registry::run(Command::new("umoci").args(["init", "--layout"]).arg(&folder));
    registry::run(Command::new("umoci").args(["new", "--image", &image]));
    registry::run(Command::new("umoci").args(["insert", "--image", &image]).arg(root).arg("/"));
    let more = machine.home.path().join("more");
    std::fs::write(&more, "ahoy\n").unwrap();
    registry::run(Command::new("umoci").args(["insert", "--image", &image]).arg(more).arg("/etc/more"));
    registry::run(Command::new("umoci").args([
        "config",
        "--image",
        &image,
        "--config.cmd",
        "sh",
        "--config.env",
        "PATH=/bin",
    ]));
    format!("oci:{image}")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Settings for registries that lead to loopback only: all else is behind a proxy that is not there.
fn no_way_out() -> RegistrySettings {
    let nowhere = || "http://127.0.0.1:9".to_owned();
    let retries = Retries { attempts: 3, delay: Duration::from_millis(20), ..Retries::default() };
    let proxies = Proxies::Fixed { http: nowhere(), https: nowhere(), no: String::new() };
    RegistrySettings { proxies, retries, ..RegistrySettings::default() }
}

/// Files that are not there: nobody answers.
fn no_names() -> HostFiles {
    HostFiles { resolv_conf: "/nonexistent/resolv.conf".into(), hosts: "/nonexistent/hosts".into() }
}

/// A root file system with Debian's static busybox.
fn busybox_rootfs(folder: &Path) -> PathBuf {
    let root = folder.join("rootfs");
    for name in ["bin", "etc", "root", "tmp"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("Debian's busybox-static is installed");
    for applet in [
        "sh", "cat", "echo", "sleep", "true", "false", "ls", "id", "kill", "wc", "stty", "env", "hostname",
        "dd", "yes", "head", "grep", "mkdir", "touch", "mknod", "mount", "stat", "readlink", "dmesg", "ps",
    ] {
        let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(applet));
    }
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nsailor:x:1000:1000::/tmp:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\nsailor:x:1000:\n").unwrap();
    root
}

/// A docker archive of an image with one layer, made with GNU tar. `config` is a JSON object.
fn make_archive(archive: &Path, folder: &Path, root: &Path, name: &str, config: &str) {
    let image = folder.join("image");
    std::fs::create_dir_all(&image).unwrap();
    tar(&image.join("layer.tar"), root);
    let sum = Command::new("sha256sum").arg(image.join("layer.tar")).output().unwrap();
    let diff_id = text(&sum.stdout)[..64].to_owned();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let mut all = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{diff_id}")] },
    });
    let further: serde_json::Map<String, serde_json::Value> = serde_json::from_str(config).unwrap();
    all["config"].as_object_mut().unwrap().extend(further);
    std::fs::write(image.join("config.json"), all.to_string()).unwrap();
    let manifest = serde_json::json!([{
        "Config": "config.json",
        "RepoTags": [format!("{name}:latest")],
        "Layers": ["layer.tar"],
    }]);
    std::fs::write(image.join("manifest.json"), manifest.to_string()).unwrap();
    tar(archive, &image);
}

fn tar(archive: &Path, folder: &Path) {
    let made = Command::new("tar")
        .args(["--numeric-owner", "-cf"])
        .arg(archive)
        .arg("-C")
        .arg(folder)
        .arg(".")
        .status();
    assert!(made.unwrap().success());
}
