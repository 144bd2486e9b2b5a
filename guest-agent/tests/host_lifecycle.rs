//! Many at once, and what is left behind: nothing.

mod support;

use std::path::{Path, PathBuf};

use coracle_agent_api::AgentState;
use support::{Image, TestAgent, container, new_id, process, shell};

fn mount_count(pid: u32) -> usize {
    std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().lines().count()
}

fn children(pid: u32) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(str::to_owned).collect()
}

fn fd_count(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The agent's group of containers, seen through its own mounts.
fn cgroup(agent: &TestAgent) -> PathBuf {
    let pid = agent.pid();
    let run = agent.data().join("run/cgroup");
    PathBuf::from(format!("/proc/{pid}/root{}/coracle-{pid}", run.display()))
}

/// How many containers have a group.
fn groups(path: &Path) -> usize {
    let entries = std::fs::read_dir(path).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().file_name().len() == 64).count()
}

#[tokio::test]
async fn fifty_at_once_all_run_and_leave_nothing() {
    let agent = TestAgent::start().await;
    agent.run(&container(&[Image::busybox()], process(&["true"]))).await.unwrap();
    let before = (mount_count(agent.pid()), children(agent.pid()).len());
    let runs = (0..50).map(|number| {
        let spec = container(&[Image::busybox()], shell(&format!("echo {number}; exit {number}")));
        let agent = &agent;
        async move {
            let output = agent.run(&spec).await.unwrap();
            assert_eq!((output.text(), output.code()), (format!("{number}\n"), number));
        }
    });
    futures_util::future::join_all(runs).await;
    // A start of the same container waits until everything of its last run is gone.
    let state: AgentState = agent.get("/v1/state").await.unwrap();
    assert!(state.processes.is_empty());
    let id = new_id();
    for _ in 0..2 {
        agent.start_container(&id, &container(&[Image::busybox()], process(&["true"]))).await.unwrap();
        agent.output(&id).await;
        agent.delete(&format!("/v1/processes/{id}")).await.unwrap();
    }
    assert_eq!((mount_count(agent.pid()), children(agent.pid()).len()), before);
    agent.shut_down().await;
}

#[tokio::test]
async fn descriptors_do_not_grow_with_the_number_of_runs() {
    let agent = TestAgent::start().await;
    let spec = container(&[Image::busybox()], process(&["true"]));
    let id = new_id();
    let mut counts = Vec::new();
    for _ in 0..20 {
        agent.start_container(&id, &spec).await.unwrap();
        agent.output(&id).await;
        agent.delete(&format!("/v1/processes/{id}")).await.unwrap();
        counts.push(fd_count(agent.pid()));
    }
    // What the last run holds is given back in the background: a few more or less, but no growth.
    assert!(counts[19] <= counts[1] + 8, "{counts:?}");
}

#[tokio::test]
async fn a_shutdown_kills_what_runs_and_leaves_nothing() {
    let agent = TestAgent::start().await;
    let mut pids = Vec::new();
    for _ in 0..3 {
        let spec = container(&[Image::busybox()], shell("trap '' TERM; sleep 1000 & sleep 1000"));
        pids.push(agent.start_container(&new_id(), &spec).await.unwrap().pid);
    }
    assert_eq!(groups(&cgroup(&agent)), 3);
    let (agent_pid, run) = (agent.pid(), agent.data().join("run"));
    let group = format!("coracle-{agent_pid}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let cgroup2 = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let cgroup2 = Path::new(cgroup2.expect("cgroup2 is mounted").split(' ').nth(1).unwrap()).to_owned();
    assert!(cgroup2.join(&group).exists());
    agent.shut_down().await;
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
    assert!(!cgroup2.join(&group).exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(run.to_str().unwrap()));
}

#[tokio::test]
async fn containers_die_with_an_agent_that_is_killed() {
    let agent = TestAgent::start().await;
    let mut spec = container(&[Image::busybox()], process(&["sleep", "1000"]));
    spec.process.user = "web".to_owned();
    let started = agent.start_container(&new_id(), &spec).await.unwrap();
    let pid = rustix::process::Pid::from_raw(started.pid as i32).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    agent.kill().await;
    // Readable when the process has ended; a minute is for ever here.
    let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let minute = rustix::time::Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&minute)).unwrap(), 1);
}

#[tokio::test]
async fn connections_beyond_the_number_of_descriptors_wait_for_their_turn() {
    let agent = TestAgent::start().await;
    let pid = rustix::process::Pid::from_raw(agent.pid() as i32);
    let limit = rustix::process::Rlimit { current: Some(100), maximum: Some(100) };
    rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
    let api = agent.data().parent().unwrap().join("api");
    let mut held = Vec::new();
    for _ in 0..150 {
        held.push(tokio::net::UnixStream::connect(&api).await.unwrap());
    }
    let state = agent.get::<AgentState>("/v1/state");
    tokio::pin!(state);
    assert!(tokio::time::timeout(std::time::Duration::from_millis(200), &mut state).await.is_err());
    drop(held);
    assert!(state.await.unwrap().processes.is_empty());
}

#[tokio::test]
async fn orphans_are_reaped() {
    let agent = TestAgent::start().await;
    let id = new_id();
    agent.start_container(&id, &container(&[Image::busybox()], process(&["sleep", "1000"]))).await.unwrap();
    // The shell ends before its children do; in a container they belong to its first process, which is no reaper.
    let exec = agent.exec(&id, shell("sleep 0.05 & sleep 0.05 & exit 0")).await.unwrap();
    agent.output(&exec).await;
    agent.signal(&id, libc::SIGKILL).await.unwrap();
    agent.output(&id).await;
    let left = children(agent.pid());
    assert_eq!(left.len(), 1, "only the fork server: {left:?}");
}

#[tokio::test]
async fn the_kernels_log_can_be_read() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let agent = TestAgent::start().await;
    let (status, now) = agent.raw(http::Method::GET, "/v1/kmsg?follow=0", Vec::new()).await;
    assert!(status.is_success() && now.starts_with(b"["), "{status}");
    // Followed, it goes on with what comes.
    let api = agent.data().parent().unwrap().join("api");
    let mut stream = tokio::net::UnixStream::connect(api).await.unwrap();
    stream.write_all(b"GET /v1/kmsg HTTP/1.1\r\nHost: agent\r\n\r\n").await.unwrap();
    let line = format!("a test of the agent says {}", agent.pid());
    // The kernel holds a line back until it ends.
    std::fs::write("/dev/kmsg", format!("{line}\n")).unwrap();
    let mut text = String::new();
    while !text.contains(&line) {
        let mut buffer = [0; 4096];
        let len = stream.read(&mut buffer).await.unwrap();
        assert!(len > 0);
        text.push_str(&String::from_utf8_lossy(&buffer[..len]));
    }
}
