//! What `docker` offers for the processes of a container: pausing them, limits, confinement. Needs root.

mod support;

use std::{
    io::{BufRead, BufReader, Read},
    process::Stdio,
    time::SystemTime,
};

use bollard_stubs::models;
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

#[test]
fn processes_are_listed_in_the_columns_of_ps() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&["create", "--name", "box", "--network", "none", "busybox", "sh", "-c", "sleep 1000; true"]);
    assert!(daemon.fails(1, &["top", "box"]).contains("is not running"));
    daemon.ok(&["start", "box"]);
    let full = daemon.ok(&["top", "box"]);
    let lines: Vec<Vec<&str>> = full.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
    assert_eq!((lines.len(), lines[1][0], lines[2][7]), (3, "root", "sleep"), "{full}");
    assert_eq!(lines[2][2], lines[1][1]);
    let pid = daemon.ok(&["inspect", "-f", "{{.State.Pid}}", "box"]);
    let chosen = daemon.ok(&["top", "box", "-o", "pid,comm"]);
    assert!(chosen.lines().nth(1).unwrap().starts_with(pid.trim()), "{chosen}");
    daemon.ok(&["pause", "box"]);
    assert!(daemon.ok(&["top", "box", "aux"]).contains("sleep 1000"));
    assert!(daemon.fails(1, &["top", "box", "-q", "1"]).contains("`-q` is not supported"));
    daemon.ok(&["rm", "-f", "box"]);
}

