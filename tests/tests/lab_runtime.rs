//! What only the real guest's kernel can show: limits and statistics of cgroup v2, the filter of system calls by its effect, rules for
//! devices, the freezer, and an agent that goes on answering whatever containers do.

use std::sync::LazyLock;

use coracle_tests::{Finished, Installation};

/// One VM serves the tests of this file.
static CORACLE: LazyLock<Installation> = LazyLock::new(|| Installation::new().with_busybox());

#[test]
fn the_runtime_keeps_its_promises_in_the_guest() {
    let tests: &[(&str, fn())] = &[
        ("every_limit_is_a_file_of_the_cgroup", every_limit_is_a_file_of_the_cgroup),
        ("limits_change_while_a_container_runs", limits_change_while_a_container_runs),
        ("system_calls_are_filtered", system_calls_are_filtered),
        ("devices_are_ruled", devices_are_ruled),
        ("a_frozen_container_uses_no_processor", a_frozen_container_uses_no_processor),
        ("statistics_are_true", statistics_are_true),
        (
            "containers_that_want_everything_leave_the_others_some",
            containers_that_want_everything_leave_the_others_some,
        ),
    ];
    CORACLE.run_parts(tests);
}

fn docker(args: &[&str]) -> Finished {
    CORACLE.docker(args)
}

fn run(options: &[&str], script: &str) -> String {
    docker(&[&["run", "--rm", "--network", "none"], options, &["busybox", "sh", "-c", script]].concat())
        .text()
}

fn every_limit_is_a_file_of_the_cgroup() {
    let options = [
        "--memory=64m",
        "--memory-reservation=32m",
        "--memory-swap=96m",
        "--cpus=0.5",
        "--cpu-shares=512",
        "--cpuset-cpus=0",
        "--cpuset-mems=0",
        "--pids-limit=50",
        "--blkio-weight=500",
        "--device-read-bps=/dev/vda:1mb",
        "--device-write-iops=/dev/vda:100",
    ];
    let script = "cd /sys/fs/cgroup; cat memory.max memory.low memory.swap.max cpu.max cpu.weight cpuset.cpus cpuset.mems pids.max io.weight; cut -d' ' -f2- io.max";
    let seen = run(&options, script);
    let expected = "67108864\n33554432\n33554432\n50000 100000\n20\n0\n0\n50\ndefault 4950\nrbps=1048576 wbps=max riops=max wiops=100";
    assert_eq!(seen, expected);
    docker(&["run", "--rm", "--memory", "1m", "busybox"])
        .code(125)
        .says("Minimum memory limit allowed is 6MB");
}

fn limits_change_while_a_container_runs() {
    docker(&[
        "run",
        "-d",
        "--name",
        "limits",
        "--network",
        "none",
        "--memory",
        "64m",
        "busybox",
        "sleep",
        "1000",
    ])
    .ok();
    docker(&[
        "update",
        "--memory",
        "32m",
        "--memory-swap",
        "-1",
        "--pids-limit",
        "9",
        "--cpus",
        "0.25",
        "limits",
    ])
    .ok();
    let script = "cd /sys/fs/cgroup; cat memory.max memory.swap.max pids.max cpu.max";
    assert_eq!(docker(&["exec", "limits", "sh", "-c", script]).text(), "33554432\nmax\n9\n25000 100000");
    docker(&["rm", "-f", "limits"]).ok();
}

fn system_calls_are_filtered() {
    let script = "unshare -m true 2>/dev/null || echo no; mount -t tmpfs x /tmp 2>/dev/null || echo no; grep Seccomp: /proc/self/status";
    assert_eq!(run(&[], script), "no\nno\nSeccomp:\t2");
    let open = ["--security-opt", "seccomp=unconfined", "--cap-add", "SYS_ADMIN"];
    assert_eq!(
        run(&open, "unshare -m true && echo yes; grep Seccomp: /proc/self/status"),
        "yes\nSeccomp:\t0"
    );
    assert_eq!(run(&["--privileged"], "mount -t tmpfs x /tmp && echo yes"), "yes");
}

