//! `coracle pull`, `push`, `login`, `logout` and `search` against Debian's docker-registry, without a virtual machine.

#[path = "../../engine/tests/support/registry.rs"]
mod registry;

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use registry::{Options, Registry};

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coracle"));
        let path = format!("{}:{}", self.0.path().display(), std::env::var("PATH").unwrap());
        command
            .args(args)
            .env("CORACLE_HOME", self.path("home"))
            .env("DOCKER_CONFIG", self.path("docker"))
            .env("PATH", path)
            // Nothing leaves this machine.
            .envs([("HTTPS_PROXY", "http://127.0.0.1:9"), ("HTTP_PROXY", "http://127.0.0.1:9")])
            .env_remove("CORACLE_GUEST_DIR");
        command
    }

    fn run(&self, args: &[&str], input: &str) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Who does not read has said why.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args, "");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args, "");
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }

    /// An image of one file, made by the docker CLI.
    fn import(&self, name: &str) {
        fs::write(self.path("file"), "ahoy\n").unwrap();
        let tar = self.path("image.tar");
        registry::run(Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(self.0.path()).arg("file"));
        registry::run(
            Command::new("docker")
                .env("DOCKER_HOST", format!("unix://{}", self.path("home/run/docker.sock").display()))
                .env("DOCKER_CONFIG", self.path("docker"))
                .args(["import", tar.to_str().unwrap(), name]),
        );
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.run(&["down"], "");
    }
}

#[test]
fn an_image_goes_to_a_registry_and_comes_back() {
    let (home, registry) = (Home::new(), Registry::start(&Options::default()));
    let name = registry.name("team/app:1");
    home.ok(&["up", "--no-context"]);
    home.import(&name);
    let pushed = home.ok(&["push", &name]);
    assert!(pushed.contains(": Pushed\n") && pushed.contains("1: digest: sha256:"), "{pushed}");
    home.ok(&["rmi", &name]);
    let pulled = home.ok(&["pull", &name]);
    assert!(pulled.contains("1: Pulling from") && pulled.contains(": Pull complete\n"), "{pulled}");
    assert!(pulled.ends_with(&format!("Status: Downloaded newer image for {name}\n{name}\n")), "{pulled}");
    assert_eq!(home.ok(&["pull", "-q", &name]), format!("{name}\n"));
    let said = home.fails(1, &["pull", &registry.name("team/app:2")]);
    assert!(said.contains("manifest unknown"), "{said}");
    let said = home.fails(125, &["run", "--rm", &registry.name("none")]);
    assert!(said.contains("Unable to find image") && said.contains("not found"), "{said}");
    let said = home.fails(125, &["run", "--rm", "--pull", "never", &registry.name("none")]);
    assert!(said.contains("No such image"), "{said}");
    let said = home.fails(1, &["search", &registry.name("app")]);
    assert!(said.contains("cannot be searched"), "{said}");
}

#[test]
fn a_login_is_kept_where_the_docker_cli_keeps_it() {
    let home = Home::new();
    let registry = Registry::start(&Options { password: true, ..Options::default() });
    let domain = registry.domain.as_str();
    let log_in = |password: &str| home.run(&["login", "-u", "sailor", "--password-stdin", domain], password);
    let refused = log_in("wrong");
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("unauthorized"));
    let done = log_in("ahoy\n");
    assert_eq!(String::from_utf8_lossy(&done.stdout), "Login Succeeded\n");
    let name = registry.name("app:1");
    home.import(&name);
    home.ok(&["push", &name]);
    let removing = format!("Removing login credentials for {domain}\n");
    assert_eq!(home.ok(&["logout", domain]), removing);
    assert_eq!(home.ok(&["logout", domain]), format!("Not logged in to {domain}\n"));
    home.fails(1, &["push", &name]);

    // A helper that keeps one login in a file.
    let helper = home.path("docker-credential-box");
    let script = "#!/bin/sh\ncd \"$(dirname \"$0\")\"\ncase $1 in\nstore) cat >box ;;\nget) cat box 2>/dev/null || { echo credentials not found in native keychain; exit 1; } ;;\nerase) rm -f box ;;\nesac\n";
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(home.path("docker/config.json"), r#"{"credsStore":"box"}"#).unwrap();
    assert_eq!(String::from_utf8_lossy(&log_in("ahoy").stdout), "Login Succeeded\n");
    assert!(fs::read_to_string(home.path("box")).unwrap().contains("ahoy"));
    assert!(!fs::read_to_string(home.path("docker/config.json")).unwrap().contains("auth\""));
    home.ok(&["push", &name]);
    assert_eq!(home.ok(&["logout", domain]), removing);
    assert!(!home.path("box").exists());
}

#[test]
fn a_mirror_that_is_chosen_counts_at_once() {
    let (home, registry) = (Home::new(), Registry::start(&Options::default()));
    home.ok(&["up", "--no-context"]);
    home.import(&registry.name("library/app:latest"));
    home.ok(&["push", &registry.name("library/app")]);
    home.fails(1, &["pull", "app"]);
    home.ok(&["up", "--no-context", "--registry-mirror", &format!("http://{}", registry.domain)]);
    assert!(home.ok(&["pull", "app"]).ends_with("docker.io/library/app:latest\n"));
    home.ok(&["up", "--no-context", "--registry-mirror", ""]);
    home.fails(1, &["pull", "app:other"]);
    assert_eq!(home.run(&["up", "--registry-mirror", "ftp://x"], "").status.code(), Some(2));
}
