//! What people do with `docker`, against the engine with a real agent and without a VM. Needs root.

mod support;

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
};

use support::{Machine, text, with_busybox};

#[test]
fn a_container_runs_and_its_exit_code_is_the_clients() {
    let (_machine, daemon) = with_busybox();
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", "busybox", "echo", "hello"]), "hello\n");
    for (code, command) in [
        (0, &["true"][..]),
        (1, &["false"]),
        (7, &["sh", "-c", "exit 7"]),
        (137, &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]),
        (127, &["nosuch"]),
        (126, &["/etc/passwd"]),
    ] {
        let args = [&["run", "--rm", "--network", "none", "busybox"], command].concat();
        daemon.fails(code, &args);
    }
    let refused = daemon.fails(125, &["run", "--rm", "-v", "/tmp:/x:shared", "busybox", "true"]);
    assert!(refused.contains("bind-propagation=shared"), "{refused}");
    let missing = daemon.fails(125, &["run", "--rm", "nosuchimage", "true"]);
    assert!(
        missing.contains("Unable to find image 'nosuchimage:latest' locally")
            && missing.contains("registry-1.docker.io"),
        "{missing}"
    );
    assert_eq!(daemon.ok(&["ps", "-aq"]), "");
}

#[test]
fn input_goes_through_byte_for_byte() {
    let (_machine, daemon) = with_busybox();
    let input: Vec<u8> = (0..20_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let output =
        daemon.with_input(&["run", "--rm", "-i", "--network", "none", "busybox", "cat"], input.clone());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stdout == input, "{} bytes came back of {}", output.stdout.len(), input.len());

    daemon.ok(&["run", "-d", "--name", "box", "--network", "none", "busybox", "sleep", "1000"]);
    let output = daemon.with_input(&["exec", "-i", "box", "sh", "-c", "cat; exit 3"], input.clone());
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(output.stdout == input);
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let (_machine, daemon) = with_busybox();
    let output =
        daemon.docker(&["run", "--rm", "--network", "none", "busybox", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("out\n", "err\n"));
}

#[test]
fn a_container_in_the_background_is_seen_followed_entered_and_stopped() {
    let (_machine, daemon) = with_busybox();
    let script =
        "i=0; trap 'echo bye; exit 5' TERM; while true; do echo line $i; i=$((i+1)); sleep 0.05; done";
    let id =
        daemon.ok(&["run", "-d", "--name", "web", "--label", "tier=front", "busybox", "sh", "-c", script]);
    let id = id.trim();
    assert_eq!(id.len(), 64);
    assert!(daemon.ok(&["ps"]).contains("web"));
    assert_eq!(daemon.ok(&["ps", "-q", "--no-trunc", "--filter", "label=tier=front"]).trim(), id);
    assert_eq!(daemon.ok(&["ps", "-q", "--filter", "label=tier=back"]), "");

    let mut follower =
        daemon.command(&["logs", "-f", "--tail", "1", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    for _ in 0..5 {
        assert!(lines.next().unwrap().unwrap().starts_with("line "));
    }
    assert_eq!(daemon.ok(&["exec", "web", "echo", "inside"]), "inside\n");
    daemon.fails(9, &["exec", "web", "sh", "-c", "exit 9"]);
    daemon.fails(127, &["exec", "web", "nosuch"]);
    assert_eq!(
        daemon.ok(&["inspect", "-f", "{{.State.Status}} {{.Config.Image}} {{.Name}}", "web"]),
        "running busybox /web\n"
    );

    let wait = daemon.command(&["wait", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    daemon.ok(&["stop", "web"]);
    assert_eq!(text(&wait.wait_with_output().unwrap().stdout), "5\n");
    assert!(lines.map(Result::unwrap).any(|line| line == "bye"));
    assert!(follower.wait().unwrap().success());
    assert!(daemon.ok(&["ps", "-a"]).contains("Exited (5)"));
    let log = daemon.ok(&["logs", "web"]);
    assert!(log.starts_with("line 0\nline 1\n") && log.ends_with("bye\n"));
    daemon.ok(&["start", "web"]);
    daemon.fails(1, &["rm", "web"]);
    daemon.ok(&["rm", "-f", "web"]);
    assert_eq!(daemon.ok(&["ps", "-aq"]), "");
}

#[test]
fn a_terminal_is_a_terminal() {
    let (_machine, daemon) = with_busybox();
    // `script` gives the client a terminal of its own.
    let command =
        "docker run --rm -it --network none busybox sh -c 'stty size; echo \"$TERM\"; [ -t 0 ] && echo tty'";
    let mut script = daemon.command(&[]);
    script = {
        let mut outer = std::process::Command::new("script");
        outer.args(["-qec", &format!("stty rows 33 cols 77; {command}"), "/dev/null"]);
        outer.envs(
            script
                .get_envs()
                .filter_map(|(name, value)| value.map(|value| (name.to_owned(), value.to_owned()))),
        );
        outer
    };
    let output = script.stdin(Stdio::null()).output().unwrap();
    let shown = text(&output.stdout);
    assert!(
        shown.contains("33 77\r\n") && shown.contains("xterm\r\n") && shown.contains("tty\r\n"),
        "{shown}"
    );
}

#[test]
fn options_reach_the_container() {
    let (_machine, daemon) = with_busybox();
    let run = |options: &[&str], command: &[&str]| {
        daemon.ok(&[&["run", "--rm", "--network", "none"], options, &["busybox"], command].concat())
    };
    assert_eq!(run(&["-h", "boat"], &["hostname"]), "boat\n");
    assert_eq!(run(&["-e", "A=1"], &["sh", "-c", "echo $A $PATH"]), "1 /bin\n");
    assert_eq!(run(&["-u", "sailor"], &["id", "-u"]), "1000\n");
    assert_eq!(run(&["-w", "/made/here"], &["sh", "-c", "pwd"]), "/made/here\n");
    assert_eq!(run(&["--entrypoint", "echo"], &["from", "entrypoint"]), "from entrypoint\n");
    assert_eq!(run(&["--read-only"], &["sh", "-c", "touch /x 2>/dev/null || echo no"]), "no\n");
    assert_eq!(
        run(
            &["--tmpfs", "/scratch"],
            &[
                "sh",
                "-c",
                "grep -c ' /scratch tmpfs ' /proc/mounts || cat /proc/mounts | busybox grep -c scratch"
            ]
        )
        .trim(),
        "1"
    );
    assert_eq!(run(&["--init"], &["sh", "-c", "[ $$ != 1 ] && echo child"]), "child\n");
    assert_eq!(
        run(&["--cap-drop", "ALL"], &["sh", "-c", "busybox grep CapBnd /proc/self/status"]),
        "CapBnd:\t0000000000000000\n"
    );
}

#[test]
fn options_that_are_not_there_yet_are_refused_by_name() {
    let (_machine, daemon) = with_busybox();
    for options in [
        &["--storage-opt", "size=1g"][..],
        &["--gpus", "all"],
        &["--cpu-rt-runtime", "5"],
        &["--log-driver", "syslog"],
        &["--log-opt", "compress=true"],
    ] {
        let args = [&["create"], options, &["busybox", "true"]].concat();
        let message = daemon.fails(1, &args);
        assert!(message.contains("is not supported by Coracle yet"), "{options:?}: {message}");
    }
    assert_eq!(daemon.ok(&["ps", "-aq"]), "");
}

#[test]
fn names_ids_and_conflicts_are_as_in_docker() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["create", "--name", "one", "--network", "none", "busybox"]);
    let conflict = daemon.fails(1, &["create", "--name", "one", "--network", "none", "busybox"]);
    assert!(conflict.contains("is already in use by container"), "{conflict}");
    daemon.ok(&["rename", "one", "two"]);
    assert!(daemon.fails(1, &["rm", "one"]).contains("No such container: one"));
    let in_use = daemon.fails(1, &["rmi", "busybox"]);
    assert!(in_use.contains("is using its referenced image"), "{in_use}");
    assert!(daemon.fails(1, &["kill", "two"]).contains("is not running"));
    daemon.ok(&["rm", "two"]);
    daemon.ok(&["tag", "busybox", "other:1"]);
    assert!(daemon.ok(&["rmi", "other:1"]).contains("Untagged: other:1"));
    assert!(daemon.ok(&["rmi", "busybox"]).contains("Deleted: sha256:"));
    assert_eq!(daemon.ok(&["images", "-q"]), "");
}

#[test]
fn attach_sees_output_and_a_created_container_can_be_started_attached() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["create", "--name", "job", "--network", "none", "busybox", "sh", "-c", "echo first; exit 4"]);
    let output = daemon.docker(&["start", "-a", "job"]);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("first\n", Some(4)));
    let output = daemon.docker(&["start", "-a", "job"]);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("first\n", Some(4)));
    assert_eq!(daemon.ok(&["logs", "job"]), "first\nfirst\n");
}

