//! What `docker` offers for the processes of a container: pausing them, limits, confinement. Needs root.

mod support;

use std::{
    io::{BufRead, BufReader, Read},
    process::Stdio,
    time::SystemTime,
};

use support::{Daemon, text, with_busybox};

#[test]
fn a_paused_container_stands_still_until_it_is_unpaused_stopped_or_killed() {
    let (machine, daemon) = with_busybox();
    let script = "while true; do echo line; sleep 0.02; done";
    daemon.ok(&["run", "-d", "--init", "--name", "box", "--network", "none", "busybox", "sh", "-c", script]);
    daemon.ok(&["pause", "box"]);
    let state = "{{.State.Status}} {{.State.Running}} {{.State.Paused}}";
    assert_eq!(daemon.ok(&["inspect", "-f", state, "box"]), "paused true true\n");
    assert!(daemon.ok(&["ps"]).contains("(Paused)"));
    assert_eq!(daemon.ok(&["info", "-f", "{{.ContainersPaused}} {{.ContainersRunning}}"]), "1 0\n");
    let before = daemon.ok(&["logs", "box"]).len();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(daemon.ok(&["logs", "box"]).len(), before);

    for (args, words) in [
        (&["pause", "box"][..], "is already paused"),
        (&["exec", "box", "true"], "is paused, unpause the container before exec"),
        (&["start", "box"], "cannot start a paused container, try unpause instead"),
        (&["attach", "box"], "paused container"),
        (&["rm", "box"], "container is paused and must be unpaused first"),
    ] {
        let refused = daemon.fails(1, args);
        assert!(refused.contains(words), "{args:?}: {refused}");
    }
    // It is still paused for the next daemon.
    daemon.end();
    let daemon = Daemon::start(&machine);
    assert_eq!(daemon.ok(&["inspect", "-f", state, "box"]), "paused true true\n");

    daemon.ok(&["unpause", "box"]);
    assert!(daemon.fails(1, &["unpause", "box"]).contains("is not paused"));
    assert_eq!(daemon.ok(&["exec", "box", "echo", "in"]), "in\n");
    let mut follower =
        daemon.command(&["logs", "-f", "--tail", "0", "box"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "line\n");

    daemon.ok(&["pause", "box"]);
    daemon.ok(&["stop", "box"]);
    lines.read_to_string(&mut line).unwrap();
    assert!(follower.wait().unwrap().success());
    assert_eq!(daemon.ok(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"]), "exited 143\n");
    assert!(daemon.fails(1, &["pause", "box"]).contains("is not running"));
    daemon.ok(&["start", "box"]);
    daemon.ok(&["pause", "box"]);
    daemon.ok(&["rm", "-f", "box"]);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let until = (now + 1).to_string();
    let events = daemon.ok(&["events", "--since", "1h", "--until", &until, "--format", "{{.Action}}"]);
    assert!(events.contains("unpause\n") && events.contains("\npause\n"), "{events}");
}

#[test]
fn a_seccomp_profile_is_the_clients_file_and_has_its_effect() {
    let (machine, daemon) = with_busybox();
    let run = |args: &[&str], command: &[&str]| {
        let all = [&["run", "--rm", "--network", "none"], args, &["busybox"], command].concat();
        daemon.docker(&all)
    };
    let filtered = &["grep", "Seccomp:", "/proc/self/status"];
    assert_eq!(text(&run(&[], filtered).stdout), "Seccomp:\t2\n");
    assert_eq!(text(&run(&["--security-opt", "seccomp=unconfined"], filtered).stdout), "Seccomp:\t0\n");

    let profile = machine.home.path().join("profile.json");
    let rules = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#;
    std::fs::write(&profile, rules).unwrap();
    let option = format!("seccomp={}", profile.display());
    let denied = run(&["--security-opt", &option], &["mkdir", "/new"]);
    assert!(text(&denied.stderr).contains("Permission denied"), "{}", text(&denied.stderr));
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "box",
        "--network",
        "none",
        "--security-opt",
        &option,
        "busybox",
        "sleep",
        "1000",
    ]);
    assert!(daemon.fails(1, &["exec", "box", "mkdir", "/new"]).contains("Permission denied"));

    std::fs::write(&profile, r#"{"defaultAction":"NONSENSE"}"#).unwrap();
    let refused = daemon.fails(125, &["run", "--rm", "--security-opt", &option, "busybox", "true"]);
    assert!(refused.contains("Decoding seccomp profile failed"), "{refused}");
    let refused = daemon.fails(125, &["run", "--rm", "--security-opt", "apparmor=mine", "busybox", "true"]);
    assert!(refused.contains("AppArmor"), "{refused}");
    daemon.ok(&[
        "run",
        "--rm",
        "--network",
        "none",
        "--security-opt",
        "apparmor=unconfined",
        "--security-opt",
        "label=disable",
        "busybox",
        "true",
    ]);
}
