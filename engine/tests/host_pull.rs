//! `docker pull`, `login`, `run` and `search` against the engine and Debian's docker-registry. Needs root.

mod support;

use std::{path::Path, process::Stdio, sync::Arc};

use bollard_stubs::models;
use serde_json::Value;
use support::{
    Daemon, Machine, layout,
    registry::{Options, Registry},
    text,
};

/// An engine, and a registry that has busybox in two layers.
fn with_registry(options: &Options, more: &[&str]) -> (Arc<Machine>, Daemon, Registry) {
    let machine = Machine::new();
    std::fs::create_dir(machine.home.path().join("docker-config")).unwrap();
    let daemon = Daemon::start(&machine);
    let registry = Registry::start(options);
    registry.fill(&layout(&machine), "library/busybox:1", more);
    (machine, daemon, registry)
}

#[test]
fn an_image_is_pulled_run_and_pulled_again() {
    let (_machine, daemon, registry) = with_registry(&Options::default(), &[]);
    let name = registry.name("library/busybox:1");
    let pulled = daemon.ok(&["pull", &name]);
    for line in [
        "1: Pulling from library/busybox\n",
        "Pulling fs layer",
        "Verifying Checksum",
        "Download complete",
        "Pull complete",
    ] {
        assert!(pulled.contains(line), "{pulled}");
    }
    assert!(pulled.contains("Digest: sha256:"), "{pulled}");
    assert!(pulled.contains(&format!("Status: Downloaded newer image for {name}\n")), "{pulled}");
    assert!(pulled.ends_with(&format!("{name}\n")), "{pulled}");
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", &name, "cat", "/etc/more"]), "ahoy\n");
    let again = daemon.ok(&["pull", &name]);
    assert!(again.contains(&format!("Status: Image is up to date for {name}")), "{again}");
    assert!(!again.contains("Pull complete"), "{again}");
    let digest = daemon.ok(&["image", "inspect", "--format", "{{index .RepoDigests 0}}", &name]);
    daemon.ok(&["rmi", &name]);
    let by_digest = daemon.ok(&["pull", "-q", digest.trim()]);
    assert_eq!(by_digest, digest);
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", digest.trim(), "echo", "hi"]), "hi\n");
}

#[test]
fn docker_run_pulls_what_is_not_there() {
    let (_machine, daemon, registry) = with_registry(&Options::default(), &["--format", "v2s2"]);
    let name = registry.name("library/busybox:1");
    let output = daemon.docker(&["run", "--rm", "--network", "none", &name, "echo", "hello"]);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("hello\n", Some(0)));
    let said = text(&output.stderr);
    assert!(said.contains("Unable to find image") && said.contains("Downloaded newer image"), "{said}");
}

#[test]
fn what_is_not_there_is_told_in_dockers_words() {
    let (_machine, daemon, registry) = with_registry(&Options::default(), &[]);
    let (missing, none) = (registry.name("library/busybox:2"), registry.name("none:1"));
    let said = daemon.fails(1, &["pull", &missing]);
    assert!(
        said.contains(&format!("manifest for {missing} not found: manifest unknown: manifest unknown")),
        "{said}"
    );
    let (status, _) = daemon.api("POST", &format!("/images/create?fromImage={none}"), "");
    assert_eq!(status, 404);
    let said = daemon.fails(125, &["run", "--rm", &none]);
    assert!(said.contains("not found"), "{said}");
    let said = daemon.fails(1, &["pull", "--platform", "linux/s390x", &registry.name("library/busybox:1")]);
    assert!(said.contains("does not match the specified platform (linux/s390x)"), "{said}");
    let said = daemon.fails(1, &["pull", "127.0.0.1:9/x"]);
    assert!(said.contains("127.0.0.1:9"), "{said}");
    assert_eq!(daemon.ok(&["images", "-q"]), "");
}

#[test]
fn all_tags_are_pulled_if_that_is_wanted() {
    let (machine, daemon, registry) = with_registry(&Options::default(), &[]);
    registry.fill(
        &format!("oci:{}:latest", machine.home.path().join("layout").display()),
        "library/busybox:2",
        &[],
    );
    daemon.ok(&["pull", "-a", &registry.name("library/busybox")]);
    assert_eq!(daemon.ok(&["images", "--format", "{{.Tag}}"]).lines().count(), 2);
}

