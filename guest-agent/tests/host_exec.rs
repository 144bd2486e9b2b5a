//! Further processes in a running container.

mod support;

use coracle_agent_api::frame::Kind;
use coracle_agent_api::{ErrorKind, ExecSpec, ProcessId};
use support::{Image, TestAgent, container, new_id, process, shell};

async fn sleeper(agent: &TestAgent) -> ProcessId {
    let id = new_id();
    agent.start_container(&id, &container(&[Image::busybox()], process(&["sleep", "1000"]))).await.unwrap();
    id
}

#[tokio::test]
async fn an_exec_is_in_all_namespaces_and_the_cgroup() {
    let agent = TestAgent::start().await;
    let id = sleeper(&agent).await;
    let script = "hostname; echo made > /tmp/made; for n in pid mnt uts ipc net cgroup; do
        [ $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) ] || echo other $n; done; grep ^0: /proc/self/cgroup; exit 5";
    let exec = agent.exec(&id, shell(script)).await.unwrap();
    let output = agent.output(&exec).await;
    assert_eq!((output.text().as_str(), output.code()), ("box\n0::/\n", 5));
    let mut second = shell("id -u; pwd; cat made");
    second.user = "web".to_owned();
    second.cwd = "/tmp".to_owned();
    let exec = agent.exec(&id, second).await.unwrap();
    assert_eq!(agent.output(&exec).await.text(), "33\n/tmp\nmade\n");
}

#[tokio::test]
async fn an_exec_fails_with_the_reason() {
    let agent = TestAgent::start().await;
    let id = sleeper(&agent).await;
    let error = agent.exec(&id, process(&["nope"])).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::CommandNotFound);
    let mut missing = process(&["true"]);
    missing.cwd = "/no/such".to_owned();
    let error = agent.exec(&id, missing).await.unwrap_err();
    assert_eq!(
        error.message,
        "chdir to cwd (\"/no/such\") set in config.json failed: no such file or directory"
    );
    assert_eq!(agent.exec(&new_id(), process(&["true"])).await.unwrap_err().kind, ErrorKind::NotFound);
    agent.signal(&id, libc::SIGKILL).await.unwrap();
    agent.output(&id).await;
    assert_eq!(agent.exec(&id, process(&["true"])).await.unwrap_err().kind, ErrorKind::Conflict);
}

#[tokio::test]
async fn a_privileged_exec_has_every_capability_of_the_agent() {
    let agent = TestAgent::start().await;
    let container = sleeper(&agent).await;
    let id = new_id();
    let spec = ExecSpec { container, process: shell("grep CapEff /proc/self/status"), privileged: true };
    agent.post(&format!("/v1/execs/{id}"), &spec).await.unwrap();
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("CapPrm")).unwrap().replace("CapPrm", "CapEff");
    assert_eq!(agent.output(&id).await.text().trim(), own);
}

#[tokio::test]
async fn execs_die_with_their_container() {
    let agent = TestAgent::start().await;
    let id = sleeper(&agent).await;
    let exec = agent.exec(&id, process(&["sleep", "1000"])).await.unwrap();
    agent.signal(&id, libc::SIGKILL).await.unwrap();
    assert_eq!(agent.output(&id).await.code(), 137);
    assert_eq!(agent.output(&exec).await.code(), 137);
}

#[tokio::test]
async fn the_exit_is_told_while_a_background_process_holds_the_output() {
    let agent = TestAgent::start().await;
    let id = sleeper(&agent).await;
    let script = "(read x < /tmp/go; echo late) & echo early";
    agent.output(&agent.exec(&id, process(&["mkfifo", "/tmp/go"])).await.unwrap()).await;
    let exec = agent.exec(&id, shell(script)).await.unwrap();
    let mut stream = agent.open_output(&exec, 0).await;
    let mut output = support::Output::default();
    while output.exit.is_none() {
        let (header, payload) = support::next_frame(&mut stream).await.unwrap();
        output.add(header, &payload);
    }
    agent.output(&agent.exec(&id, shell("echo > /tmp/go")).await.unwrap()).await;
    drop(stream);
    let output = agent.output(&exec).await;
    assert_eq!(output.text(), "early\nlate\n");
    let kinds: Vec<_> = output.frames.iter().map(|frame| frame.kind).collect();
    assert_eq!(kinds.last(), Some(&Kind::End));
    let exit = kinds.iter().position(|kind| *kind == Kind::Exit).unwrap();
    assert!(kinds[exit..].contains(&Kind::Stdout));
}
