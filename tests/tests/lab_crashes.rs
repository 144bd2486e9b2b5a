//! Any process may die at any moment: what was acknowledged is there afterwards.

use std::{
    io::{BufRead, BufReader, Write},
    process::Stdio,
};

use coracle_tests::Installation;

#[test]
fn containers_outlive_a_killed_daemon() {
    let coracle = Installation::new().with_busybox();
    let count = "i=0; while read line; do [ $line = end ] && exit 5; i=$((i+1)); echo $i; done";
    coracle.docker(&["run", "-d", "-i", "--name", "counter", "busybox", "sh", "-c", count]).ok();
    coracle
        .docker(&[
            "run",
            "-d",
            "--name",
            "brief",
            "busybox",
            "sh",
            "-c",
            "read line </dev/null; sleep 2; echo done; exit 6",
        ])
        .ok();
    let vmm = coracle.vmm_pid();
    coracle.kill(coracle.daemon_pid());
    coracle.coracle(&["up"]).ok();
    assert_eq!(coracle.vmm_pid(), vmm, "the VM is the same");
    assert_eq!(coracle.docker(&["inspect", "--format", "{{.State.Status}}", "counter"]).text(), "running");
    // The exit of the other is known, whether it happened before or after the daemon came back, and its log is whole.
    assert_eq!(coracle.docker(&["wait", "brief"]).text(), "6");
    assert_eq!(coracle.docker(&["logs", "brief"]).text(), "done");
    // Streams can be attached again.
    let mut attach = coracle.command("docker");
    let mut attach =
        attach.args(["attach", "counter"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = attach.stdin.take().unwrap();
    let mut lines = BufReader::new(attach.stdout.take().unwrap()).lines();
    for number in ["1", "2", "3"] {
        input.write_all(b"a line\n").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), number);
    }
    // A daemon that dies is not the end of the container's input.
    coracle.kill(coracle.daemon_pid());
    assert!(lines.next().is_none(), "nobody is attached any more");
    attach.wait().unwrap();
    coracle.coracle(&["up"]).ok();
    let ended = coracle.docker_with_input(&["attach", "counter"], b"end\n");
    assert_eq!(ended.code, 5, "{}", ended.err());
    assert_eq!(coracle.docker(&["logs", "counter"]).text(), "1\n2\n3");
    coracle.docker(&["rm", "counter", "brief"]).ok();
}

#[test]
fn containers_of_a_killed_vm_are_exited_and_can_be_started_again() {
    let coracle = Installation::new().with_busybox();
    coracle
        .docker(&["run", "-d", "--name", "victim", "busybox", "sh", "-c", "echo alive; exec sleep 1000"])
        .ok();
    let mut logs =
        coracle.command("docker").args(["logs", "-f", "victim"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(logs.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "alive");
    let wait = coracle.command("docker").args(["wait", "victim"]).stdout(Stdio::piped()).spawn().unwrap();
    coracle.kill(coracle.vmm_pid());
    assert_eq!(wait.wait_with_output().unwrap().stdout, b"255\n");
    assert!(lines.next().is_none(), "the log ends");
    logs.wait().unwrap();
    let state =
        coracle.docker(&["inspect", "--format", "{{.State.Status}} {{.State.Error}}", "victim"]).text();
    assert!(state.starts_with("exited ") && state.len() > 20, "{state}");
    coracle.docker(&["start", "victim"]).ok();
    assert_eq!(coracle.docker(&["exec", "victim", "echo", "again"]).text(), "again");
    coracle.docker(&["rm", "-f", "victim"]).ok();
    assert_eq!(coracle.docker(&["run", "--rm", "busybox", "echo", "hello"]).text(), "hello");
}

#[test]
fn a_daemon_and_vm_killed_together_leave_exited_containers() {
    let coracle = Installation::new().with_busybox();
    coracle.docker(&["run", "-d", "--name", "both", "busybox", "sleep", "1000"]).ok();
    let (daemon, vmm) = (coracle.daemon_pid(), coracle.vmm_pid());
    coracle.kill(daemon);
    coracle.kill(vmm);
    assert_eq!(coracle.docker(&["ps", "-q"]).code, 1, "nobody listens");
    coracle.coracle(&["up"]).ok();
    assert_eq!(coracle.docker(&["inspect", "--format", "{{.State.Status}}", "both"]).text(), "exited");
    coracle.docker(&["start", "both"]).ok();
    coracle.docker(&["rm", "-f", "both"]).ok();
}
