//! Containers from start to end: exit codes, users, mounts, limits, errors.

mod support;

use coracle_agent_api::{ErrorKind, InjectedFile, Resources, Rlimit, TmpfsMount};
use support::{Image, TestAgent, container, image, new_id, process, shell};

#[tokio::test]
async fn output_and_exit_code_come_back() {
    let agent = TestAgent::start().await;
    let spec = container(&[Image::busybox()], shell("echo out; echo err >&2; exit 42"));
    let output = agent.run(&spec).await.unwrap();
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(output.code(), 42);
    assert!(!output.exit.unwrap().oom_killed);
}

#[tokio::test]
async fn a_start_says_where_its_time_went() {
    let agent = TestAgent::start().await;
    let started =
        agent.start_container(&new_id(), &container(&[Image::busybox()], process(&["true"]))).await.unwrap();
    let names: Vec<_> = started.phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["prepared", "clone", "namespaces", "process", "exec"]);
    assert!(started.phases.iter().all(|phase| phase.micros > 0));
    assert!(agent.hello.phases.is_sorted_by_key(|phase| phase.guest_micros));
}

#[tokio::test]
async fn a_container_sees_its_own_world() {
    let agent = TestAgent::start().await;
    let mut spec = container(
        &[Image::busybox()],
        shell(
            "echo $$; hostname; cat /proc/sys/kernel/domainname; pwd; ls /sys/class/net; ping -c1 -W1 127.0.0.1 >&2; cat /proc/self/cgroup; stat -c %a /proc/self; umask",
        ),
    );
    spec.domainname = "example".to_owned();
    spec.process.cwd = "/made/for/it".to_owned();
    let output = agent.run(&spec).await.unwrap();
    assert_eq!(output.text().lines().collect::<Vec<_>>()[..5], ["1", "box", "example", "/made/for/it", "lo"]);
    assert!(output.text().contains("0::/\n"), "{}", output.text());
    assert!(output.text().ends_with("0022\n"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 packets received"));
}

#[tokio::test]
async fn a_process_runs_as_the_user_it_was_given() {
    let agent = TestAgent::start().await;
    let cases = [
        ("", "uid=0(root) gid=0(root) groups=0(root),10(wheel)", "/root"),
        ("web", "uid=33(web) gid=33(web) groups=10(wheel),33(web)", "/var/www"),
        ("33:10", "uid=33(web) gid=10(wheel) groups=10(wheel)", "/var/www"),
        ("1000", "uid=1000 gid=0(root) groups=0(root)", "/"),
    ];
    for (user, id, home) in cases {
        let mut spec = container(&[Image::busybox()], shell("id; echo $HOME; echo x > /dev/stderr"));
        spec.process.user = user.to_owned();
        let output = agent.run(&spec).await.unwrap();
        assert_eq!(output.text(), format!("{id}\n{home}\n"), "{user}");
        assert_eq!(output.stderr, b"x\n");
    }
}

#[tokio::test]
async fn capabilities_are_what_was_asked_for() {
    let agent = TestAgent::start().await;
    let script = "grep -E 'CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs' /proc/self/status | tr -d '\\t\\n'";
    for (user, expected) in [
        (
            "",
            "CapInh:0000000000000000CapPrm:00000000a80425fbCapEff:00000000a80425fbCapBnd:00000000a80425fbCapAmb:0000000000000000NoNewPrivs:1",
        ),
        (
            "web",
            "CapInh:0000000000000000CapPrm:0000000000000000CapEff:0000000000000000CapBnd:00000000a80425fbCapAmb:0000000000000000NoNewPrivs:1",
        ),
    ] {
        let mut spec = container(&[Image::busybox()], shell(script));
        spec.process.user = user.to_owned();
        spec.process.no_new_privileges = true;
        assert_eq!(agent.run(&spec).await.unwrap().text(), expected);
    }
}

#[tokio::test]
async fn limits_of_the_process_are_set() {
    let agent = TestAgent::start().await;
    let mut spec = container(
        &[Image::busybox()],
        shell("ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj"),
    );
    spec.process.rlimits = vec![
        Rlimit { name: "nofile".to_owned(), soft: 100, hard: 200 },
        Rlimit { name: "core".to_owned(), soft: 0, hard: 0 },
    ];
    spec.process.oom_score_adj = Some(500);
    assert_eq!(agent.run(&spec).await.unwrap().text(), "100\n200\n0\n500\n");
}

#[tokio::test]
async fn what_cannot_start_says_why_in_dockers_words() {
    let agent = TestAgent::start().await;
    let image = Image::new(|root| {
        image::fill_busybox(root);
        std::fs::write(root.join("bin/no-format"), "no program").unwrap();
        std::fs::write(root.join("bin/no-interpreter"), "#!/no/such/interpreter\n").unwrap();
        for name in ["bin/no-format", "bin/no-interpreter"] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(root.join(name), mode).unwrap();
        }
    });
    use ErrorKind::*;
    let cases: [(&str, &str, &str, ErrorKind, &str); 11] = [
        ("nope", "/", "", CommandNotFound, "exec: \"nope\": executable file not found in $PATH"),
        ("/nope", "/", "", CommandNotFound, "exec: \"/nope\": stat /nope: no such file or directory"),
        ("/etc", "/", "", CommandNotExecutable, "exec: \"/etc\": is a directory"),
        ("/etc/passwd", "/", "", CommandNotExecutable, "exec: \"/etc/passwd\": permission denied"),
        ("/bin/no-format", "/", "", CommandNotExecutable, "exec /bin/no-format: exec format error"),
        (
            "/bin/no-interpreter",
            "/",
            "",
            CommandNotFound,
            "exec /bin/no-interpreter: no such file or directory",
        ),
        (
            "true",
            "/etc/passwd",
            "",
            StartFailed,
            "chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory",
        ),
        (
            "true",
            "/etc/passwd/x",
            "",
            StartFailed,
            "chdir to cwd (\"/etc/passwd/x\") set in config.json failed: not a directory",
        ),
        (
            "true",
            "relative",
            "",
            Invalid,
            "the working directory 'relative' is invalid, it needs to be an absolute path",
        ),
        (
            "true",
            "/",
            "nobody",
            StartFailed,
            "unable to find user nobody: no matching entries in passwd file",
        ),
        (
            "true",
            "/",
            "root:nogroup",
            StartFailed,
            "unable to find group nogroup: no matching entries in group file",
        ),
    ];
    for (command, cwd, user, kind, message) in cases {
        for init in [false, true] {
            let mut spec = container(&[&image], process(&[command]));
            spec.process.cwd = cwd.to_owned();
            spec.process.user = user.to_owned();
            spec.init = init;
            let error = agent.run(&spec).await.unwrap_err();
            assert_eq!((error.kind, error.message.as_str()), (kind, message));
        }
    }
    let state: coracle_agent_api::AgentState = agent.get("/v1/state").await.unwrap();
    assert!(state.processes.is_empty());
}

#[tokio::test]
async fn init_forwards_signals_reaps_and_ends_as_the_program_does() {
    let agent = TestAgent::start().await;
    let mut spec = container(
        &[Image::busybox()],
        shell("(sleep 0.1 &) ; trap 'exit 7' TERM; echo $$; while :; do sleep 1; done"),
    );
    spec.init = true;
    let id = new_id();
    agent.start_container(&id, &spec).await.unwrap();
    let mut stream = agent.open_output(&id, 0).await;
    let mut output = support::Output::default();
    support::read_until(&mut stream, &mut output, "\n").await;
    assert_eq!(output.text(), "2\n");
    drop(stream);
    agent.signal(&id, libc::SIGTERM).await.unwrap();
    assert_eq!(agent.output(&id).await.code(), 7);
}

#[tokio::test]
async fn a_signal_that_kills_gives_128_and_its_number() {
    let agent = TestAgent::start().await;
    for (signal, script, code) in [
        (libc::SIGKILL, "exec sleep 100", 137),
        (libc::SIGTERM, "trap 'exit 3' TERM; while :; do sleep 0.1; done", 3),
    ] {
        let id = new_id();
        let script = format!("echo up; {script}");
        agent.start_container(&id, &container(&[Image::busybox()], shell(&script))).await.unwrap();
        let mut stream = agent.open_output(&id, 0).await;
        support::read_until(&mut stream, &mut support::Output::default(), "up").await;
        drop(stream);
        if signal == libc::SIGTERM {
            // The trap is set after the echo; an exec's end proves that the shell went on.
            let exec = agent
                .exec(&id, shell("until grep -q 'SigCgt:.*4...$' /proc/1/status; do :; done"))
                .await
                .unwrap();
            assert_eq!(agent.output(&exec).await.code(), 0);
        }
        agent.signal(&id, signal).await.unwrap();
        assert_eq!(agent.output(&id).await.code(), code);
        assert_eq!(agent.signal(&id, signal).await.unwrap_err().kind, ErrorKind::Conflict);
    }
}

#[tokio::test]
async fn mounts_are_as_the_daemon_asked() {
    let agent = TestAgent::start().await;
    let image = Image::new(|root| {
        image::fill_busybox(root);
        std::os::unix::fs::symlink("../run/resolved/stub.conf", root.join("etc/resolv.conf")).unwrap();
    });
    let script = "cat /etc/hosts /etc/resolv.conf /etc/new/file; readlink /etc/resolv.conf
        df -k /dev/shm | awk 'NR==2 {print $2}'
        awk '$2==\"/scratch\" {print $4}' /proc/mounts
        stat -c '%a %F' /dev/shm /dev/mqueue /dev/ptmx
        for n in null zero full random urandom tty; do test -c /dev/$n || echo no $n; done
        for n in fd stdin stdout stderr; do readlink /dev/$n; done
        (echo x > /file) 2>&1; (echo x > /sys/file) 2>&1; (echo x > /proc/sys/kernel/x) 2>&1; cat /proc/keys; ls /etc/hidden
        head -c 5 /dev/zero | wc -c; echo x > /dev/null; echo x > /scratch/x; echo x > /dev/shm/x";
    let mut spec = container(&[&image], shell(script));
    spec.readonly_rootfs = true;
    spec.shm_size = 1 << 20;
    spec.tmpfs = vec![TmpfsMount { path: "/scratch".to_owned(), options: "exec,size=1m".to_owned() }];
    spec.masked_paths = vec!["/proc/keys".to_owned(), "/etc/hidden".to_owned(), "/no/such".to_owned()];
    spec.readonly_paths = vec!["/proc/sys".to_owned(), "/no/such".to_owned()];
    let file =
        |path: &str, contents: &str| InjectedFile { path: path.to_owned(), contents: contents.to_owned() };
    spec.files = vec![
        file("/etc/hosts", "hosts\n"),
        file("/etc/resolv.conf", "resolv\n"),
        file("/etc/new/file", "new\n"),
    ];
    let output = agent.run(&spec).await.unwrap();
    let text = output.text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..5], ["hosts", "resolv", "new", "../run/resolved/stub.conf", "1024"]);
    assert!(lines[5].contains("nosuid,nodev") && !lines[5].contains("noexec"), "{}", lines[5]);
    assert_eq!(lines[6..9], ["1777 directory", "1777 directory", "777 symbolic link"]);
    assert_eq!(lines[9..13], ["/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2"]);
    assert!(lines[13].contains("Read-only file system") && lines[14].contains("Read-only"), "{text}");
    assert!(lines[15].contains("can't create"), "{text}");
    assert_eq!(lines[16..], ["5"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("/etc/hidden: No such file"));
}

