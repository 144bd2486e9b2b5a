//! A machine that runs already, played by a thread behind a control socket: taken over, given layers, lost.

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    sync::mpsc,
    thread,
};

use coracle_agent_api::READY_PORT;
use coracle_vmm::control::{
    self, Answer, BootTimes, Event, ExitCounts, FromClient, FromVmm, MachineState, Outcome, Received, Reply,
    Request, Status, VsockCounts,
};

use super::*;

/// What the machine was asked to do.
type Asked = mpsc::Receiver<Request>;

/// Listens in the folder of the machine `default` and serves one client as a running machine would.
fn running_machine(home: &Home) -> Asked {
    let folder = Folder::new(home.vms().join("default"));
    folder.create().unwrap();
    let listener = folder.listen().unwrap();
    let (tell, asked) = mpsc::channel();
    thread::spawn(move || {
        let client = control::accept(listener.as_fd()).unwrap();
        rustix::io::ioctl_fionbio(&client, false).unwrap();
        let (host, _guest) = StdUnixStream::pair().unwrap();
        let mut announced = false;
        while let Ok(Received::Message(bytes, mut fds)) = control::receive(&client) {
            let FromClient { id, request } = serde_json::from_slice(&bytes).unwrap();
            send(&client, &FromVmm::Reply(Reply { id, outcome: answer(&request) }), &[]);
            match &request {
                Request::VsockListen(_) if !announced => {
                    announced = true;
                    let event = Event::VsockAccepted { port: READY_PORT, guest_port: 1 };
                    send(&client, &FromVmm::Event(event), &[&host]);
                }
                Request::VsockConnect(_) => agent(fds.pop().unwrap()),
                _ => {}
            }
            if tell.send(request).is_err() {
                return;
            }
        }
    });
    asked
}

fn send(client: &OwnedFd, message: &FromVmm, fds: &[&StdUnixStream]) {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    control::send(client, &serde_json::to_vec(message).unwrap(), &fds).unwrap();
}

fn answer(request: &Request) -> Outcome {
    match request {
        Request::Status => Outcome::Ok(Answer::Status(Box::new(Status {
            state: MachineState::Running,
            vcpus: 1,
            memory_mib: 64,
            exits: ExitCounts::default(),
            vsock: VsockCounts::default(),
            times: BootTimes::default(),
        }))),
        Request::AttachSegment(segment) if segment.len > 1 << 20 => Outcome::Error("too large".to_owned()),
        _ => Outcome::Ok(Answer::Done),
    }
}

/// An agent that answers anything with an empty state.
fn agent(stream: OwnedFd) {
    thread::spawn(move || {
        let mut stream = StdUnixStream::from(stream);
        let _ = stream.read(&mut [0; 1024]);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
    });
}

fn hello() -> coracle_agent_api::Hello {
    coracle_agent_api::Hello {
        api_version: coracle_agent_api::API_VERSION,
        agent_version: "1".to_owned(),
        kernel_release: "6".to_owned(),
        phases: Vec::new(),
    }
}

/// A home in a folder of its own, with what an earlier daemon left of its machine.
fn home(folder: &tempfile::TempDir) -> Home {
    let home = Home::at(folder.path());
    let machine = Folder::new(home.vms().join("default"));
    machine.create().unwrap();
    let boot = vec![("agent-ready".to_owned(), 7)];
    let record = BootRecord { pid: 1, file_server_pid: None, started_micros: 0, hello: Some(hello()), boot };
    machine.save_boot(&record).unwrap();
    home
}

/// A file server of the machine `default` that serves it already and has these grants. It ends when the sender is dropped.
fn running_file_server(home: &Home, grants: &[&str]) -> mpsc::Sender<()> {
    use coracle_file_server::control::{self, Answer, FromClient, Outcome, Owners, Reply, Request, Status};
    let folder = Folder::new(home.vms().join("default"));
    let listener = folder.listen_for_files().unwrap();
    let grant = |name: &&str| control::Grant {
        id: control::GrantId::try_from((*name).to_owned()).unwrap(),
        kind: control::GrantKind::Directory,
        read_only: false,
        owners: Owners::Real,
    };
    let mut grants: Vec<_> = grants.iter().map(grant).collect();
    let (end, ended) = mpsc::channel();
    thread::spawn(move || {
        let client = control::accept(listener.as_fd()).unwrap();
        rustix::io::ioctl_fionbio(&client, false).unwrap();
        let to_end = client.try_clone().unwrap();
        thread::spawn(move || {
            let _ = ended.recv();
            let _ = rustix::net::shutdown(&to_end, rustix::net::Shutdown::Both);
        });
        while let Ok(Received::Message(bytes, _)) = control::receive(&client) {
            let FromClient { id, request } = serde_json::from_slice(&bytes).unwrap();
            let outcome = match request {
                Request::Grant(grant) => {
                    grants.push(grant);
                    Outcome::Ok(Answer::Done)
                }
                Request::Revoke(revoke) => match grants.iter().position(|grant| grant.id == revoke.id) {
                    Some(index) => {
                        grants.remove(index);
                        Outcome::Ok(Answer::Done)
                    }
                    None => Outcome::Error("it is not granted".to_owned()),
                },
                Request::Status => {
                    let (grants, nodes) = (grants.clone(), 0);
                    Outcome::Ok(Answer::Status(Status {
                        serving: true,
                        namespaces: true,
                        grants,
                        nodes,
                        open: 0,
                    }))
                }
                Request::Serve => Outcome::Error("a machine is served already".to_owned()),
            };
            let reply = serde_json::to_vec(&Reply { id, outcome }).unwrap();
            control::send(&client, &reply, &[]).unwrap();
        }
    });
    end
}

