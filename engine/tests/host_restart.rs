//! Daemons that end while containers run, and sandboxes that die: nothing is lost, nothing is left behind. Needs root.

mod support;

use std::{
    io::{BufRead, BufReader, Read},
    process::Stdio,
    thread,
    time::Duration,
};

use coracle_engine::ServeEnd;
use support::{Daemon, text, with_busybox};

const COUNTER: &str = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done";

fn lines(log: &str) -> Vec<u32> {
    log.lines().map(|line| line.parse().unwrap_or_else(|_| panic!("not a whole line: {line:?}"))).collect()
}

#[test]
fn containers_run_on_while_the_daemon_is_away_and_no_output_is_lost_or_doubled() {
    let (machine, daemon) = with_busybox();
    daemon.ok(&["run", "-d", "--name", "count", "--network", "none", "busybox", "sh", "-c", COUNTER]);
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "brief",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "echo on; sleep 1; echo off; exit 6",
    ]);
    daemon.ok(&["run", "-d", "--rm", "--name", "gone", "--network", "none", "busybox", "sleep", "1"]);
    let before = daemon.ok(&["inspect", "-f", "{{.State.Pid}} {{.State.StartedAt}}", "count"]);
    assert_eq!(daemon.end(), ServeEnd::Shutdown);

    // Long enough for the others to end meanwhile.
    thread::sleep(Duration::from_millis(1500));
    let daemon = Daemon::start(&machine);
    assert_eq!(daemon.ok(&["inspect", "-f", "{{.State.Pid}} {{.State.StartedAt}}", "count"]), before);
    assert_eq!(daemon.ok(&["wait", "brief"]), "6\n");
    assert_eq!(daemon.ok(&["logs", "brief"]), "on\noff\n");
    for _ in 0..100 {
        if daemon.ok(&["ps", "-aq", "--filter", "name=gone"]).is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(daemon.ok(&["ps", "-aq", "--filter", "name=gone"]), "");

    // New output comes, and the whole is without a gap.
    let mut follower = daemon.command(&["logs", "-f", "count"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(follower.stdout.take().unwrap());
    let mut line = String::new();
    for expected in 0..300u32 {
        line.clear();
        out.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end().parse(), Ok(expected));
    }
    daemon.ok(&["exec", "count", "true"]);
    daemon.ok(&["kill", "count"]);
    out.read_to_string(&mut line).unwrap();
    follower.wait().unwrap();
    let log = lines(&daemon.ok(&["logs", "count"]));
    assert_eq!(log, (0..u32::try_from(log.len()).unwrap()).collect::<Vec<_>>());
    assert_eq!(
        daemon.ok(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "count"]),
        "exited 137\n"
    );
}

#[test]
fn a_sandbox_that_dies_ends_its_containers_and_the_next_start_makes_a_new_one() {
    let (machine, daemon) = with_busybox();
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "echo up; sleep 1000",
    ]);
    daemon.ok(&["run", "-d", "--rm", "--name", "gone", "--network", "none", "busybox", "sleep", "1000"]);
    let mut events = daemon
        .command(&[
            "events",
            "--since",
            "0",
            "--filter",
            "event=die",
            "--filter",
            "container=web",
            "--format",
            "{{.Action}} {{.Actor.Attributes.exitCode}}",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut events_out = BufReader::new(events.stdout.take().unwrap()).lines();
    let wait = daemon.command(&["wait", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    machine.kill_sandbox();
    assert_eq!(text(&wait.wait_with_output().unwrap().stdout), "255\n");
    assert_eq!(events_out.next().unwrap().unwrap(), "die 255");
    events.kill().unwrap();
    events.wait().unwrap();
    let state =
        daemon.ok(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}", "web"]);
    assert!(state.starts_with("exited 255 its sandbox died"), "{state}");
    assert_eq!(daemon.ok(&["logs", "web"]), "up\n");
    daemon.ok(&["start", "web"]);
    assert_eq!(daemon.ok(&["exec", "web", "echo", "again"]), "again\n");
    daemon.ok(&["rm", "-f", "web"]);
}

#[test]
fn a_sandbox_that_died_while_the_daemon_was_away_is_noticed() {
    let (machine, daemon) = with_busybox();
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "echo up; sleep 1000",
    ]);
    daemon.end();
    machine.kill_sandbox();
    let daemon = Daemon::start(&machine);
    let state =
        daemon.ok(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}", "web"]);
    assert!(state.starts_with("exited 255 its sandbox"), "{state}");
    assert_eq!(daemon.ok(&["logs", "web"]), "up\n");
}

#[test]
fn going_down_stops_everything_and_ends_the_daemon() {
    let (_machine, daemon) = with_busybox();
    let trap = "trap 'echo bye; exit 0' TERM; while true; do sleep 0.05; done";
    daemon.ok(&["run", "-d", "--name", "web", "--network", "none", "busybox", "sh", "-c", trap]);
    let (status, timings) = daemon.api("GET", "/coracle/timings/web", "");
    assert_eq!(status, 200);
    for phase in ["created", "sandbox-ready", "layers-attached", "agent-started"] {
        assert!(timings.contains(phase), "{timings}");
    }
    let (status, answer) = daemon.api("GET", "/coracle/status", "");
    assert!(status == 200 && answer.contains(r#""state":"running""#), "{answer}");
    assert_eq!(daemon.api("POST", "/coracle/down", "").0, 204);
    assert_eq!(daemon.wait(), ServeEnd::Down);
}

#[test]
fn a_client_that_goes_away_while_it_loads_leaves_nothing() {
    let (machine, daemon) = with_busybox();
    let images = daemon.ok(&["images", "-q"]);
    let archive = std::fs::read(machine.home.path().join("busybox.tar")).unwrap();
    let mut child = daemon.command(&["load"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), &archive[..archive.len() / 2]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(daemon.ok(&["images", "-q"]), images);
    daemon.load_busybox();
}
