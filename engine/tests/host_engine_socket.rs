//! The engine's socket in a container: the stock docker CLI inside. Needs root.

mod support;

use std::{fs, os::unix::fs::symlink, sync::Arc};

use support::{Daemon, Machine, with_busybox};

/// An engine with a container `ctl` that has its socket, the docker CLI and a folder of the host, at the same path as there.
fn with_client() -> (Arc<Machine>, Daemon, tempfile::TempDir, String) {
    let (machine, daemon) = with_busybox();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("sub/file"), "from the host\n").unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    start(
        &daemon,
        "ctl",
        &["-v", &format!("{path}:{path}"), "-v", "/var/run/docker.sock:/var/run/docker.sock:ro"],
    );
    (machine, daemon, dir, path)
}

/// The CLI is one static program.
fn docker_cli() -> String {
    let paths = std::env::var("PATH").unwrap();
    let mut all = paths.split(':').map(|folder| format!("{folder}/docker"));
    all.find(|path| fs::metadata(path).is_ok()).expect("docker is on PATH")
}

fn start(daemon: &Daemon, name: &str, options: &[&str]) {
    let cli = format!("{}:/bin/docker:ro", docker_cli());
    let mut args = vec!["run", "-d", "--name", name, "--network", "none", "-v", &cli];
    args.extend(options);
    args.extend(["busybox", "sleep", "1000"]);
    daemon.ok(&args);
}

/// Runs docker in the container.
fn inside(daemon: &Daemon, args: &[&str]) -> (i32, String) {
    let output = daemon.docker(&[&["exec", "-i", "ctl", "docker"], args].concat());
    let text = support::text(&output.stdout) + &support::text(&output.stderr);
    (output.status.code().unwrap(), text)
}

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    let (code, text) = inside(daemon, args);
    assert_eq!(code, 0, "{args:?}: {text}");
    text
}

#[test]
fn a_container_drives_the_engine() {
    let (_machine, daemon, _dir, path) = with_client();
    assert_eq!(ok(&daemon, &["ps", "--format", "{{.Names}}"]), "ctl\n");
    let sub = format!("{path}/sub:/x");
    let script = "cat /x/file; echo back > /x/back";
    let run = ["run", "--rm", "--network", "none", "-v", &sub, "busybox", "sh", "-c", script];
    assert_eq!(ok(&daemon, &run), "from the host\n");
    assert_eq!(fs::read_to_string(format!("{path}/sub/back")).unwrap(), "back\n");

    // Streams in both directions, and their ends.
    let cat =
        ["exec", "-i", "ctl", "docker", "run", "--rm", "-i", "--network", "none", "busybox", "wc", "-c"];
    let counted = daemon.with_input(&cat, vec![b'x'; 3 << 20]);
    assert_eq!(support::text(&counted.stdout).trim(), (3 << 20).to_string());

    let mounts = "{{range .Mounts}}{{.Source}} {{.RW}};{{end}}";
    assert!(daemon.ok(&["inspect", "-f", mounts, "ctl"]).contains("/var/run/docker.sock false;"));
    daemon.ok(&["restart", "-t", "0", "ctl"]);
    assert_eq!(ok(&daemon, &["ps", "--format", "{{.Names}}"]), "ctl\n");
}

#[test]
fn a_container_gets_no_more_of_the_host_than_it_has() {
    let (_machine, daemon, dir, path) = with_client();
    let secret = tempfile::tempdir().unwrap();
    symlink(secret.path(), dir.path().join("link")).unwrap();
    let create =
        |option: &str| inside(&daemon, &["create", "--network", "none", "-v", option, "busybox", "true"]);
    for other in ["/:/x", "/etc:/x:ro", &format!("{path}/..:/x"), &format!("{path}x:/x")] {
        let (code, text) = create(other);
        assert!(
            code == 1 && text.contains("is not in anything of the host that container ctl has"),
            "{text}"
        );
    }
    let mount = format!("type=bind,src={},dst=/x", secret.path().display());
    let (code, text) = inside(&daemon, &["create", "--mount", &mount, "busybox", "true"]);
    assert!(code == 1 && text.contains("is not in anything of the host"), "{text}");
    let (code, text) = create(&format!("{path}/link/made:/x"));
    assert!(code == 1 && text.contains("leads out of what the asking container has"), "{text}");

    // The link comes when the container was made already.
    let later = format!("{path}/later");
    assert_eq!(create(&format!("{later}:/x")).0, 0);
    let id = daemon.ok(&["ps", "-lq"]);
    symlink(secret.path(), &later).unwrap();
    for refusal in [inside(&daemon, &["start", id.trim()]), (1, daemon.fails(1, &["start", id.trim()]))] {
        assert!(refusal.0 == 1 && refusal.1.contains("leads out of"), "{}", refusal.1);
    }
    assert_eq!(fs::read_dir(secret.path()).unwrap().count(), 0);

    // Not by way of others either: neither by their mounts nor by a client inside a client.
    start(&daemon, "other", &["-v", &format!("{}:/secret", secret.path().display())]);
    let (code, text) = inside(&daemon, &["create", "--volumes-from", "other", "busybox", "true"]);
    assert!(code == 1 && text.contains("is not in anything of the host"), "{text}");
    let cli = docker_cli();
    let (code, text) = inside(&daemon, &["create", "-v", &format!("{cli}:/y"), "busybox"]);
    assert!(code == 1 && text.contains("and may write to"), "{text}");
    let nested = [
        "run",
        "--rm",
        "--network",
        "none",
        "-v",
        "/run/docker.sock:/run/docker.sock",
        "-v",
        &format!("{cli}:/bin/docker:ro"),
        "busybox",
        "docker",
        "-H",
        "unix:///run/docker.sock",
        "create",
        "-v",
        &format!("{path}:/x"),
        "busybox",
    ];
    let (code, text) = inside(&daemon, &nested);
    assert!(code == 1 && text.contains("is not in anything of the host"), "{text}");
}

#[test]
fn the_socket_is_there_for_those_who_were_given_it_and_while_they_run() {
    let (machine, daemon, _dir, _path) = with_client();
    let own = format!("{}:/var/run/docker.sock", daemon.socket().display());
    start(&daemon, "own", &["-v", &own]);
    assert!(daemon.ok(&["exec", "own", "docker", "ps", "--format", "{{.Names}}"]).contains("own\n"));
    start(&daemon, "without", &[]);
    assert!(daemon.fails(1, &["exec", "without", "docker", "ps"]).contains("docker.sock"));

    // The next daemon is reached by the same socket.
    daemon.end();
    let daemon = Daemon::start(&machine);
    assert!(ok(&daemon, &["ps", "--format", "{{.Names}}"]).contains("ctl\n"));
    daemon.ok(&["rm", "-f", "ctl", "own"]);

    let narrow = ["create", "--label", "coracle.egress=none", "-v", &own, "busybox"];
    assert!(daemon.fails(1, &narrow).contains("cannot have the label coracle.egress too"));
}
