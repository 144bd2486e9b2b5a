//! Images through the stock CLI: saved for other tools, imported, listed by filters, removed, pruned. Needs root, and
//! Debian's skopeo and podman.

mod support;

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;
use support::{Daemon, text, with_busybox};

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn docker_with_input(daemon: &Daemon, args: &[&str], input: &[u8]) -> String {
    let mut child = daemon
        .command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A tar stream of one file, as GNU tar writes it.
fn tar_of(name: &str, content: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(name), content).unwrap();
    let tar = Command::new("tar").arg("-C").arg(folder.path()).args(["-c", name]).output().unwrap();
    assert!(tar.status.success());
    tar.stdout
}

/// JSON as a URL takes it.
fn escaped(json: &str) -> String {
    json.bytes()
        .map(
            |byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02X}")
                }
            },
        )
        .collect()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_saved_image_is_read_by_docker_skopeo_and_podman() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["tag", "busybox", "example.org/boats/coracle:1"]);
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("saved.tar");
    daemon.ok(&["save", "-o", path(&archive), "busybox", "example.org/boats/coracle"]);
    let id = daemon.ok(&["images", "-q", "--no-trunc", "busybox"]);

    // Ours again, after it was removed.
    daemon.ok(&["rmi", "-f", id.trim()]);
    assert_eq!(daemon.ok(&["images", "-q"]), "");
    let loaded = daemon.ok(&["load", "-i", path(&archive)]);
    assert!(loaded.contains("Loaded image: busybox:latest"), "{loaded}");
    assert!(loaded.contains("Loaded image: example.org/boats/coracle:1"), "{loaded}");
    assert_eq!(daemon.ok(&["images", "-q", "--no-trunc", "busybox"]), id);
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", "busybox", "echo", "afloat"]), "afloat\n");

    for source in [
        format!("docker-archive:{}:busybox:latest", path(&archive)),
        format!("oci-archive:{}:latest", path(&archive)),
    ] {
        let config =
            run(Command::new("skopeo").args(["--insecure-policy", "inspect", "--config", "--raw", &source]));
        assert!(config.contains("diff_ids"), "{source}: {config}");
        let copy = folder.path().join(if source.starts_with("oci") { "from-oci" } else { "from-docker" });
        let target = format!("dir:{}", path(&copy));
        run(Command::new("skopeo").args(["--insecure-policy", "copy", &source, &target]));
    }
    let podman = |args: &[&str]| {
        let (root, state) = (folder.path().join("podman"), folder.path().join("state"));
        let mut podman = Command::new("podman");
        podman.args(["--root", path(&root), "--runroot", path(&state), "--storage-driver", "vfs"]);
        run(podman.args(args))
    };
    let loaded = podman(&["load", "-i", path(&archive)]);
    assert!(loaded.contains("busybox:latest") && loaded.contains("example.org/boats/coracle:1"), "{loaded}");
    assert_eq!(podman(&["images", "--no-trunc", "-q", "example.org/boats/coracle:1"]), id);

    let missing = daemon.fails(1, &["save", "-o", path(&archive), "nothing"]);
    assert!(missing.contains("No such image: nothing"), "{missing}");
}

#[test]
fn a_file_system_is_imported_with_changes_and_a_message() {
    let (_machine, daemon) = with_busybox();
    let tar = tar_of("hello", "ahoy");
    let changes = ["-c", "CMD [\"/hello\"]", "-c", "ENV SAIL=none", "-c", "EXPOSE 80"];
    let args = [&["import", "-m", "by hand"], &changes[..], &["-", "boat:small"]].concat();
    let id = docker_with_input(&daemon, &args, &tar);
    assert!(id.starts_with("sha256:"), "{id}");
    let image: Value = serde_json::from_str(&daemon.ok(&["image", "inspect", "boat:small"])).unwrap();
    let config = &image[0]["Config"];
    assert_eq!(image[0]["Id"].as_str(), Some(id.trim()));
    assert_eq!(config["Cmd"][0], "/hello");
    assert_eq!(config["Env"][0], "SAIL=none");
    assert!(config["ExposedPorts"]["80/tcp"].is_object(), "{config}");
    assert!(daemon.ok(&["history", "boat:small"]).contains("by hand"));
    let (status, answer) = daemon.api("POST", "/images/create?fromSrc=-&changes=RUN%20x", "");
    assert_eq!(status, 400, "{answer}");
    assert!(answer.contains("run is not a valid change command"), "{answer}");
    let (status, answer) = daemon.api("POST", "/images/create?fromSrc=-", "no tar stream");
    assert_eq!(status, 400, "{answer}");
    let (status, answer) = daemon.api("POST", "/images/create?fromSrc=http://example.org/x", "");
    assert_eq!(status, 501, "{answer}");
}

