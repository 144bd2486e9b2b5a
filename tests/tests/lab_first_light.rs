//! A container runs in our own VM, through the stock docker CLI and through ours.

use std::{
    io::{BufRead, BufReader, Read},
    process::Stdio,
    sync::LazyLock,
};

use coracle_tests::{Installation, image_archive, run_with_input};

/// One VM serves the tests of this file: each names its containers for itself.
static CORACLE: LazyLock<Installation> = LazyLock::new(|| Installation::new().with_busybox());

/// The statics of a test program are never dropped, so the last test to run takes the VM down.
#[test]
fn the_whole_session() {
    let tests: &[(&str, fn())] = &[
        ("up_says_where_the_socket_is", up_says_where_the_socket_is),
        ("all_archives_load", all_archives_load),
        ("hello", hello),
        ("exit_codes_are_dockers", exit_codes_are_dockers),
        ("input_comes_back_byte_for_byte", input_comes_back_byte_for_byte),
        (
            "half_close_reaches_the_program_and_its_answer_comes_back",
            half_close_reaches_the_program_and_its_answer_comes_back,
        ),
        ("a_detached_container_lives_through_its_commands", a_detached_container_lives_through_its_commands),
        ("logs_follow_until_the_container_ends", logs_follow_until_the_container_ends),
        ("a_terminal_is_a_terminal", a_terminal_is_a_terminal),
        ("a_whiteout_hides_the_lower_file", a_whiteout_hides_the_lower_file),
        ("containers_do_not_see_each_other", containers_do_not_see_each_other),
        ("limits_are_the_cgroups", limits_are_the_cgroups),
        ("what_is_not_supported_is_refused_by_name", what_is_not_supported_is_refused_by_name),
        ("the_same_words_in_coracle", the_same_words_in_coracle),
        ("a_container_drives_the_engine", a_container_drives_the_engine),
        ("the_guests_kernel_log_can_be_read", the_guests_kernel_log_can_be_read),
        (
            "containers_and_volumes_keep_their_files_over_a_restart_of_the_vm",
            containers_and_volumes_keep_their_files_over_a_restart_of_the_vm,
        ),
    ];
    CORACLE.run_parts(tests);
}

fn docker(args: &[&str]) -> coracle_tests::Finished {
    CORACLE.docker(args)
}

fn up_says_where_the_socket_is() {
    let up = CORACLE.coracle(&["up"]).text();
    assert!(up.contains(&format!("DOCKER_HOST=unix://{}", CORACLE.socket().display())), "{up}");
    let mut by_context = CORACLE.command("docker");
    by_context.env_remove("DOCKER_HOST").args([
        "--context",
        "coracle",
        "version",
        "--format",
        "{{.Server.Version}}",
    ]);
    coracle_tests::run(&mut by_context).ok();
    assert!(!docker(&["version", "--format", "{{.Server.APIVersion}}"]).text().is_empty());
}

fn all_archives_load() {
    for (archive, image) in [
        ("busybox.docker.tar", "busybox:latest"),
        ("busybox.oci.tar", "busybox:latest"),
        ("layered.docker.tar", "layered:latest"),
        ("layered.oci.tar", "layered:latest"),
    ] {
        let loaded = docker(&["load", "-i", image_archive(archive).to_str().unwrap()]).text();
        assert!(loaded.contains(&format!("Loaded image: {image}")), "{archive}: {loaded}");
    }
    let images = docker(&["images", "--format", "{{.Repository}}:{{.Tag}}"]).text();
    assert!(images.contains("busybox:latest") && images.contains("layered:latest"), "{images}");
}

fn hello() {
    let hello = docker(&["run", "--rm", "busybox", "echo", "hello"]).ok();
    assert_eq!(hello.out(), "hello\n");
    assert_eq!(docker(&["ps", "-aq"]).text(), "");
}

fn exit_codes_are_dockers() {
    for (args, code) in [
        (&["busybox", "true"][..], 0),
        (&["busybox", "sh", "-c", "exit 42"], 42),
        // PID 1 of a pid namespace gets no signal from its own, so these want an init before them.
        (&["--init", "busybox", "sh", "-c", "kill -TERM $$"], 143),
        (&["--init", "busybox", "sh", "-c", "kill -KILL $$"], 137),
        (&["busybox", "no-such-command"], 127),
        (&["busybox", "/no/such/command"], 127),
        (&["busybox", "/etc"], 126),
        (&["busybox", "/etc/passwd"], 126),
        (&["--cap-add", "NO_SUCH_CAPABILITY", "busybox", "true"], 125),
        (&["--workdir", "/etc/passwd", "busybox", "true"], 125),
    ] {
        docker(&[&["run", "--rm"], args].concat()).code(code);
    }
    docker(&["run", "--rm", "no-such-image"]).code(125);
    assert_eq!(docker(&["ps", "-aq"]).text(), "");
}