#[tokio::test]
async fn layers_lie_over_each_other() {
    let agent = TestAgent::start().await;
    let upper = Image::new(|root| {
        std::fs::create_dir(root.join("etc")).unwrap();
        image::whiteout(&root.join("etc/group"));
        std::fs::write(root.join("etc/passwd"), "replaced\n").unwrap();
    });
    let empty = Image::new(|_| {});
    let spec = container(&[Image::busybox(), &empty, &upper, &empty], shell("ls /etc; cat /etc/passwd"));
    assert_eq!(agent.run(&spec).await.unwrap().text(), "passwd\nreplaced\n");
}

#[tokio::test]
async fn a_hundred_layers_are_no_problem() {
    let agent = TestAgent::start().await;
    let make = |number| Image::new(|root| std::fs::write(root.join(format!("file-{number}")), "").unwrap());
    let layers: Vec<_> = (0..100).map(make).collect();
    let mut images = vec![Image::busybox()];
    images.extend(&layers);
    let spec = container(&images, shell("ls / | grep -c file-"));
    assert_eq!(agent.run(&spec).await.unwrap().text(), "100\n");
    let state: coracle_agent_api::AgentState = agent.get("/v1/state").await.unwrap();
    assert_eq!(state.layers.len(), 101);
    // Though the container's root may still be mounted at this moment.
    for layer in state.layers {
        agent.delete(&format!("/v1/layers/{}", layer.diff_id)).await.unwrap();
    }
    let state: coracle_agent_api::AgentState = agent.get("/v1/state").await.unwrap();
    assert!(state.layers.is_empty());
}

