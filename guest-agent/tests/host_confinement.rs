//! What containers share and which devices they may use.

mod support;

use coracle_agent_api::*;
use support::{Image, TestAgent, container, new_id, process, shell};

const ALL: DeviceAccess = DeviceAccess { read: true, write: true, mknod: true };

async fn started(agent: &TestAgent, change: impl FnOnce(&mut ContainerSpec)) -> ProcessId {
    let id = new_id();
    let mut spec = container(&[Image::busybox()], process(&["sleep", "1000"]));
    change(&mut spec);
    agent.start_container(&id, &spec).await.unwrap();
    id
}

async fn output_of(agent: &TestAgent, script: &str, change: impl FnOnce(&mut ContainerSpec)) -> String {
    let mut spec = container(&[Image::busybox()], shell(script));
    change(&mut spec);
    let output = agent.run(&spec).await.unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    output.text()
}

async fn in_container(agent: &TestAgent, id: &ProcessId, script: &str) -> String {
    let exec = agent.exec(id, shell(script)).await.unwrap();
    agent.output(&exec).await.text()
}

/// Whether this machine's kernel takes rules for devices: then a node in a container opens what the rules allow.
async fn devices_are_ruled(agent: &TestAgent) -> bool {
    let mounts = output_of(agent, "grep ' /dev tmpfs' /proc/mounts", |_| {}).await;
    !mounts.contains("nodev")
}

#[tokio::test]
async fn nodes_open_only_the_devices_that_were_given() {
    let agent = TestAgent::start().await;
    // The kernel's memory, and null by another name.
    let script = "mknod /tmp/mem c 1 1; mknod /tmp/null c 1 3; for n in mem null; do (: < /tmp/$n) 2>/dev/null && echo $n; done;
        echo x > /dev/null && head -c 2 /dev/zero | wc -c; true";
    let expected = if devices_are_ruled(&agent).await { "null\n2\n" } else { "2\n" };
    assert_eq!(output_of(&agent, script, |_| {}).await, expected);
}

#[tokio::test]
async fn a_device_is_given_with_what_may_be_done_with_it() {
    let agent = TestAgent::start().await;
    let control = |access| {
        move |spec: &mut ContainerSpec| {
            let (source, path) = ("/dev/loop-control".to_owned(), "/dev/given/control".to_owned());
            spec.devices = vec![Device { source, path, access }];
        }
    };
    let missing = Device { source: "/dev/no-such".to_owned(), path: "/dev/x".to_owned(), access: ALL };
    let mut spec = container(&[Image::busybox()], process(&["true"]));
    spec.devices = vec![missing];
    let error = agent.start_container(&new_id(), &spec).await.unwrap_err();
    let words = "error gathering device information while adding custom device \"/dev/no-such\": no such file or directory";
    assert_eq!(error.message, words);
    spec.devices =
        vec![Device { source: "/dev/../etc/passwd".to_owned(), path: "/x".to_owned(), access: ALL }];
    assert_eq!(agent.start_container(&new_id(), &spec).await.unwrap_err().kind, ErrorKind::Invalid);
    if !devices_are_ruled(&agent).await {
        spec.devices.clear();
        control(ALL)(&mut spec);
        let error = agent.start_container(&new_id(), &spec).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
        return;
    }
    let script = "stat -c %t:%T /dev/given/control; (: < /dev/given/control) 2>/dev/null && echo r; (: > /dev/given/control) 2>/dev/null && echo w; true";
    assert_eq!(output_of(&agent, script, control(ALL)).await, "a:ed\nr\nw\n");
    let read = DeviceAccess { read: true, write: false, mknod: false };
    assert_eq!(output_of(&agent, script, control(read)).await, "a:ed\nr\n");
    let rule = |spec: &mut ContainerSpec| {
        spec.device_rules =
            vec![DeviceRule { kind: DeviceKind::Char, major: Some(10), minor: Some(237), access: read }];
    };
    let script =
        "mknod /tmp/log c 10 237; (: < /tmp/log) && echo r; (: >> /tmp/log) 2>/dev/null || echo no; true";
    assert_eq!(output_of(&agent, script, rule).await, "r\nno\n");
}