fn input_comes_back_byte_for_byte() {
    let mut random = vec![0; 8 << 20];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
    let echoed = CORACLE.docker_with_input(&["run", "--rm", "-i", "busybox", "cat"], &random).ok();
    assert!(echoed.stdout == random, "{} bytes came back of {}", echoed.stdout.len(), random.len());
}

fn half_close_reaches_the_program_and_its_answer_comes_back() {
    let counted = CORACLE
        .docker_with_input(&["run", "--rm", "-i", "busybox", "sh", "-c", "wc -c; exit 3"], b"12345")
        .code(3);
    assert_eq!(counted.out(), "5\n");
}

fn a_detached_container_lives_through_its_commands() {
    let id = docker(&[
        "run",
        "-d",
        "--name",
        "life",
        "busybox",
        "sh",
        "-c",
        "trap 'exit 7' TERM; echo up; while :; do sleep 1; done",
    ])
    .text();
    assert_eq!(id.len(), 64);
    assert_eq!(
        docker(&["ps", "--format", "{{.Names}} {{.Image}} {{.State}}"]).text(),
        "life busybox running"
    );
    assert_eq!(
        docker(&["exec", "life", "sh", "-c", "echo $$-in; exit 9"])
            .code(9)
            .out()
            .trim_end()
            .split('-')
            .next_back(),
        Some("in")
    );
    let echoed = CORACLE.docker_with_input(&["exec", "-i", "life", "cat"], b"through exec").ok();
    assert_eq!(echoed.out(), "through exec");
    docker(&["exec", "life", "no-such-command"]).code(127);
    assert_eq!(
        docker(&["inspect", "--format", "{{.State.Status}} {{.Config.Image}}", "life"]).text(),
        "running busybox"
    );
    let mut wait = CORACLE.command("docker");
    let wait = wait.args(["wait", "life"]).stdout(Stdio::piped()).spawn().unwrap();
    docker(&["stop", "life"]).ok();
    assert_eq!(wait.wait_with_output().unwrap().stdout, b"7\n");
    assert_eq!(
        docker(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "life"]).text(),
        "exited 7"
    );
    assert_eq!(docker(&["logs", "life"]).text(), "up");
    docker(&["rm", "life"]).ok();
    docker(&["inspect", "life"]).code(1);
}