#[test]
fn bad_requests_get_dockers_answers() {
    let machine = Machine::new();
    let daemon = support::Daemon::start(&machine);
    for (method, path, body, status, words) in [
        ("GET", "/v1.20/version", "", 400, "too old"),
        ("GET", "/v1.99/version", "", 400, "too new"),
        ("GET", "/nosuch", "", 404, "page not found"),
        ("POST", "/containers/create", "{", 400, "invalid JSON"),
        ("POST", "/containers/create", "[]", 400, "invalid JSON"),
        ("POST", "/containers/create", r#"{"Image":"a","Cmd":["x"]}"#, 404, "No such image: a:latest"),
        (
            "POST",
            "/containers/create",
            r#"{"Image":"a","HostConfig":{"StorageOpt":{"size":"1g"}}}"#,
            501,
            "--storage-opt",
        ),
        ("GET", "/containers/abc/json", "", 404, "No such container: abc"),
        ("GET", "/containers/json?filters=x", "", 400, "invalid filters"),
        ("GET", "/containers/json?limit=x", "", 400, "not a number"),
        ("GET", "/networks/abc", "", 404, "network abc not found"),
        ("POST", "/exec/abc/start", "{}", 404, "No such exec instance"),
        ("GET", "/events?since=x", "", 400, "since"),
        ("POST", "/images/load", "this is no archive", 400, "archive"),
        ("GET", "/%ff", "", 400, "UTF-8"),
    ] {
        let (got, answer) = daemon.api(method, path, body);
        assert_eq!(got, status, "{method} {path}: {answer}");
        assert!(answer.contains(words), "{method} {path}: {answer}");
    }
    let (status, ping) = daemon.api("GET", "/_ping", "");
    assert_eq!((status, ping.as_str()), (200, "OK"));
}
