//! `docker push` from the engine to Debian's docker-registry. Needs root.

mod support;

use std::{process::Command, sync::Arc};

use support::{
    Daemon, Machine, layout,
    registry::{Options, Registry},
    text,
};

/// An engine with busybox, which came from an archive, and an empty registry.
fn with_registry(options: &Options) -> (Arc<Machine>, Daemon, Registry) {
    let machine = Machine::new();
    std::fs::create_dir(machine.home.path().join("docker-config")).unwrap();
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    (machine, daemon, Registry::start(options))
}

fn digest(pushed: &str) -> String {
    let (_, rest) = pushed.split_once("digest: ").unwrap_or_else(|| panic!("no digest: {pushed}"));
    rest.split(' ').next().unwrap().to_owned()
}

#[test]
fn an_image_is_pushed_and_comes_back_as_it_was() {
    let (_machine, daemon, registry) = with_registry(&Options::default());
    let name = registry.name("team/busybox:1");
    daemon.ok(&["tag", "busybox", &name]);
    let id = daemon.ok(&["images", "-q", "--no-trunc", "busybox"]);
    let pushed = daemon.ok(&["push", &name]);
    let refers = format!("The push refers to repository [{}]", registry.name("team/busybox"));
    assert!(
        pushed.contains(&refers) && pushed.contains(": Pushed") && pushed.contains("1: digest: sha256:"),
        "{pushed}"
    );
    let seen = Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", &format!("docker://{name}")])
        .output()
        .unwrap();
    assert!(text(&seen.stdout).contains(&digest(&pushed)), "{}", text(&seen.stderr));
    let again = daemon.ok(&["push", &name]);
    assert!(again.contains("Layer already exists"), "{again}");
    assert_eq!(digest(&again), digest(&pushed));
    let elsewhere = registry.name("other/busybox:1");
    daemon.ok(&["tag", &name, &elsewhere]);
    let mounted = daemon.ok(&["push", &elsewhere]);
    assert!(mounted.contains("Mounted from"), "{mounted}");
    daemon.ok(&["rmi", "-f", id.trim()]);
    daemon.ok(&["pull", "-q", &name]);
    assert_eq!(daemon.ok(&["images", "-q", "--no-trunc", &registry.name("team/busybox")]), id);
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", &name, "echo", "hi"]), "hi\n");
}

#[test]
fn an_image_from_one_registry_keeps_its_layers_and_its_digest_there() {
    let (machine, daemon, registry) = with_registry(&Options::default());
    registry.fill(&layout(&machine), "a:1", &[]);
    let name = registry.name("a:1");
    daemon.ok(&["pull", &name]);
    let was = daemon.ok(&["image", "inspect", "--format", "{{index .RepoDigests 0}}", &name]);
    let other = registry.name("b:1");
    daemon.ok(&["tag", &name, &other]);
    let pushed = daemon.ok(&["push", &other]);
    assert!(pushed.contains("Mounted from") && !pushed.contains(": Pushed"), "{pushed}");
    assert!(was.contains(&digest(&pushed)), "{was} {pushed}");
    let third = Registry::start(&Options::default());
    daemon.ok(&["tag", &name, &third.name("c:1")]);
    daemon.ok(&["tag", &name, &third.name("c:2")]);
    daemon.ok(&["push", "-a", &third.name("c")]);
    daemon.ok(&["rmi", "-f", daemon.ok(&["images", "-q", &name]).trim()]);
    assert_eq!(
        daemon.ok(&["run", "--rm", "--network", "none", &third.name("c:2"), "cat", "/etc/more"]),
        "ahoy\n"
    );
}

#[test]
fn a_push_needs_an_image_and_a_login() {
    let (_machine, daemon, registry) = with_registry(&Options { password: true, ..Options::default() });
    let said = daemon.fails(1, &["push", &registry.name("nothing:1")]);
    assert!(said.contains("An image does not exist locally with the tag"), "{said}");
    let name = registry.name("busybox:1");
    daemon.ok(&["tag", "busybox", &name]);
    let said = daemon.fails(1, &["push", &name]);
    assert!(said.contains("no basic auth credentials"), "{said}");
    let login =
        daemon.with_input(&["login", "-u", "sailor", "--password-stdin", &registry.domain], b"ahoy".to_vec());
    assert!(login.status.success(), "{}", text(&login.stderr));
    daemon.ok(&["push", "-q", &name]);
}