fn devices_are_ruled() {
    let disk = "mknod /tmp/disk b $(stat -c '0x%t 0x%T' /dev/vda 2>/dev/null || echo 254 0); dd if=/tmp/disk of=/dev/null bs=512 count=1 2>/dev/null && echo read";
    assert_eq!(run(&[], &format!("{disk}; echo x > /dev/null && echo null")), "null");
    let given = "dd if=/dev/vda of=/dev/null bs=512 count=1 2>/dev/null && echo read; (: > /dev/vda) 2>/dev/null || echo no write";
    assert_eq!(run(&["--device", "/dev/vda:/dev/vda:r"], given), "read\nno write");
    assert!(run(&["--privileged"], "ls /dev").contains("vda"));
    docker(&["run", "--rm", "--device", "/dev/nosuch", "busybox", "true"])
        .code(127)
        .says("error gathering device information");
}

fn a_frozen_container_uses_no_processor() {
    docker(&[
        "run",
        "-d",
        "--name",
        "frozen",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "while :; do :; done",
    ])
    .ok();
    let used = || {
        let told = docker(&["inspect", "-f", "{{.Id}}", "frozen"]).text();
        let format = "{{.CPUPerc}}";
        docker(&["stats", "--no-stream", "--format", format, &told]).text()
    };
    let busy: f64 = used().trim_end_matches('%').parse().unwrap();
    assert!(busy > 10.0, "{busy}");
    docker(&["pause", "frozen"]).ok();
    assert_eq!(used(), "0.00%");
    docker(&["exec", "frozen", "true"]).code(1).says("is paused");
    docker(&["unpause", "frozen"]).ok();
    docker(&["exec", "frozen", "true"]).ok();
    docker(&["pause", "frozen"]).ok();
    docker(&["rm", "-f", "frozen"]).ok();
}

fn statistics_are_true() {
    let script = "head -c 20m /dev/zero > /dev/shm/full; dd if=/dev/zero of=/written bs=1M count=8 2>/dev/null; sync; echo ready; exec sleep 1000";
    docker(&[
        "run",
        "-d",
        "--name",
        "counted",
        "--network",
        "none",
        "--memory",
        "100m",
        "busybox",
        "sh",
        "-c",
        script,
    ])
    .ok();
    while docker(&["logs", "counted"]).text() != "ready" {}
    let shown =
        docker(&["stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}} {{.BlockIO}}", "counted"])
            .text();
    let words: Vec<&str> = shown.split(' ').collect();
    let used: f64 = words[0].trim_end_matches("MiB").parse().unwrap();
    assert!((20.0..60.0).contains(&used) && words[2] == "100MiB" && words[3] == "1", "{shown}");
    assert_ne!(words[6], "0B", "{shown}");
    assert!(docker(&["top", "counted"]).text().contains("sleep 1000"));
    docker(&["rm", "-f", "counted"]).ok();
}

fn containers_that_want_everything_leave_the_others_some() {
    docker(&["run", "-d", "--name", "quiet", "--network", "none", "busybox", "sleep", "1000"]).ok();
    let hog = docker(&[
        "run",
        "--name",
        "hog",
        "--network",
        "none",
        "busybox",
        "awk",
        "BEGIN { s = \"hog\"; while (length(s) < 16000000) s = s s; while (1) all[n++] = s n }",
    ]);
    hog.code(137);
    assert_eq!(
        docker(&["inspect", "-f", "{{.State.OOMKilled}} {{.State.ExitCode}}", "hog"]).text(),
        "true 137"
    );
    assert_eq!(docker(&["exec", "quiet", "echo", "here"]).text(), "here");

    let bomb = "b() { b | b & }; b; sleep 1000";
    docker(&[
        "run",
        "-d",
        "--init",
        "--name",
        "bomb",
        "--network",
        "none",
        "--memory",
        "200m",
        // Unbounded, it is thousands, whose end takes the lab longer than the daemon waits.
        "--pids-limit",
        "400",
        "busybox",
        "sh",
        "-c",
        bomb,
    ])
    .ok();
    for _ in 0..3 {
        assert_eq!(docker(&["exec", "quiet", "echo", "here"]).text(), "here");
        assert_eq!(run(&[], "echo new"), "new");
    }
    docker(&["rm", "-f", "bomb", "hog", "quiet"]).ok();
}