#[tokio::test]
async fn a_privileged_container_has_all_devices_and_capabilities_and_a_writable_sys() {
    let agent = TestAgent::start().await;
    let script = "[ -c /dev/kmsg ] && (: < /dev/kmsg) && echo kmsg; grep -c ' /sys sysfs rw' /proc/mounts;
        grep -c ' /sys/fs/cgroup cgroup2 rw' /proc/mounts; mkdir /sys/fs/cgroup/mine && echo group; grep CapEff /proc/self/status";
    let privileged = |spec: &mut ContainerSpec| {
        spec.privileged = true;
        spec.seccomp = Seccomp::Unconfined;
    };
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap();
    let seen = output_of(&agent, script, privileged).await;
    assert_eq!(seen, format!("kmsg\n1\n1\ngroup\nCapEff:{own}\n"));
    agent.shut_down().await;
}

#[tokio::test]
async fn containers_share_memory_only_with_those_that_may_join() {
    let agent = TestAgent::start().await;
    let donor = started(&agent, |spec| spec.ipc = IpcMode::Shareable).await;
    in_container(&agent, &donor, "echo shared > /dev/shm/note").await;
    let joins = |donor: &ProcessId| {
        let donor = donor.clone();
        move |spec: &mut ContainerSpec| spec.ipc = IpcMode::Container(donor)
    };
    let namespace = in_container(&agent, &donor, "readlink /proc/self/ns/ipc").await;
    let script = "cat /dev/shm/note; readlink /proc/self/ns/ipc; echo back > /dev/shm/answer";
    assert_eq!(output_of(&agent, script, joins(&donor)).await, format!("shared\n{namespace}"));
    assert_eq!(in_container(&agent, &donor, "cat /dev/shm/answer").await, "back\n");

    let private = started(&agent, |_| {}).await;
    let mut spec = container(&[Image::busybox()], process(&["true"]));
    joins(&private)(&mut spec);
    let error = agent.start_container(&new_id(), &spec).await.unwrap_err();
    assert!(
        error.kind == ErrorKind::Conflict && error.message.contains("not shareable"),
        "{}",
        error.message
    );
    joins(&new_id())(&mut spec);
    assert_eq!(agent.start_container(&new_id(), &spec).await.unwrap_err().kind, ErrorKind::NotFound);

    assert_eq!(
        output_of(&agent, "ls /dev/shm 2>&1 | wc -l; ls /dev | grep -c shm; true", |spec| spec.ipc =
            IpcMode::None)
        .await,
        "1\n0\n"
    );
    let own = std::fs::read_link("/proc/self/ns/ipc").unwrap();
    let host = output_of(&agent, "readlink /proc/self/ns/ipc", |spec| spec.ipc = IpcMode::Host).await;
    assert_eq!(host.trim(), own.to_str().unwrap());
    // The donor's end leaves the memory to those who have it.
    agent.signal(&donor, 9).await.unwrap();
    agent.output(&donor).await;
    agent.shut_down().await;
}

#[tokio::test]
async fn containers_see_the_processes_of_the_one_they_join_and_end_with_it() {
    let agent = TestAgent::start().await;
    let donor = started(&agent, |_| {}).await;
    let joined = started(&agent, |spec| spec.pid = PidMode::Container(donor.clone())).await;
    assert_eq!(in_container(&agent, &joined, "cat /proc/1/cmdline | tr '\\0' ' '").await, "sleep 1000 ");
    let same = "readlink /proc/self/ns/pid";
    assert_eq!(in_container(&agent, &joined, same).await, in_container(&agent, &donor, same).await);
    agent.signal(&donor, 9).await.unwrap();
    assert_eq!(agent.output(&joined).await.code(), 137);

    // All of the machine's, and what it leaves behind goes with it.
    let script = format!("[ -d /proc/{} ] && echo seen; sleep 1234 & echo $!", agent.pid());
    let output = output_of(&agent, &script, |spec| spec.pid = PidMode::Host).await;
    let (seen, left) = output.trim().split_once('\n').unwrap();
    assert_eq!(seen, "seen");
    let cmdline = std::path::PathBuf::from(format!("/proc/{left}/cmdline"));
    agent.shut_down().await;
    assert!(!std::fs::read(cmdline).is_ok_and(|bytes| bytes.starts_with(b"sleep\x001234")));
}