#[tokio::test]
async fn the_writable_layer_lives_from_start_to_start_until_it_is_removed() {
    let agent = TestAgent::start().await;
    let id = new_id();
    let spec = container(&[Image::busybox()], shell("cat /kept 2>/dev/null; echo kept >> /kept"));
    for expected in ["", "kept\n", "kept\nkept\n"] {
        agent.start_container(&id, &spec).await.unwrap();
        assert_eq!(agent.output(&id).await.text(), expected);
        assert_eq!(agent.start_container(&id, &spec).await.unwrap_err().kind, ErrorKind::Conflict);
        agent.delete(&format!("/v1/processes/{id}")).await.unwrap();
    }
    let retain = coracle_agent_api::Retain { containers: vec![id.clone()], volumes: None };
    agent.post("/v1/containers/retain", &retain).await.unwrap();
    assert!(agent.data().join("containers").join(id.as_str()).exists());
    agent
        .post("/v1/containers/retain", &coracle_agent_api::Retain { containers: vec![], volumes: None })
        .await
        .unwrap();
    agent.start_container(&id, &spec).await.unwrap();
    assert_eq!(agent.output(&id).await.text(), "");
    agent.delete(&format!("/v1/containers/{id}")).await.unwrap();
    agent.delete(&format!("/v1/containers/{id}")).await.unwrap();
}

#[tokio::test]
async fn limits_work_or_are_refused_by_the_controllers_name() {
    let agent = TestAgent::start().await;
    let mut spec = container(&[Image::busybox()], shell("head -c 64m /dev/zero | tail; exit 0"));
    spec.resources = Resources { memory: Some(16 << 20), memory_swap: Some(0), ..Resources::default() };
    spec.process.args = ["sh", "-c", "x=$(head -c 64000000 /dev/zero | tr '\\0' x); echo survived"]
        .map(str::to_owned)
        .to_vec();
    let controllers = std::fs::read_to_string(cgroup2().join("cgroup.controllers")).unwrap();
    match agent.run(&spec).await {
        Ok(output) => {
            assert!(controllers.contains("memory"));
            assert!(output.exit.unwrap().oom_killed);
        }
        Err(error) => {
            assert!(!controllers.contains("memory"), "{error}");
            assert_eq!(error.kind, ErrorKind::Unsupported);
            assert!(error.message.contains("`memory`"), "{}", error.message);
        }
    }
}

fn cgroup2() -> std::path::PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line =
        mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    line.split(' ').nth(1).unwrap().into()
}
