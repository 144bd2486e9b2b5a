//! The daemon's life as the commands see it, without a virtual machine: started once however many ask, found again,
//! replaced when it was killed, gone when it is told to go.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::PathBuf,
    process::{Command, Output},
};

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("home").join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coracle"));
        command
            .args(args)
            .env("CORACLE_HOME", self.path(""))
            .env("DOCKER_CONFIG", self.0.path().join("docker"))
            .env_remove("CORACLE_GUEST_DIR");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn daemon(&self) -> Option<i32> {
        let status: serde_json::Value = serde_json::from_str(&self.ok(&["status", "--json"])).unwrap();
        status["daemon"]["pid"].as_i64().map(|pid| pid.try_into().unwrap())
    }

    fn kill_daemon(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.daemon().unwrap()).unwrap();
        let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        rustix::process::pidfd_send_signal(&handle, signal).unwrap();
        let mut ended = [rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut ended, None).unwrap();
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.run(&["down"]);
    }
}

#[test]
fn any_number_of_commands_start_one_daemon() {
    let home = Home::new();
    let ups: Vec<_> =
        (0..8).map(|_| home.command(&["up"]).stdout(std::process::Stdio::null()).spawn().unwrap()).collect();
    for mut up in ups {
        assert!(up.wait().unwrap().success());
    }
    let log = fs::read_to_string(home.path("daemon.log")).unwrap();
    assert_eq!(log.matches("the daemon listens").count(), 1, "{log}");
}

#[test]
fn only_the_owner_gets_at_the_socket() {
    let home = Home::new();
    let up = home.ok(&["up"]);
    assert_eq!(up, format!("export DOCKER_HOST=unix://{}\n", home.path("run/docker.sock").display()));
    let mode = |name: &str| fs::metadata(home.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(""), mode("run"), mode("run/docker.sock")), (0o700, 0o700, 0o600));
}

#[test]
fn a_killed_daemon_is_replaced_and_one_that_was_told_to_end_leaves_no_socket() {
    let home = Home::new();
    home.ok(&["ps"]);
    let first = home.daemon().unwrap();
    home.kill_daemon(rustix::process::Signal::KILL);
    assert!(home.path("run/docker.sock").exists());
    assert_eq!(home.daemon(), None);
    home.ok(&["ps"]);
    assert_ne!(home.daemon().unwrap(), first);
    home.kill_daemon(rustix::process::Signal::TERM);
    assert!(!home.path("run/docker.sock").exists());
    home.ok(&["up"]);
    home.ok(&["down"]);
    assert!(UnixStream::connect(home.path("run/docker.sock")).is_err());
    home.ok(&["down"]);
}

#[test]
fn a_second_daemon_says_who_is_there_already() {
    let home = Home::new();
    home.ok(&["up"]);
    let second = home.run(&["daemon"]);
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains(&format!("process {}", home.daemon().unwrap())), "{said}");
}

#[test]
fn a_daemon_that_cannot_start_says_why_to_who_asked() {
    let home = Home::new();
    fs::create_dir_all(home.path("")).unwrap();
    fs::write(home.path("images"), "not a folder").unwrap();
    let up = home.run(&["up"]);
    assert_eq!(up.status.code(), Some(1));
    let said = String::from_utf8(up.stderr).unwrap();
    assert!(said.starts_with("coracle: the daemon did not start: cannot open the image store"), "{said}");
}

#[test]
fn what_does_not_need_the_daemon_does_not_start_it() {
    let home = Home::new();
    assert!(home.ok(&["version"]).contains("Server: not running"));
    assert!(home.ok(&["status"]).contains("not running"));
    home.ok(&["down"]);
    assert_eq!(home.run(&["logs", "--vm"]).status.code(), Some(1));
    assert!(!home.path("").exists());
}

#[test]
fn failures_have_dockers_exit_codes() {
    let home = Home::new();
    for (args, code) in [
        (&["run", "no-such-image"][..], 125),
        (&["run", "--no-such-option", "busybox"], 125),
        (&["run"], 125),
        (&["exec", "nobody", "true"], 1),
        (&["stop", "nobody"], 1),
        (&["inspect", "nobody"], 1),
        (&["load", "-i", "/no/such/file"], 1),
        (&["nonsense"], 2),
    ] {
        let output = home.run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn the_machines_size_is_kept_and_checked() {
    let home = Home::new();
    home.ok(&["up", "--cpus", "1", "--memory", "300m"]);
    home.ok(&["up", "--disk", "2g"]);
    let kept: serde_json::Value =
        serde_json::from_slice(&fs::read(home.path("config.json")).unwrap()).unwrap();
    assert_eq!(kept, serde_json::json!({ "cpus": 1, "memory": 300 << 20, "disk": 2u64 << 30 }));
    for bad in [["--cpus", "0"], ["--cpus", "65"], ["--memory", "1m"], ["--disk", "1m"], ["--memory", "x"]] {
        assert!(!home.run(&["up", bad[0], bad[1]]).status.success(), "{bad:?}");
    }
    fs::create_dir_all(home.path("vms/default")).unwrap();
    fs::File::create(home.path("vms/default/data.img")).unwrap().set_len(3 << 30).unwrap();
    let smaller = home.run(&["up", "--disk", "2g"]);
    assert!(String::from_utf8(smaller.stderr).unwrap().contains("cannot make the data disk smaller"));
}
