//! Log drivers and their options, and that no log is without a bound unless someone wants it. Needs root.

mod support;

use support::with_busybox;

#[test]
fn labels_and_variables_are_noted_and_shown_with_details() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&[
        "run",
        "--name",
        "web",
        "--network",
        "none",
        "--label",
        "tier=front & back",
        "--env",
        "STAGE=live",
        "--log-opt",
        "labels=tier,none",
        "--log-opt",
        "env=STAGE",
        "busybox",
        "echo",
        "hello",
    ]);
    assert_eq!(daemon.ok(&["logs", "web"]), "hello\n");
    assert_eq!(daemon.ok(&["logs", "--details", "web"]), "STAGE=live,tier=front+%26+back hello\n");
    let stamped = daemon.ok(&["logs", "--details", "--timestamps", "web"]);
    assert!(stamped.ends_with("Z STAGE=live,tier=front+%26+back hello\n"), "{stamped}");
    let path = daemon.ok(&["inspect", "-f", "{{.LogPath}}", "web"]);
    let file = std::fs::read_to_string(path.trim()).unwrap();
    assert!(file.contains(r#""attrs":{"STAGE":"live","tier":"front \u0026 back"},"time""#), "{file}");
}

#[test]
fn the_local_driver_keeps_logs_that_can_be_read_and_none_keeps_nothing() {
    let (_machine, daemon) = with_busybox();
    for driver in ["local", "none"] {
        let run =
            ["run", "--name", driver, "--network", "none", "--log-driver", driver, "busybox", "echo", "x"];
        assert_eq!(daemon.ok(&run), "x\n");
    }
    assert_eq!(daemon.ok(&["logs", "local"]), "x\n");
    assert_eq!(daemon.ok(&["inspect", "-f", "{{.LogPath}}", "local"]), "\n");
    assert!(daemon.fails(1, &["logs", "none"]).contains("does not support reading"));
    for (driver, code, words) in [
        ("asdf", 125, "no log driver named 'asdf' is registered"),
        ("syslog", 125, "not supported by Coracle"),
    ] {
        let error = daemon.fails(code, &["run", "--log-driver", driver, "busybox", "true"]);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_container_that_writes_without_end_does_not_fill_the_disk() {
    let (machine, daemon) = with_busybox();
    // Small files, so that the test is quick; the default differs in nothing but the numbers.
    let options = ["--log-opt", "max-size=256k", "--log-opt", "max-file=3"];
    let mut run = vec!["run", "-d", "--name", "loud", "--network", "none"];
    run.extend(options);
    run.extend(["busybox", "sh", "-c", "busybox seq 1 200000; echo the end"]);
    daemon.ok(&run);
    assert_eq!(daemon.ok(&["wait", "loud"]), "0\n");
    let id = daemon.ok(&["inspect", "-f", "{{.Id}}", "loud"]);
    let folder = machine.home.path().join("containers").join(id.trim());
    let sizes: Vec<u64> =
        std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).collect();
    assert!(sizes.len() == 3 && sizes.iter().sum::<u64>() < 3 * (256 << 10) + (512 << 10), "{sizes:?}");
    let log = daemon.ok(&["logs", "loud"]);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.last(), Some(&"the end"));
    // What is kept is without a gap.
    let numbers: Vec<u32> = lines[..lines.len() - 1].iter().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
    assert_eq!(daemon.ok(&["logs", "--tail", "2", "loud"]), "200000\nthe end\n");
}
