//! Health checks: probes by exec, what they say, and when they are not run. Needs root.

mod support;

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    thread,
    time::Duration,
};

use support::{Daemon, with_busybox};

fn run(daemon: &Daemon, name: &str, options: &[&str], script: &str) {
    let mut args = vec!["run", "-d", "--name", name, "--network", "none"];
    args.extend(options);
    args.extend(["busybox", "sh", "-c", script]);
    daemon.ok(&args);
}

fn inspect(daemon: &Daemon, name: &str, format: &str) -> String {
    daemon.ok(&["inspect", "-f", format, name]).trim().to_owned()
}

fn until(daemon: &Daemon, name: &str, format: &str, wanted: &str) {
    let mut seen = String::new();
    for _ in 0..200 {
        seen = inspect(daemon, name, format);
        if seen == wanted {
            return;
        }
        thread::sleep(Duration::from_millis(25));
    }
    panic!("{name}: {format} is {seen}, not {wanted}");
}

#[test]
fn a_container_becomes_healthy_and_unhealthy_and_everyone_is_told() {
    let (_machine, daemon) = with_busybox();
    let mut listener = daemon
        .command(&["events", "--filter", "event=health_status", "--format", "{{.Action}}"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut events = BufReader::new(listener.stdout.take().unwrap()).lines();
    let check = "cat /state; test ! -e /ill";
    let options = ["--health-cmd", check, "--health-interval", "100ms", "--health-retries", "2"];
    run(&daemon, "web", &options, "echo fine > /state; sleep 1000");
    assert_eq!(events.next().unwrap().unwrap(), "health_status: healthy");
    assert!(daemon.ok(&["ps", "--format", "{{.Status}}"]).contains("(healthy)"));
    assert_eq!(daemon.ok(&["ps", "--format", "{{.Names}}", "--filter", "health=healthy"]), "web\n");
    assert_eq!(daemon.ok(&["ps", "-q", "--filter", "health=none"]), "");
    let last = "{{with index .State.Health.Log 0}}{{.ExitCode}} {{.Output}}{{end}}";
    assert_eq!(inspect(&daemon, "web", last), "0 fine");

    daemon.ok(&["exec", "web", "sh", "-c", "echo bad > /state; : > /ill"]);
    assert_eq!(events.next().unwrap().unwrap(), "health_status: unhealthy");
    assert!(daemon.ok(&["ps", "--format", "{{.Status}}"]).contains("(unhealthy)"));
    until(&daemon, "web", "{{len .State.Health.Log}}", "5");
    daemon.ok(&["exec", "web", "busybox", "rm", "/ill"]);
    assert_eq!(events.next().unwrap().unwrap(), "health_status: healthy");
    // Probes leave nothing behind.
    daemon.ok(&["kill", "web"]);
    assert_eq!(inspect(&daemon, "web", "{{.State.Health.Status}} {{.ExecIDs}}"), "unhealthy []");
    listener.kill().unwrap();
    listener.wait().unwrap();
}

#[test]
fn a_probe_that_hangs_is_killed_and_counts_as_a_failure() {
    let (_machine, daemon) = with_busybox();
    let options = ["--health-cmd", "echo slow; sleep 1000", "--health-interval", "50ms"];
    let more = ["--health-timeout", "200ms", "--health-retries", "1"];
    run(&daemon, "slow", &[options, more].concat(), "sleep 1000");
    until(&daemon, "slow", "{{.State.Health.Status}}", "unhealthy");
    let log = inspect(&daemon, "slow", "{{with index .State.Health.Log 0}}{{.ExitCode}} {{.Output}}{{end}}");
    assert!(log.starts_with("-1 Health check exceeded timeout (200ms): slow"), "{log}");
    run(&daemon, "none", &["--health-cmd", "/no/such/probe", "--health-interval", "50ms"], "sleep 1000");
    until(&daemon, "none", "{{.State.Health.Status}}", "unhealthy");
}

#[test]
fn probes_stand_still_while_it_is_paused_and_begin_anew_with_each_start() {
    let (machine, daemon) = with_busybox();
    let options = ["--health-cmd", "echo x >> /probes", "--health-interval", "100ms"];
    run(&daemon, "web", &options, "sleep 1000");
    until(&daemon, "web", "{{.State.Health.Status}}", "healthy");
    daemon.ok(&["pause", "web"]);
    let count = "{{.State.Health.Status}} {{with index .State.Health.Log 0}}{{.Start}}{{end}}";
    let before = inspect(&daemon, "web", count);
    thread::sleep(Duration::from_millis(400));
    assert_eq!(inspect(&daemon, "web", count), before);
    daemon.ok(&["unpause", "web"]);
    assert_eq!(inspect(&daemon, "web", "{{.State.Health.Status}}"), "healthy");
    daemon.ok(&["restart", "-t", "0", "web"]);
    until(&daemon, "web", "{{.State.Health.Status}}", "healthy");

    // A daemon that takes over goes on with the probes.
    daemon.end();
    let daemon = Daemon::start(&machine);
    assert_eq!(inspect(&daemon, "web", "{{.State.Health.Status}}"), "starting");
    until(&daemon, "web", "{{.State.Health.Status}}", "healthy");
    daemon.ok(&["rm", "-f", "web"]);
}

#[test]
fn an_image_can_declare_a_check_and_a_client_can_do_without() {
    let (_machine, daemon) = with_busybox();
    run(&daemon, "plain", &["--no-healthcheck"], "sleep 1000");
    assert_eq!(inspect(&daemon, "plain", "{{json .State.Health}}"), "null");
    for (body, words) in [
        (
            r#"{"Image":"busybox","Healthcheck":{"Interval":5}}"#,
            "Interval in Healthcheck cannot be less than 1ms",
        ),
        (r#"{"Image":"busybox","Healthcheck":{"Retries":-1}}"#, "Retries in Healthcheck cannot be negative"),
        (r#"{"Image":"busybox","Healthcheck":{"Test":"true"}}"#, "invalid JSON"),
    ] {
        let (status, answer) = daemon.api("POST", "/containers/create", body);
        assert!(status == 400 && answer.contains(words), "{answer}");
    }
}