#[test]
fn images_are_listed_by_filters() {
    let (_machine, daemon) = with_busybox();
    docker_with_input(
        &daemon,
        &["import", "-c", "LABEL boat=coracle", "-", "example.org/new:1"],
        &tar_of("a", "1"),
    );
    docker_with_input(&daemon, &["import", "-"], &tar_of("b", "2"));
    let list = |filters: &[&str]| {
        let filters: Vec<_> = filters.iter().flat_map(|filter| ["--filter", filter]).collect();
        let args = [&["images", "--format", "{{.Repository}}:{{.Tag}}"], &filters[..]].concat();
        let mut names: Vec<_> = daemon.ok(&args).lines().map(str::to_owned).collect();
        names.sort();
        names.join(" ")
    };
    let (none, new, busybox) = ("<none>:<none>", "example.org/new:1", "busybox:latest");
    assert_eq!(list(&[]), [none, busybox, new].join(" "));
    assert_eq!(list(&["dangling=true"]), none);
    assert_eq!(list(&["dangling=false"]), [busybox, new].join(" "));
    assert_eq!(list(&["reference=busy*"]), busybox);
    assert_eq!(list(&["reference=*/new"]), new);
    assert_eq!(list(&["label=boat"]), new);
    assert_eq!(list(&["label=boat=raft"]), "");
    assert_eq!(list(&["since=busybox"]), [none, new].join(" "));
    assert_eq!(list(&["before=example.org/new:1"]), busybox);
    assert_eq!(list(&["until=1m"]), busybox);
    assert!(daemon.fails(1, &["images", "--filter", "before=nothing"]).contains("No such image"));
    assert!(daemon.fails(1, &["images", "--filter", "frob=1"]).contains("invalid filter"));

    let (_, old) =
        daemon.api("GET", &format!("/v1.42/images/json?filters={}", escaped(r#"{"dangling":["true"]}"#)), "");
    assert!(old.contains("<none>:<none>") && old.contains("VirtualSize"), "{old}");
    let (_, shared) = daemon.api("GET", "/images/json?shared-size=1&manifests=1", "");
    let shared: Vec<Value> = serde_json::from_str(&shared).unwrap();
    assert!(shared.iter().all(|image| image["SharedSize"] == 0 && image["Manifests"].is_array()));
}

#[test]
fn an_image_removed_by_force_still_serves_its_stopped_container() {
    let (machine, daemon) = with_busybox();
    daemon.ok(&["create", "--name", "idle", "--network", "none", "busybox", "echo", "still here"]);
    let id = daemon.ok(&["images", "-q", "busybox"]);
    let id = id.trim();
    let refused = daemon.fails(1, &["rmi", id]);
    assert!(refused.contains("(must be forced) - image is being used by stopped container"), "{refused}");
    assert!(daemon.ok(&["rmi", "-f", id]).contains("Deleted: sha256:"));
    assert_eq!(daemon.ok(&["images", "-q"]), "");
    assert!(daemon.fails(1, &["create", "--pull", "never", "busybox"]).contains("No such image"));
    drop(daemon);
    let daemon = Daemon::start(&machine);
    assert_eq!(daemon.ok(&["start", "-a", "idle"]), "still here\n");
    daemon.ok(&["rm", "idle"]);
    let left = std::fs::read_dir(machine.home.path().join("images/layers")).unwrap().count();
    assert_eq!(left, 0, "the layers go with the container");
}

#[test]
fn unused_images_are_pruned_and_the_space_is_told() {
    let (machine, daemon) = with_busybox();
    docker_with_input(
        &daemon,
        &["import", "-c", "LABEL keep=1", "-", "kept:1"],
        &tar_of("a", &"1".repeat(100_000)),
    );
    docker_with_input(&daemon, &["import", "-"], &tar_of("b", &"2".repeat(100_000)));
    daemon.ok(&["create", "--network", "none", "busybox"]);
    let on_disk = || {
        let files = std::fs::read_dir(machine.home.path().join("images/layers")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    let usage = |daemon: &Daemon| {
        let (_, answer) = daemon.api("GET", "/system/df", "");
        serde_json::from_str::<Value>(&answer).unwrap()["LayersSize"].as_u64().unwrap()
    };
    assert_eq!(usage(&daemon), on_disk());
    let pruned = |filters: &str| {
        let before = on_disk();
        let (status, answer) = daemon.api("POST", &format!("/images/prune?filters={}", escaped(filters)), "");
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["SpaceReclaimed"].as_u64(), Some(before - on_disk()));
        answer["ImagesDeleted"].as_array().unwrap().len()
    };
    assert_eq!(pruned(r#"{"until":["1h"]}"#), 0);
    assert_eq!(pruned(""), 1);
    assert_eq!(pruned(r#"{"dangling":["false"],"label!":["keep"]}"#), 0);
    assert_eq!(pruned(r#"{"dangling":{"false":true},"label":{"keep":true}}"#), 2);
    assert_eq!(daemon.ok(&["images", "--format", "{{.Repository}}"]), "busybox\n");
    assert_eq!(usage(&daemon), on_disk());
    assert!(daemon.ok(&["system", "df"]).contains("Images"));
}

#[test]
fn a_container_is_committed_with_what_it_changed() {
    let (_machine, daemon) = with_busybox();
    let script = "echo new > /new; rm /etc/group; mkdir /d; echo 1 > /d/f; chmod 600 /etc/passwd; sleep 1000";
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "boat",
        "--network",
        "none",
        "-e",
        "SAIL=red",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    let until_done = "while ! [ -e /d/f ]; do :; done; stat -c %a /etc/passwd";
    while daemon.ok(&["exec", "boat", "sh", "-c", until_done]) != "600\n" {}
    let id = daemon.ok(&[
        "commit",
        "-a",
        "me",
        "-m",
        "by hand",
        "-c",
        "CMD [\"cat\", \"/new\"]",
        "boat",
        "mine:1",
    ]);
    assert_eq!(daemon.ok(&["inspect", "--format", "{{.State.Paused}}", "boat"]), "false\n");
    assert_eq!(daemon.ok(&["images", "-q", "--no-trunc", "mine:1"]), id);
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", "mine:1"]), "new\n");
    let seen = daemon.ok(&[
        "run",
        "--rm",
        "--network",
        "none",
        "mine:1",
        "sh",
        "-c",
        "cat /d/f; ls /etc/group 2>/dev/null; stat -c %a /etc/passwd; echo $SAIL",
    ]);
    assert_eq!(seen, "1\n600\nred\n");
    let history = daemon.ok(&["history", "--no-trunc", "mine:1"]);
    assert!(history.contains("by hand") && history.contains("sh -c echo new"), "{history}");
    daemon.ok(&["rm", "-f", "boat"]);

    // Of a stopped container without changes: no layer.
    daemon.ok(&["create", "--name", "idle", "--network", "none", "busybox"]);
    daemon.ok(&["commit", "idle", "mine:2"]);
    let layers = |image: &str| daemon.ok(&["image", "inspect", "--format", "{{len .RootFS.Layers}}", image]);
    assert_eq!(layers("mine:2"), layers("busybox"));
    let refused = daemon.fails(1, &["commit", "-c", "RUN x", "idle"]);
    assert!(refused.contains("run is not a valid change command"), "{refused}");
    assert!(daemon.fails(1, &["commit", "nothing"]).contains("No such container: nothing"));

    // What is committed can be saved and loaded again.
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("mine.tar");
    daemon.ok(&["save", "-o", path(&archive), "mine:1"]);
    daemon.ok(&["rmi", "mine:1"]);
    daemon.ok(&["load", "-i", path(&archive)]);
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", "mine:1"]), "new\n");
}
