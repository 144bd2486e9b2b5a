//! A Coracle of its own for a test: its own home, socket, daemon and virtual machine, gone when the test ends.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::output::{Finished, run, run_with_input};

/// The folder of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests' folder has a parent")
}

/// The binary under test: `CORACLE_BIN`, or what `cargo xtask dist` made.
pub fn coracle_binary() -> PathBuf {
    let path =
        env::var_os("CORACLE_BIN").map_or_else(|| workspace().join("target/dist/coracle"), PathBuf::from);
    assert!(path.is_file(), "{} is not there: run `cargo xtask dist` first", path.display());
    path
}

/// A Coracle under test.
#[derive(Debug)]
pub struct Installation {
    binary: PathBuf,
    folder: TempDir,
    environment: Vec<(String, String)>,
}

impl Installation {
    /// A fresh one: nothing runs yet.
    pub fn new() -> Self {
        Self::with_binary(coracle_binary())
    }

    /// A fresh one of another binary.
    pub fn with_binary(binary: PathBuf) -> Self {
        let folder = tempfile::Builder::new().prefix("coracle-").tempdir().expect("a temporary folder");
        Self { binary, folder, environment: Vec::new() }
    }

    /// Adds an environment variable for every command.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The folder that `CORACLE_HOME` names.
    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// A folder for the test's own files.
    pub fn scratch(&self) -> &Path {
        self.folder.path()
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.home().join("run/docker.sock")
    }

    /// A command in the environment of this installation.
    pub fn command(&self, program: &str) -> Command {
        let mut command =
            if program == "coracle" { Command::new(&self.binary) } else { Command::new(program) };
        command
            .env("CORACLE_HOME", self.home())
            .env("DOCKER_HOST", format!("unix://{}", self.socket().display()))
            .env("DOCKER_CONFIG", self.folder.path().join("docker-config"))
            .env_remove("DOCKER_CONTEXT")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs `coracle` with these arguments.
    #[track_caller]
    pub fn coracle(&self, args: &[&str]) -> Finished {
        run(self.command("coracle").args(args))
    }

    /// Runs the stock `docker` CLI with these arguments.
    #[track_caller]
    pub fn docker(&self, args: &[&str]) -> Finished {
        run(self.command("docker").args(args))
    }

    /// Runs the stock `docker` CLI with these arguments and this input.
    #[track_caller]
    pub fn docker_with_input(&self, args: &[&str], input: &[u8]) -> Finished {
        run_with_input(self.command("docker").args(args), input)
    }

    /// Starts the daemon and loads the busybox image.
    #[track_caller]
    pub fn with_busybox(self) -> Self {
        self.coracle(&["up"]).ok();
        let archive = crate::image_archive("busybox.docker.tar");
        self.docker(&["load", "-i", archive.to_str().expect("a UTF-8 path")]).ok();
        self
    }

    /// Process id of the daemon.
    pub fn daemon_pid(&self) -> i32 {
        self.status()["daemon"]["pid"].as_i64().expect("status has the daemon's pid") as i32
    }

    /// Process id of the default virtual machine's monitor.
    pub fn vmm_pid(&self) -> i32 {
        self.status()["vms"][0]["pid"].as_i64().expect("status has the VM's pid") as i32
    }

    /// What `coracle status --json` says.
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&self.coracle(&["status", "--json"]).ok().stdout).expect("status prints JSON")
    }

    /// Sends SIGKILL to a process and waits until it is gone.
    pub fn kill(&self, pid: i32) {
        let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
        let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .expect("the process lives");
        rustix::process::pidfd_send_signal(&handle, rustix::process::Signal::KILL).expect("it may be killed");
        let mut set = [rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut set, None).expect("waiting for the end of a process");
    }

    /// Runs the parts of a test one after the other, each whether or not those before it failed, and fails if one did. What the
    /// installation looked like when a part failed is printed.
    pub fn run_parts(&self, parts: &[(&str, fn())]) {
        let mut failed = Vec::new();
        for (name, part) in parts {
            eprintln!("--- {name}");
            if std::panic::catch_unwind(part).is_err() {
                failed.push(name);
                self.describe();
            }
        }
        self.coracle(&["down"]).ok();
        assert!(failed.is_empty(), "failed: {failed:?}");
    }

    /// Prints what helps to explain a failure: every container's state, the ends of the logs.
    fn describe(&self) {
        let format = "{{json .Name}} {{json .State}}";
        let containers = self.docker(&["ps", "-aq", "--no-trunc"]);
        for id in containers.out().lines() {
            eprintln!("--- {}", self.docker(&["inspect", "--format", format, id]).out().trim_end());
        }
        eprintln!("--- the end of the guest's log");
        last_lines(&self.coracle(&["logs", "--vm"]).out());
        for log in ["daemon.log", "vms/default/vmm.log"] {
            if let Ok(text) = std::fs::read_to_string(self.home().join(log)) {
                eprintln!("--- the end of {log}");
                last_lines(&text);
            }
        }
    }
}

fn last_lines(text: &str) {
    let lines: Vec<_> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(40)).for_each(|line| eprintln!("{line}"));
}

impl Default for Installation {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.describe();
        }
        let ended = run(self.command("coracle").arg("down"));
        if ended.code != 0 && !std::thread::panicking() {
            panic!("`coracle down` failed: {}", ended.err());
        }
    }
}
