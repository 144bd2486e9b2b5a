//! Restart policies: what is started again, when, how often, and what ends that. Needs root.

mod support;

use std::{
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use support::{Daemon, Machine, with_busybox};

fn run(daemon: &Daemon, name: &str, policy: &str, script: &str) {
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        name,
        "--network",
        "none",
        "--restart",
        policy,
        "busybox",
        "sh",
        "-c",
        script,
    ]);
}

fn inspect(daemon: &Daemon, name: &str, format: &str) -> String {
    daemon.ok(&["inspect", "-f", format, name]).trim().to_owned()
}

#[test]
fn a_container_that_fails_is_started_again_as_often_as_its_policy_says() {
    let (_machine, daemon) = with_busybox();
    run(&daemon, "fails", "on-failure:2", "echo run; exit 3");
    daemon.until("fails", "{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}", "exited 2 3");
    assert_eq!(daemon.ok(&["logs", "fails"]), "run\nrun\nrun\n");

    run(&daemon, "succeeds", "on-failure", "exit 0");
    assert_eq!(daemon.ok(&["wait", "succeeds"]), "0\n");
    daemon.until("succeeds", "{{.State.Status}} {{.RestartCount}}", "exited 0");

    // By hand, the count begins anew.
    daemon.ok(&["start", "fails"]);
    daemon.until("fails", "{{.State.Status}} {{.RestartCount}}", "exited 2");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let now = format!("{}.{:09}", now.as_secs(), now.subsec_nanos());
    let filter = "container=fails";
    let events = daemon.ok(&[
        "events",
        "--since",
        "0",
        "--until",
        &now,
        "--filter",
        filter,
        "--format",
        "{{.Action}}",
    ]);
    let life = "start\ndie\nstart\ndie\nstart\ndie\n";
    assert_eq!(events, format!("create\n{life}{life}"));
}

#[test]
fn a_container_that_waits_for_its_restart_can_be_stopped_killed_and_removed() {
    let (_machine, daemon) = with_busybox();
    for (name, end) in
        [("aa", vec!["stop", "aa"]), ("bb", vec!["kill", "bb"]), ("cc", vec!["rm", "-f", "cc"])]
    {
        run(&daemon, name, "always", "exit 1");
        // By now it waits for longer than this test takes to look.
        for _ in 0..200 {
            if inspect(&daemon, name, "{{.RestartCount}}").parse::<u32>().unwrap() >= 4 {
                break;
            }
            thread::sleep(Duration::from_millis(25));
        }
        daemon.until(
            name,
            "{{.State.Status}} {{.State.Running}} {{.State.Restarting}}",
            "restarting true true",
        );
        assert!(daemon.ok(&["ps", "--format", "{{.Status}}"]).starts_with("Restarting (1) "));
        assert!(
            daemon.fails(1, &["rm", name]).contains("container is restarting: stop the container before")
        );
        assert!(
            daemon
                .fails(1, &["exec", name, "true"])
                .contains("is restarting, wait until the container is running")
        );
        daemon.ok(&end);
    }
    assert_eq!(daemon.ok(&["ps", "-a", "--format", "{{.Names}} {{.State}}"]), "bb exited\naa exited\n");
}

#[test]
fn a_stopped_container_stays_stopped_until_the_policy_is_told_otherwise() {
    let (machine, daemon) = with_busybox();
    for policy in ["always", "unless-stopped", "no"] {
        run(&daemon, policy, policy, "trap 'exit 0' TERM; while true; do sleep 0.1; done");
        daemon.ok(&["stop", policy]);
        assert_eq!(inspect(&daemon, policy, "{{.State.Status}}"), "exited");
    }
    run(&daemon, "going", "unless-stopped", "trap 'exit 0' TERM; while true; do sleep 0.1; done");
    daemon.ok(&["create", "--name", "fresh", "--restart", "always", "--network", "none", "busybox", "true"]);
    assert_eq!(daemon.api("POST", "/coracle/down", "").0, 204);
    daemon.wait();

    let daemon = Daemon::start(&machine);
    daemon.until("always", "{{.State.Status}}", "running");
    daemon.until("going", "{{.State.Status}}", "running");
    assert_eq!(inspect(&daemon, "unless-stopped", "{{.State.Status}}"), "exited");
    assert_eq!(inspect(&daemon, "no", "{{.State.Status}}"), "exited");
    assert_eq!(inspect(&daemon, "fresh", "{{.State.Status}}"), "created");
}

#[test]
fn containers_of_a_sandbox_that_died_come_back_by_their_policy() {
    let (machine, daemon) = with_busybox();
    run(&daemon, "back", "on-failure", "sleep 1000");
    run(&daemon, "gone", "no", "sleep 1000");
    machine.kill_sandbox();
    daemon.until("back", "{{.State.Status}} {{.RestartCount}}", "running 1");
    assert_eq!(inspect(&daemon, "gone", "{{.State.Status}} {{.State.ExitCode}}"), "exited 255");

    // Also when no daemon saw it.
    daemon.end();
    machine.kill_sandbox();
    let daemon = Daemon::start(&machine);
    daemon.until("back", "{{.State.Status}} {{.RestartCount}}", "running 2");
    daemon.ok(&["rm", "-f", "back"]);
}

#[test]
fn a_policy_can_be_changed_and_nonsense_cannot() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    run(&daemon, "web", "always", "sleep 0.2; exit 1");
    daemon.ok(&["update", "--restart", "no", "web"]);
    daemon.until("web", "{{.State.Status}} {{.HostConfig.RestartPolicy.Name}}", "exited no");
    daemon.ok(&["update", "--restart", "on-failure:1", "web"]);
    daemon.ok(&["run", "-d", "--rm", "--name", "brief", "--network", "none", "busybox", "sleep", "100"]);
    let error = daemon.fails(1, &["update", "--restart", "always", "brief"]);
    assert!(error.contains("AutoRemove is enabled"), "{error}");
    for (body, status) in [
        (r#"{"RestartPolicy":{"Name":"sometimes"}}"#, 400),
        (r#"{"RestartPolicy":{"Name":"always","MaximumRetryCount":1}}"#, 400),
        (r#"{"RestartPolicy":7}"#, 400),
        ("{}", 200),
        ("nonsense", 400),
    ] {
        assert_eq!(daemon.api("POST", "/containers/web/update", body).0, status, "{body}");
    }
    assert_eq!(daemon.api("POST", "/containers/none/update", "{}").0, 404);
}
