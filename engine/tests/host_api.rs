//! The API's JSON against Docker's models, and clients that behave badly. Needs root.

mod support;

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use bollard_stubs::models;
use serde::de::DeserializeOwned;
use support::{Daemon, text, with_busybox};

fn model<T: DeserializeOwned>(daemon: &Daemon, path: &str) -> T {
    let (status, body) = daemon.api("GET", path, "");
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"))
}

#[test]
fn answers_have_the_shapes_of_dockers_models() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--label",
        "a=b",
        "--network",
        "none",
        "busybox",
        "sleep",
        "1000",
    ]);
    daemon.ok(&["create", "--name", "idle", "--network", "none", "-it", "--env", "X=1", "busybox"]);
    let inspect: models::ContainerInspectResponse = model(&daemon, "/containers/web/json");
    assert_eq!(inspect.name.as_deref(), Some("/web"));
    let state = inspect.state.unwrap();
    assert_eq!((state.running, state.status), (Some(true), Some(models::ContainerStateStatusEnum::RUNNING)));
    assert!(state.pid.unwrap() > 0);
    let _: models::ContainerInspectResponse = model(&daemon, "/containers/idle/json");
    let list: Vec<models::ContainerSummary> = model(&daemon, "/containers/json?all=1");
    assert_eq!(list.len(), 2);
    assert_eq!(list[1].names.as_deref(), Some(&["/web".to_owned()][..]));
    let images: Vec<models::ImageSummary> = model(&daemon, "/images/json");
    assert_eq!(images[0].repo_tags, ["busybox:latest"]);
    let image: models::ImageInspect = model(&daemon, "/images/busybox/json");
    assert_eq!(image.os.as_deref(), Some("linux"));
    let _: Vec<models::ImageHistoryResponseItem> = model(&daemon, "/images/busybox/history");
    let info: models::SystemInfo = model(&daemon, "/info");
    assert_eq!((info.containers, info.containers_running, info.images), (Some(2), Some(1), Some(1)));
    let version: models::SystemVersion = model(&daemon, "/version");
    assert_eq!(version.api_version.as_deref(), Some("1.51"));
    let _: models::SystemDataUsageResponse = model(&daemon, "/system/df");
    let (status, created) = daemon.api("POST", "/containers/web/exec", r#"{"Cmd":["sh","-c","exit 3"]}"#);
    assert_eq!(status, 201);
    let exec: models::IdResponse = serde_json::from_str(&created).unwrap();
    assert_eq!(daemon.api("POST", &format!("/exec/{}/start", exec.id), r#"{"Detach":true}"#).0, 200);
    let begun = Instant::now();
    loop {
        let inspect: models::ExecInspectResponse = model(&daemon, &format!("/exec/{}/json", exec.id));
        if inspect.exit_code == Some(3) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{inspect:?}");
    }
    let (_, events) = daemon.api("GET", "/events?since=0&until=1", "");
    assert_eq!(events, "");
    let (_, events) = daemon.api("GET", &format!("/events?since=0&until={}", now()), "");
    let actions: Vec<String> = events
        .lines()
        .map(|line| {
            serde_json::from_str::<models::EventMessage>(line)
                .unwrap_or_else(|error| panic!("{error}: {line}"))
        })
        .filter(|event| event.typ == Some(models::EventMessageTypeEnum::CONTAINER))
        .filter_map(|event| event.action)
        .collect();
    assert_eq!(actions[..3], ["create", "start", "create"]);
    assert!(actions.contains(&"exec_die".to_owned()), "{actions:?}");
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 1
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !check() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn clients_that_vanish_leave_nothing_open_and_hold_no_one_up() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["run", "-d", "--name", "quiet", "-i", "--network", "none", "busybox", "sleep", "1000"]);
    let spam = "i=0; while true; do echo 0123456789012345678901234567890123456789; done";
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "loud",
        "--log-driver",
        "none",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        spam,
    ]);
    daemon.ok(&["ps"]);
    let before = descriptors();
    for round in 0..5 {
        for args in [
            &["attach", "quiet"][..],
            &["attach", "--no-stdin", "quiet"],
            &["logs", "-f", "quiet"],
            &["events"],
            &["wait", "quiet"],
            &["exec", "quiet", "sleep", "0.2"],
        ] {
            let mut client =
                daemon.command(args).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
            thread::sleep(Duration::from_millis(60 + round));
            client.kill().unwrap();
            client.wait().unwrap();
        }
    }
    // A client that stops reading holds the container up; when it is gone, the container goes on.
    let mut stalled =
        daemon.command(&["attach", "--no-stdin", "loud"]).stdout(Stdio::piped()).spawn().unwrap();
    thread::sleep(Duration::from_millis(300));
    stalled.kill().unwrap();
    stalled.wait().unwrap();
    let mut reader =
        daemon.command(&["attach", "--no-stdin", "loud"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut block = vec![0; 1 << 20];
    std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut block).unwrap();
    reader.kill().unwrap();
    reader.wait().unwrap();
    eventually("descriptors stay open", || descriptors() <= before + 2);
    daemon.ok(&["rm", "-f", "quiet", "loud"]);
}