#[test]
fn statistics_are_told_once_or_for_as_long_as_someone_listens() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "busy",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "while :; do :; done",
    ]);
    let told: models::ContainerStatsResponse = {
        let (status, body) = daemon.api("GET", "/containers/busy/stats?stream=0", "");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    };
    let (now, before) = (told.cpu_stats.unwrap(), told.precpu_stats.unwrap());
    let total = |stats: &models::ContainerCpuStats| stats.cpu_usage.as_ref().unwrap().total_usage.unwrap();
    let used = total(&now) - total(&before);
    let system = now.system_cpu_usage.unwrap() - before.system_cpu_usage.unwrap();
    let processors = u64::from(now.online_cpus.unwrap());
    // One processor or what others leave of it.
    let percent = used * processors * 100 / system;
    assert!((10..=130).contains(&percent), "{percent} % ({used} of {system} ns on {processors})");
    let shown = daemon.ok(&["stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "busy"]);
    assert_eq!(shown, "busy 1\n");
    let (_, once) = daemon.api("GET", "/containers/busy/stats?stream=0&one-shot=1", "");
    assert!(once.contains(r#""preread":"0001-01-01T00:00:00Z""#), "{once}");

    let mut stream = std::process::Command::new("curl")
        .args(["--silent", "--no-buffer", "--unix-socket"])
        .arg(daemon.socket())
        .arg("http://docker/containers/busy/stats")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(stream.stdout.take().unwrap()).lines();
    let first: models::ContainerStatsResponse =
        serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    let second: models::ContainerStatsResponse =
        serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(second.preread, first.read);
    daemon.ok(&["rm", "-f", "busy"]);
    // The stream ends with the container.
    assert!(lines.count() <= 2);
    stream.wait().unwrap();
    assert_eq!(daemon.api("GET", "/containers/busy/stats", "").0, 404);
}

#[test]
fn limits_are_changed_by_dockers_rules() {
    let (_machine, daemon) = with_busybox();
    daemon.ok(&[
        "create",
        "--name",
        "box",
        "--network",
        "none",
        "--memory",
        "100m",
        "busybox",
        "sleep",
        "1000",
    ]);
    let limits = "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.CpuShares}} {{.HostConfig.PidsLimit}}";
    assert_eq!(daemon.ok(&["inspect", "-f", limits, "box"]), "104857600 209715200 0 0\n");
    daemon.ok(&["update", "--memory", "200m", "--cpu-shares", "512", "--pids-limit", "20", "box"]);
    assert_eq!(daemon.ok(&["inspect", "-f", limits, "box"]), "209715200 209715200 512 20\n");
    for (options, words) in [
        (&["--memory", "300m"][..], "update the memoryswap at the same time"),
        (&["--memory", "1m"], "Minimum memory limit allowed is 6MB"),
        (&["--blkio-weight", "5"], "Range of blkio weight is from 10 to 1000"),
        (&["--cpuset-cpus", "x"], "Invalid value x for cpuset cpus"),
    ] {
        let refused = daemon.fails(1, &[&["update"], options, &["box"]].concat());
        assert!(refused.contains(words), "{options:?}: {refused}");
    }
    assert_eq!(daemon.ok(&["inspect", "-f", limits, "box"]), "209715200 209715200 512 20\n");
    let warned = daemon.docker(&["create", "--memory-swappiness", "10", "--network", "none", "busybox"]);
    assert!(text(&warned.stderr).contains("Memory swappiness discarded"), "{}", text(&warned.stderr));
    let refused = daemon.fails(1, &["create", "--oom-kill-disable", "--network", "none", "busybox"]);
    assert!(refused.contains("cgroup v2 has no such switch"), "{refused}");
}

#[test]
fn containers_join_others_and_the_machine() {
    let (_machine, daemon) = with_busybox();
    let run = |args: &[&str], script: &str| {
        daemon.ok(&[&["run", "--rm", "--network", "none"], args, &["busybox", "sh", "-c", script]].concat())
    };
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "donor",
        "--network",
        "none",
        "--ipc",
        "shareable",
        "busybox",
        "sleep",
        "1000",
    ]);
    daemon.ok(&["exec", "donor", "sh", "-c", "echo shared > /dev/shm/note"]);
    assert_eq!(run(&["--ipc", "container:donor"], "cat /dev/shm/note"), "shared\n");
    daemon.ok(&[
        "create",
        "--name",
        "joiner",
        "--network",
        "none",
        "--pid",
        "container:donor",
        "busybox",
        "cat",
        "/proc/1/cmdline",
    ]);
    // A renamed container is still the same.
    daemon.ok(&["rename", "donor", "giver"]);
    assert_eq!(daemon.ok(&["start", "-a", "joiner"]), "sleep\x001000\0");
    daemon.ok(&["run", "-d", "--name", "alone", "--network", "none", "busybox", "sleep", "1000"]);
    let refused =
        daemon.fails(125, &["run", "--rm", "--network", "none", "--ipc", "container:alone", "busybox"]);
    assert!(refused.contains("non-shareable IPC (hint: use IpcMode:shareable"), "{refused}");
    daemon.ok(&["kill", "giver"]);
    assert!(daemon.fails(1, &["start", "joiner"]).contains("cannot join PID of a non running container"));
    let missing =
        daemon.fails(125, &["run", "--rm", "--network", "none", "--pid", "container:none", "busybox"]);
    assert!(missing.contains("No such container: none"), "{missing}");

    let machines =
        |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap().display().to_string();
    let shared = run(
        &["--pid", "host", "--ipc", "host", "--uts", "host", "--userns", "host"],
        "cd /proc/self/ns; for n in pid ipc uts user; do readlink $n; done",
    );
    let expected: Vec<String> = ["pid", "ipc", "uts", "user"].map(machines).to_vec();
    assert_eq!(shared.lines().collect::<Vec<_>>(), expected);
    assert!(
        run(&["--cgroupns", "host", "--cgroup-parent", "/team"], "cat /proc/self/cgroup").contains("/team/")
    );
    assert_eq!(
        run(
            &["--sysctl", "net.core.somaxconn=77", "--annotation", "a=b", "--runtime", "runc"],
            "cat /proc/sys/net/core/somaxconn"
        ),
        "77\n"
    );
    for (options, words) in [
        (&["--sysctl", "kernel.core_pattern=x"][..], "is not allowed"),
        (&["--runtime", "kata"], "unknown or invalid runtime name: kata"),
        (&["--isolation", "hyperv"], "linux only supports 'default'"),
        (&["--uts", "host", "--hostname", "x"], "conflicting options"),
        (
            &["--device", "/dev/nosuch"],
            "error gathering device information while adding custom device \"/dev/nosuch\"",
        ),
        (
            &["--device-cgroup-rule", "c 1:3 rwm", "--device", "/etc/passwd"],
            "error gathering device information",
        ),
    ] {
        let refused =
            daemon.docker(&[&["run", "--rm", "--network", "none"], options, &["busybox", "true"]].concat());
        assert!(
            !refused.status.success() && text(&refused.stderr).contains(words),
            "{options:?}: {}",
            text(&refused.stderr)
        );
    }
    assert!(daemon.ok(&["ps", "-aq"]).lines().count() == 3);
}

#[test]
fn a_privileged_container_has_everything() {
    let (_machine, daemon) = with_busybox();
    let script = "[ -c /dev/kmsg ] && echo device; grep -c ' /proc/kcore ' /proc/mounts; mkdir /sys/fs/cgroup/own && echo group; grep Seccomp: /proc/self/status";
    let seen =
        daemon.docker(&["run", "--rm", "--network", "none", "--privileged", "busybox", "sh", "-c", script]);
    assert_eq!(text(&seen.stdout), "device\n0\ngroup\nSeccomp:\t0\n", "{}", text(&seen.stderr));
    daemon.ok(&[
        "run",
        "-d",
        "--name",
        "all",
        "--network",
        "none",
        "--privileged",
        "busybox",
        "sleep",
        "1000",
    ]);
    let capabilities = |args: &[&str]| {
        daemon.ok(&[&["exec"], args, &["all", "grep", "CapEff", "/proc/self/status"]].concat())
    };
    assert_eq!(capabilities(&[]), capabilities(&["--privileged"]));
    assert_eq!(
        daemon.ok(&["inspect", "-f", "{{.HostConfig.Privileged}} {{.HostConfig.Runtime}}", "all"]),
        "true runc\n"
    );
    daemon.ok(&["rm", "-f", "all"]);
}
