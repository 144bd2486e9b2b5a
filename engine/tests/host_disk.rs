//! A full disk: clear errors, nothing lost that was acknowledged, and everything works again when there is room. Needs root.

mod support;

use std::{fs, thread, time::Duration};

use support::{Daemon, Machine};

/// Takes all the room there is.
fn fill(path: &std::path::Path) {
    let mut file = fs::File::create(path).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
}

#[test]
fn a_full_disk_is_an_error_and_no_more() {
    let machine = Machine::with_disk(24);
    let daemon = Daemon::start(&machine);
    daemon.load_busybox();
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "before",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "while true; do echo tick; sleep 0.02; done",
    ]);
    let filler = machine.home.path().join("filler");
    fill(&filler);

    let mut failed = false;
    for attempt in 0..20 {
        let output =
            daemon.docker(&["create", "--name", &format!("full{attempt}"), "--network", "none", "busybox"]);
        if !output.status.success() {
            let message = support::text(&output.stderr);
            assert!(message.to_lowercase().contains("no space left on device"), "{message}");
            failed = true;
        }
    }
    assert!(failed, "the disk was not full");
    assert!(daemon.ok(&["ps"]).contains("before"));
    // Lines of this time are lost, as in Docker; the container runs on.
    thread::sleep(Duration::from_millis(300));

    fs::remove_file(&filler).unwrap();
    assert_eq!(daemon.ok(&["run", "--rm", "--network", "none", "busybox", "echo", "room"]), "room\n");
    let lines =
        |daemon: &Daemon| daemon.ok(&["logs", "before"]).lines().filter(|line| *line == "tick").count();
    let now = lines(&daemon);
    thread::sleep(Duration::from_millis(300));
    assert!(lines(&daemon) > now);
    let names = daemon.ok(&["ps", "-a", "--format", "{{.Names}}"]);
    daemon.end();
    let daemon = Daemon::start(&machine);
    assert_eq!(daemon.ok(&["ps", "-a", "--format", "{{.Names}}"]), names);
    daemon.ok(&["rm", "-f", "before"]);
}