fn tree(name: &str, read_only: bool) -> TreeGrant {
    let name = name.parse().unwrap();
    TreeGrant { name, kind: coracle_engine::sandbox::TreeKind::Directory, read_only }
}

fn open(path: &Path) -> OwnedFd {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
}

fn id(n: u8) -> DiffId {
    format!("{n:064x}").parse().unwrap()
}

#[tokio::test]
async fn a_running_machine_is_taken_over_with_its_layers() {
    let folder = tempfile::tempdir().unwrap();
    let home = home(&folder);
    let record = Layers::record_in(&home.vms().join("default"));
    let mut layers = Layers::fresh(record).unwrap();
    let there = layers.reserve(&id(1), 4096).unwrap();
    layers.settle(&id(1)).unwrap();
    let unfinished = layers.reserve(&id(2), 4096).unwrap();
    let asked = running_machine(&home);

    let sandbox = Vms::new(home.clone()).sandbox(&SandboxId::shared());
    let running = sandbox.adopt().await.unwrap().expect("a machine runs");
    assert!(running.adopted && running.hello.is_some() && running.boot.len() == 1);
    let requests: Vec<_> = asked.try_iter().collect();
    let detached = control::DetachSegment { offset: unfinished.start };
    assert!(requests.contains(&Request::DetachSegment(detached)), "{requests:?}");

    let image = folder.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    assert_eq!(sandbox.attach_layer(&id(1), &image, 4096).await.unwrap(), there.source());
    let new = sandbox.attach_layer(&id(2), &image, 4096).await.unwrap();
    assert_eq!(new, unfinished.source());
    assert!(
        sandbox.attach_layer(&id(3), &image, 2 << 20).await.unwrap_err().to_string().contains("too large")
    );
    assert!(sandbox.attach_layer(&id(4), &folder.path().join("none"), 4096).await.is_err());
    sandbox.detach_layer(&id(2)).await.unwrap();
    assert_eq!(sandbox.attach_layer(&id(5), &image, 4096).await.unwrap(), new, "the place is free again");
}

#[tokio::test]
async fn a_machine_that_is_lost_has_died_and_leaves_only_its_disk_and_logs() {
    let folder = tempfile::tempdir().unwrap();
    let home = home(&folder);
    let asked = running_machine(&home);
    let sandbox = Vms::new(home.clone()).sandbox(&SandboxId::shared());
    sandbox.adopt().await.unwrap().expect("a machine runs");
    let mut state = sandbox.state();
    // The machine's thread ends with its next request, because nobody listens to it any more.
    drop(asked);
    let _ = sandbox.connect().await;
    state.wait_for(|state| matches!(state, SandboxState::Died { .. })).await.unwrap();
    assert!(matches!(sandbox.connect().await, Err(SandboxError::NotRunning { .. })));
    // Whoever starts it now waits until the old one is cleared away.
    assert!(sandbox.adopt().await.unwrap().is_none());
    assert_eq!(fs::read_dir(home.vms().join("default")).unwrap().count(), 0);
}

#[tokio::test]
async fn where_no_machine_runs_none_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let sandbox = Vms::new(Home::at(folder.path())).sandbox(&SandboxId::shared());
    assert!(sandbox.adopt().await.unwrap().is_none());
    assert!(sandbox.attach_layer(&id(1), folder.path(), 4096).await.is_err());
    sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn a_running_machine_is_taken_over_with_its_grants_and_outlives_its_file_server() {
    let folder = tempfile::tempdir().unwrap();
    let home = home(&folder);
    let _asked = running_machine(&home);
    let server = running_file_server(&home, &["from-before"]);
    let sandbox = Vms::new(home.clone()).sandbox(&SandboxId::shared());
    sandbox.adopt().await.unwrap().expect("a machine runs");

    let source = sandbox.grant(&tree("new", true), open(folder.path())).await.unwrap();
    assert_eq!(source, TreeSource::Shared { name: "new".parse().unwrap() });
    let names = async || {
        let mut names: Vec<_> = sandbox.grants().await.unwrap().iter().map(ToString::to_string).collect();
        names.sort();
        names
    };
    assert_eq!(names().await, ["from-before", "new"]);
    for _ in 0..2 {
        sandbox.revoke(&"from-before".parse().unwrap()).await.unwrap();
    }
    assert_eq!(names().await, ["new"]);

    drop(server);
    let mut state = sandbox.state();
    let lost = |state: &SandboxState| state.running().and_then(|running| running.lost.clone());
    let now = state.wait_for(|state| lost(state).is_some()).await.unwrap().clone();
    assert!(lost(&now).unwrap().contains("its file server has ended"), "{now:?}");
    let error = sandbox.grant(&tree("new", true), open(folder.path())).await.unwrap_err().to_string();
    assert!(error.contains("coracle down"), "{error}");
    assert!(sandbox.grants().await.unwrap().is_empty());
    sandbox.revoke(&"new".parse().unwrap()).await.unwrap();
    // Everything else goes on.
    sandbox.connect().await.unwrap();
}

#[tokio::test]
async fn a_machine_whose_file_server_is_gone_is_taken_over_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let home = home(&folder);
    let _asked = running_machine(&home);
    let sandbox = Vms::new(home.clone()).sandbox(&SandboxId::shared());
    sandbox.adopt().await.unwrap().expect("a machine runs");
    let mut state = sandbox.state();
    let is_lost = |state: &SandboxState| state.running().is_some_and(|running| running.lost.is_some());
    state.wait_for(is_lost).await.unwrap();
    assert!(sandbox.grant(&tree("new", false), open(folder.path())).await.is_err());
    sandbox.connect().await.unwrap();
}