#[test]
fn a_registry_with_a_password_wants_a_login_first() {
    let password = Options { password: true, ..Options::default() };
    let (machine, daemon, registry) = with_registry(&password, &["--dest-creds", "sailor:ahoy"]);
    let name = registry.name("library/busybox:1");
    let said = daemon.fails(1, &["pull", &name]);
    assert!(said.contains("no basic auth credentials"), "{said}");
    let wrong = daemon
        .with_input(&["login", "-u", "sailor", "--password-stdin", &registry.domain], b"wrong".to_vec());
    assert!(!wrong.status.success());
    assert!(text(&wrong.stderr).contains("unauthorized"), "{}", text(&wrong.stderr));
    let right =
        daemon.with_input(&["login", "-u", "sailor", "--password-stdin", &registry.domain], b"ahoy".to_vec());
    assert!(
        text(&right.stdout).contains("Login Succeeded"),
        "{}{}",
        text(&right.stdout),
        text(&right.stderr)
    );
    daemon.ok(&["pull", &name]);
    daemon.ok(&["logout", &registry.domain]);
    daemon.ok(&["rmi", &name]);
    daemon.fails(1, &["pull", &name]);
    assert!(Path::new(&machine.home.path().join("docker-config/config.json")).exists());
}

#[test]
fn tls_is_checked_against_the_registrys_own_ca() {
    let tls = Options { tls: true, ..Options::default() };
    let (machine, daemon, registry) = with_registry(&tls, &[]);
    let name = registry.name("library/busybox:1");
    let folder = machine.home.path().join("certs.d");
    machine.registries.lock().unwrap().certificate_folders = vec![folder.clone()];
    let own = folder.join(&registry.domain);
    std::fs::create_dir_all(&own).unwrap();
    let said = daemon.fails(1, &["pull", &name]);
    assert!(said.contains("UnknownIssuer"), "{said}");
    let other = Registry::start(&tls);
    std::fs::copy(other.ca(), own.join("ca.crt")).unwrap();
    daemon.fails(1, &["pull", &name]);
    std::fs::copy(registry.ca(), own.join("ca.crt")).unwrap();
    daemon.ok(&["pull", &name]);
}

#[test]
fn a_mirror_stands_in_for_docker_hub() {
    let (machine, daemon, registry) = with_registry(&Options::default(), &[]);
    machine.registries.lock().unwrap().mirrors = vec![format!("http://{}", registry.domain)];
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", "busybox:1", "echo", "hello"]), "hello\n");
    assert_eq!(daemon.ok(&["images", "--format", "{{.Repository}}:{{.Tag}}"]), "busybox:1\n");
    assert!(daemon.ok(&["info"]).contains(&registry.domain));
    let said = daemon.fails(1, &["pull", "busybox:2"]);
    assert!(said.contains("registry-1.docker.io"), "{said}");
}

#[test]
fn a_pull_that_is_interrupted_leaves_nothing_and_can_be_done_again() {
    let (machine, daemon, registry) = with_registry(&Options::default(), &[]);
    let name = registry.name("library/busybox:1");
    let mut child = daemon.command(&["pull", &name]).stdout(Stdio::null()).spawn().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    daemon.ok(&["pull", &name]);
    let layers = std::fs::read_dir(machine.home.path().join("images/layers")).unwrap();
    let images = layers.filter(|entry| entry.as_ref().unwrap().path().extension().unwrap() == "erofs");
    assert_eq!(images.count(), 2);
}

#[test]
fn answers_about_registries_have_the_shapes_of_dockers_models() {
    let (_machine, daemon, registry) = with_registry(&Options::default(), &[]);
    let (status, body) =
        daemon.api("GET", &format!("/distribution/{}/json", registry.name("library/busybox:1")), "");
    assert_eq!(status, 200, "{body}");
    let inspect: models::DistributionInspect = serde_json::from_str(&body).unwrap();
    assert!(inspect.descriptor.digest.unwrap().starts_with("sha256:"));
    assert_eq!(inspect.platforms[0].os.as_deref(), Some("linux"));
    let (status, body) = daemon.api("GET", &format!("/distribution/{}/json", registry.name("none")), "");
    assert_eq!(status, 404, "{body}");
    let (status, body) = daemon.api("POST", "/build/prune", "");
    let pruned: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, pruned["SpaceReclaimed"].as_u64()), (200, Some(0)));
    let info: models::SystemInfo = serde_json::from_str(&daemon.api("GET", "/info", "").1).unwrap();
    assert!(
        info.registry_config.unwrap().insecure_registry_cidrs.unwrap().contains(&"127.0.0.0/8".to_owned())
    );
    // Debian's registry has no search.
    let said = daemon.fails(1, &["search", &registry.name("busybox")]);
    assert!(said.contains("cannot be searched"), "{said}");
    assert_eq!(daemon.api("GET", "/images/search?term=x&limit=101", "").0, 400);
}