fn logs_follow_until_the_container_ends() {
    docker(&[
        "run",
        "-d",
        "-i",
        "--name",
        "follow",
        "busybox",
        "sh",
        "-c",
        "echo one; echo two >&2; read line; echo three",
    ])
    .ok();
    let mut logs = CORACLE
        .command("docker")
        .args(["logs", "-f", "follow"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(logs.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "one");
    run_with_input(CORACLE.command("docker").args(["attach", "follow"]), b"go\n").ok();
    assert_eq!(lines.next().unwrap().unwrap(), "three");
    assert!(lines.next().is_none());
    assert!(logs.wait().unwrap().success());
    assert_eq!(docker(&["logs", "--tail", "1", "follow"]).ok().out(), "three\n");
    docker(&["rm", "follow"]).ok();
}

fn a_terminal_is_a_terminal() {
    // `script` gives the docker CLI a terminal.
    let mut script = CORACLE.command("script");
    script.args(["-qec", "docker run --rm -it busybox sh -c 'tty; stty size'", "/dev/null"]);
    let said = coracle_tests::run(&mut script).ok().out();
    assert!(said.contains("/dev/pts/0"), "{said}");
}

fn a_whiteout_hides_the_lower_file() {
    let seen = docker(&["run", "--rm", "layered", "sh", "-c", "id -u; ls /data; cat /data/kept"]).text();
    assert!(!seen.contains("removed"), "{seen}");
    assert!(seen.starts_with("1000\n"), "{seen}");
}

fn containers_do_not_see_each_other() {
    let seen = docker(&["run", "--rm", "--hostname", "boat", "busybox", "sh", "-c", "hostname; ls /proc | grep -c '^[0-9]'; ls /sys/class/net; cat /proc/self/cgroup; touch /proc/sysrq-trigger 2>/dev/null || echo sealed"]).text();
    let lines: Vec<_> = seen.lines().collect();
    assert_eq!(lines, ["boat", lines[1], "eth0", "lo", "0::/", "sealed"], "{seen}");
    assert!(lines[1].parse::<u32>().unwrap() <= 4, "{seen}");
}

fn limits_are_the_cgroups() {
    let seen = docker(&[
        "run",
        "--rm",
        "--memory",
        "64m",
        "--pids-limit",
        "50",
        "--cpus",
        "0.5",
        "busybox",
        "sh",
        "-c",
        "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max",
    ])
    .text();
    assert_eq!(seen, "67108864\n50\n50000 100000");
    let id =
        docker(&["create", "--memory", "16m", "busybox", "sh", "-c", "head -c 100m /dev/zero | tail"]).text();
    docker(&["start", "-a", &id]).code(137);
    assert_eq!(docker(&["inspect", "--format", "{{.State.OOMKilled}}", &id]).text(), "true");
    docker(&["rm", &id]).ok();
}

fn what_is_not_supported_is_refused_by_name() {
    for args in [&["-p", "8080:80/sctp"][..], &["-v", "/tmp:/mnt:shared"], &["--storage-opt", "size=1g"]] {
        let refused = docker(&[&["run", "--rm"], args, &["busybox", "true"]].concat()).code(125);
        assert!(refused.err().len() > 40, "{args:?}: {}", refused.err());
    }
    assert_eq!(docker(&["ps", "-aq"]).text(), "");
}

fn a_container_drives_the_engine() {
    let socket = format!("{}:/var/run/docker.sock", CORACLE.socket().display());
    let create =
        ["create", "--name", "driver", "--network", "none", "-v", &socket, "busybox", "sleep", "1000"];
    docker(&create).ok();
    // One static program.
    let paths = std::env::var("PATH").unwrap();
    let mut cli = paths.split(':').map(|folder| format!("{folder}/docker"));
    let cli = cli.find(|path| std::fs::metadata(path).is_ok()).expect("docker is on PATH");
    docker(&["cp", "-L", &cli, "driver:/bin/docker"]).ok();
    docker(&["start", "driver"]).ok();
    let driver = |args: &[&str]| docker(&[&["exec", "driver", "docker"], args].concat());
    assert_eq!(driver(&["ps", "--format", "{{.Names}}"]).text(), "driver");
    assert_eq!(driver(&["run", "--rm", "--network", "none", "busybox", "echo", "hello"]).text(), "hello");
    let refused = driver(&["create", "-v", "/etc:/x", "busybox"]).code(1);
    assert!(refused.err().contains("is not in anything of the host"), "{}", refused.err());
    docker(&["rm", "-f", "driver"]).ok();
}

fn the_same_words_in_coracle() {
    let coracle = |args: &[&str]| CORACLE.coracle(args);
    coracle(&["load", "-i", image_archive("busybox.oci.tar").to_str().unwrap()]).ok();
    assert!(coracle(&["images"]).text().contains("busybox"));
    assert_eq!(coracle(&["run", "--rm", "busybox", "echo", "hello"]).ok().out(), "hello\n");
    coracle(&["run", "--rm", "busybox", "sh", "-c", "exit 42"]).code(42);
    coracle(&["run", "--rm", "busybox", "no-such-command"]).code(127);
    coracle(&["run", "--rm", "no-such-image"]).code(125);
    let random = vec![7; 3 << 20];
    let echoed =
        run_with_input(CORACLE.command("coracle").args(["run", "--rm", "-i", "busybox", "cat"]), &random)
            .ok();
    assert!(echoed.stdout == random);
    coracle(&["run", "-d", "--name", "ours", "busybox", "sh", "-c", "echo up; exec sleep 1000"]).ok();
    assert!(coracle(&["ps"]).text().contains("ours"));
    assert_eq!(coracle(&["exec", "ours", "echo", "inside"]).text(), "inside");
    assert_eq!(coracle(&["logs", "ours"]).text(), "up");
    coracle(&["stop", "-t", "0", "ours"]).ok();
    coracle(&["rm", "ours"]).ok();
    assert!(!coracle(&["ps", "-a"]).text().contains("ours"));
    assert!(coracle(&["version"]).text().contains(env!("CARGO_PKG_VERSION")));
    coracle(&["doctor"]).ok();
}

fn the_guests_kernel_log_can_be_read() {
    let log = CORACLE.coracle(&["logs", "--vm"]).text();
    assert!(log.contains("Linux version 6.12"), "{log}");
}

fn containers_and_volumes_keep_their_files_over_a_restart_of_the_vm() {
    docker(&[
        "run",
        "--name",
        "keeper",
        "busybox",
        "sh",
        "-c",
        "cat /kept 2>/dev/null || echo precious >/kept",
    ])
    .ok();
    // The volume is filled from the image, then belongs to whoever mounts it.
    let script = "ls /bin/busybox; echo cargo > /bin/hold";
    let filled = docker(&["run", "--rm", "-v", "vessel:/bin", "busybox", "/bin/busybox", "sh", "-c", script]);
    assert_eq!(filled.text(), "/bin/busybox");
    CORACLE.coracle(&["down"]).ok();
    CORACLE.coracle(&["up"]).ok();
    assert_eq!(docker(&["start", "-a", "keeper"]).text(), "precious");
    docker(&["rm", "keeper"]).ok();
    let read = CORACLE.coracle(&["run", "--rm", "-v", "vessel:/v:ro", "busybox", "cat", "/v/hold"]);
    assert_eq!(read.text(), "cargo");
    assert_eq!(CORACLE.coracle(&["volume", "ls", "-q"]).text(), "vessel");
    assert_eq!(docker(&["volume", "rm", "vessel"]).text(), "vessel");
}