#[test]
fn many_clients_at_once_are_all_served() {
    let (_machine, daemon) = with_busybox();
    thread::scope(|scope| {
        let runs: Vec<_> = (0..12)
            .map(|n| {
                let daemon = &daemon;
                scope.spawn(move || {
                    daemon.ok(&["run", "--rm", "--network", "none", "busybox", "echo", &n.to_string()])
                })
            })
            .collect();
        for (n, run) in runs.into_iter().enumerate() {
            assert_eq!(run.join().unwrap(), format!("{n}\n"));
        }
    });
    assert_eq!(daemon.ok(&["ps", "-aq"]), "");
}

#[test]
fn large_logs_are_kept_whole_and_within_their_limits() {
    let (machine, daemon) = with_busybox();
    let script = "i=0; while [ $i -lt 20000 ]; do echo line $i of the log; i=$((i+1)); done";
    daemon.ok(&["run", "--name", "all", "--network", "none", "busybox", "sh", "-c", script]);
    let log = daemon.ok(&["logs", "all"]);
    assert!((0..20000).map(|i| format!("line {i} of the log")).eq(log.lines()));
    assert_eq!(daemon.ok(&["logs", "--tail", "2", "all"]), "line 19998 of the log\nline 19999 of the log\n");

    let limits = ["--log-opt", "max-size=100k", "--log-opt", "max-file=3"];
    let args =
        [&["run", "-d", "--name", "cut"], &limits[..], &["--network", "none", "busybox", "sh", "-c", script]]
            .concat();
    let id = daemon.ok(&args);
    daemon.ok(&["wait", "cut"]);
    let folder = machine.home.path().join("containers").join(id.trim());
    let sizes: Vec<u64> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).collect();
    assert!(sizes.len() == 3 && sizes.iter().all(|size| *size < 300_000), "{sizes:?}");
    let log = daemon.ok(&["logs", "cut"]);
    let lines: Vec<&str> = log.lines().collect();
    assert!(lines.len() > 1000 && lines.last() == Some(&"line 19999 of the log"));
    let first: usize = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
    assert_eq!(first + lines.len(), 20000, "the end of the log has a gap");
}

#[test]
fn unfinished_lines_are_seen_at_once_by_those_attached() {
    let (_machine, daemon) = with_busybox();
    let mut client = daemon
        .command(&[
            "run",
            "--rm",
            "-i",
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            "printf 'name? '; read name; echo hello $name",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = client.stdout.take().unwrap();
    let mut prompt = [0; 6];
    std::io::Read::read_exact(&mut out, &mut prompt).unwrap();
    assert_eq!(&prompt, b"name? ");
    std::io::Write::write_all(client.stdin.as_mut().unwrap(), b"you\n").unwrap();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut out, &mut rest).unwrap();
    assert_eq!(text(&rest), "hello you\n");
    assert!(client.wait().unwrap().success());
}

#[test]
fn a_refusal_waits_for_what_the_client_still_sends() {
    let (_machine, daemon) = with_busybox();
    let mut client = UnixStream::connect(daemon.socket()).unwrap();
    client
        .write_all(b"POST /v1.44/swarm/init HTTP/1.1\r\nHost: docker\r\nContent-Length: 2\r\n\r\n")
        .unwrap();
    client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut answer = [0; 12];
    let early = client.read(&mut answer).unwrap_err();
    assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock);
    client.set_read_timeout(None).unwrap();
    client.write_all(b"{}").unwrap();
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 501");
}