#[tokio::test]
async fn a_containers_own_groups_are_no_more_than_can_be_removed() {
    let agent = TestAgent::start().await;
    let id = started(&agent, |spec| spec.cgroup_parent = "team".to_owned()).await;
    let group = agent.cgroup().join("team").join(id.as_str());
    let deep = std::iter::repeat_n("g", 33).collect::<Vec<_>>().join("/");
    assert!(std::fs::create_dir_all(group.join(&deep)).is_err());
    std::fs::create_dir_all(group.join(deep.strip_suffix("/g").unwrap())).unwrap();
    agent.signal(&id, 9).await.unwrap();
    agent.output(&id).await;
    agent.delete(&format!("/v1/processes/{id}")).await.unwrap();
    // It waits until nothing is left of the container.
    agent.delete(&format!("/v1/networks/{id}")).await.unwrap();
    assert!(!agent.cgroup().join("team").exists());
    // Two come and go at a time, with the same parent.
    let run = async || {
        for _ in 0..10 {
            output_of(&agent, "true", |spec| spec.cgroup_parent = "team".to_owned()).await;
        }
    };
    tokio::join!(run(), run(), run());
}

#[tokio::test]
async fn names_groups_and_parameters_can_be_the_machines_or_the_containers_own() {
    let agent = TestAgent::start().await;
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    assert_eq!(output_of(&agent, "hostname", |spec| spec.host_uts = true).await.trim(), name);
    let path = output_of(&agent, "cat /proc/self/cgroup", |spec| spec.host_cgroups = true).await;
    assert!(path.contains("0::/coracle-"), "{path}");
    let parent = |spec: &mut ContainerSpec| {
        spec.host_cgroups = true;
        spec.cgroup_parent = "/team/web".to_owned();
    };
    let path = output_of(&agent, "cat /proc/self/cgroup", parent).await;
    assert!(path.contains("/team/web/"), "{path}");
    let sysctls = |spec: &mut ContainerSpec| {
        for (name, value) in
            [("net.ipv4.ip_forward", "1"), ("kernel.shmmax", "123456"), ("fs.mqueue.msg_max", "20")]
        {
            spec.sysctls.insert(name.to_owned(), value.to_owned());
        }
    };
    let script = "cd /proc/sys; cat net/ipv4/ip_forward kernel/shmmax fs/mqueue/msg_max";
    assert_eq!(output_of(&agent, script, sysctls).await, "1\n123456\n20\n");
    // What cannot be started leaves no group behind.
    let mut spec = container(&[Image::busybox()], process(&["true"]));
    spec.cgroup_parent = "/team/web".to_owned();
    spec.network = Network::Container(new_id());
    assert_eq!(agent.start_container(&new_id(), &spec).await.unwrap_err().kind, ErrorKind::NotFound);
    let left = std::fs::read_dir(agent.cgroup()).unwrap().flatten().filter(|entry| entry.path().is_dir());
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["helpers"]);
    for shared in [Network::Host, Network::Container(started(&agent, |_| {}).await)] {
        let mut spec = container(&[Image::busybox()], process(&["true"]));
        spec.network = shared;
        spec.sysctls.insert("net.ipv4.ip_forward".to_owned(), "1".to_owned());
        let error = agent.start_container(&new_id(), &spec).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid, "{}", error.message);
    }
    for (name, parent) in [
        ("kernel.core_pattern", ""),
        ("net.ipv4/../../kernel.core_pattern", ""),
        ("vm.swappiness", ""),
        ("", "../elsewhere"),
        ("", "cgroup.procs"),
        ("", "/helpers"),
        ("", "helpers/web"),
    ] {
        let mut spec = container(&[Image::busybox()], process(&["true"]));
        if !name.is_empty() {
            spec.sysctls.insert(name.to_owned(), "1".to_owned());
        }
        spec.cgroup_parent = parent.to_owned();
        let error = agent.start_container(&new_id(), &spec).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid, "{name}{parent}: {}", error.message);
    }
    agent.shut_down().await;
}
