//! Clients that others wrote, besides the docker CLI: Compose, docker-py and bollard, each with what its users do every day.

use std::{fs, process::Command};

use bollard::{
    API_DEFAULT_VERSION, Docker,
    container::LogOutput,
    exec::StartExecResults,
    models::{ContainerCreateBody, ExecConfig, HostConfig},
    query_parameters::{
        CreateContainerOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptions, StartContainerOptions,
        WaitContainerOptions,
    },
};
use coracle_tests::{Finished, Installation, run, workspace};
use futures_util::StreamExt;

const SERVICES: &str = r#"
version: "2.4"
services:
  page:
    image: busybox
    command: ["sh", "-c", "mkdir /www && echo ahoy > /www/index.html && exec busybox httpd -f -p 80 -h /www"]
    environment: { COLOUR: "red" }
    ports: ["127.0.0.1:18090:80"]
    volumes: ["kept:/kept"]
  reader:
    image: busybox
    command: ["sh", "-c", "until busybox wget -q -O - http://page/; do sleep 0.2; done"]
    depends_on: [page]
volumes:
  kept: {}
"#;

#[test]
fn compose_brings_services_up_that_find_each_other() {
    let coracle = Installation::new().with_busybox();
    let folder = coracle.scratch().join("site");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("docker-compose.yml"), SERVICES).unwrap();
    let compose = |args: &[&str]| -> Finished {
        let mut command: Command = coracle.command("docker-compose");
        // The lab is slow.
        run(command.env("COMPOSE_HTTP_TIMEOUT", "300").current_dir(&folder).args(args))
    };
    compose(&["up", "-d"]).ok();
    // It ends when it has found the page by its name.
    assert_eq!(coracle.docker(&["wait", "site_reader_1"]).text(), "0");
    let shown = compose(&["ps"]).ok().out();
    assert!(shown.contains("site_page_1") && shown.contains("127.0.0.1:18090->80/tcp"), "{shown}");
    assert_eq!(compose(&["exec", "-T", "page", "sh", "-c", "echo $COLOUR"]).ok().out().trim(), "red");
    let page = run(Command::new("curl").args([
        "--silent",
        "--max-time",
        "60",
        "--noproxy",
        "*",
        "http://127.0.0.1:18090/",
    ]));
    assert_eq!(page.ok().out(), "ahoy\n");
    assert!(compose(&["logs", "reader"]).ok().out().contains("ahoy"));
    compose(&["down", "-v", "-t", "1"]).ok();
    assert_eq!(coracle.docker(&["ps", "-aq"]).ok().out(), "");
    assert_eq!(coracle.docker(&["volume", "ls", "-q"]).ok().out(), "");
    assert!(!coracle.docker(&["network", "ls"]).ok().out().contains("site"));
}

#[test]
fn docker_py_does_what_its_users_do() {
    let coracle = Installation::new().with_busybox();
    let packages = workspace().join("target/clients/docker-py-7.1.0");
    assert!(packages.is_dir(), "{} is not there: `cargo xtask test` makes it", packages.display());
    let script = workspace().join("tests/clients/docker_py.py");
    let mut python = coracle.command("/usr/bin/python3");
    python.env("PYTHONPATH", packages).env("PYTHONDONTWRITEBYTECODE", "1").arg(script);
    assert_eq!(run(&mut python).text(), "done");
}

#[test]
fn bollard_does_what_its_users_do() {
    let coracle = Installation::new().with_busybox();
    let socket = format!("unix://{}", coracle.socket().display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let docker = Docker::connect_with_unix(&socket, 300, API_DEFAULT_VERSION).unwrap();
        let docker = docker.negotiate_version().await.unwrap();
        let options = CreateContainerOptionsBuilder::new().name("mine").build();
        let config = ContainerCreateBody {
            image: Some("busybox".to_owned()),
            cmd: Some(["sh", "-c", "echo out; echo err >&2; exec sleep 1000"].map(str::to_owned).to_vec()),
            host_config: Some(HostConfig { network_mode: Some("none".to_owned()), ..HostConfig::default() }),
            ..ContainerCreateBody::default()
        };
        docker.create_container(Some(options), config).await.unwrap();
        docker.start_container("mine", None::<StartContainerOptions>).await.unwrap();

        let mut logs = docker
            .logs("mine", Some(LogsOptionsBuilder::new().stdout(true).stderr(true).follow(true).build()));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        while out.len() + err.len() < 8 {
            match logs.next().await.unwrap().unwrap() {
                LogOutput::StdErr { message } => err.extend(message),
                LogOutput::StdOut { message } => out.extend(message),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((out, err), (b"out\n".to_vec(), b"err\n".to_vec()));

        let config = ExecConfig {
            cmd: Some(["echo", "inside"].map(str::to_owned).to_vec()),
            attach_stdout: Some(true),
            ..ExecConfig::default()
        };
        let exec = docker.create_exec("mine", config).await.unwrap().id;
        let StartExecResults::Attached { output, .. } = docker.start_exec(&exec, None).await.unwrap() else {
            panic!("not attached")
        };
        let said: Vec<_> = output.map(|piece| piece.unwrap().into_bytes()).collect().await;
        assert_eq!(said.concat(), b"inside\n");
        assert_eq!(docker.inspect_exec(&exec).await.unwrap().exit_code, Some(0));

        let mut ended = docker.wait_container("mine", None::<WaitContainerOptions>);
        docker.kill_container("mine", None).await.unwrap();
        // bollard makes an error of an exit code that is not 0.
        let ended = ended.next().await.unwrap();
        assert!(
            matches!(&ended, Err(bollard::errors::Error::DockerContainerWaitError { code: 137, .. })),
            "{ended:?}"
        );
        docker.remove_container("mine", None::<RemoveContainerOptions>).await.unwrap();
        let gone = docker.inspect_container("mine", None).await.unwrap_err();
        assert!(
            matches!(
                &gone,
                bollard::errors::Error::DockerResponseServerError { status_code: 404, message }
                    if message == "No such container: mine"
            ),
            "{gone:?}"
        );
    });
}
