//! System call filters by their effect: a program in a container tries calls and says what came back.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use coracle_agent_api::*;
use support::{Image, TestAgent, container, image, new_id, process, shell};

const EPERM: &str = "-1";
const ENOSYS: &str = "-38";
const AF_VSOCK: u32 = 40;

/// Busybox and the program, as `/probe` and, for the 32-bit architecture, `/probe32`.
fn probes() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| {
        Image::new(|root| {
            image::fill_busybox(root);
            build(&root.join("probe"), "-m64");
            build(&root.join("probe32"), "-m32");
        })
    })
}

fn build(program: &Path, width: &str) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/probe.c");
    let flags = [
        "-O1",
        "-static",
        "-nostdlib",
        "-ffreestanding",
        "-fno-builtin",
        "-fno-stack-protector",
        "-fno-pie",
        "-no-pie",
    ];
    let built = Command::new("gcc").arg(width).args(flags).arg("-o").arg(program).arg(source).status();
    assert!(built.expect("gcc is there").success());
}

/// What a number of calls came to, one after the other.
async fn try_calls(agent: &TestAgent, spec: impl FnOnce(&mut ContainerSpec), calls: &[&str]) -> Vec<String> {
    let mut container = container(&[probes()], shell(&calls.join("; ")));
    spec(&mut container);
    let output = agent.run(&container).await.unwrap();
    assert_eq!(output.stderr, b"");
    output.text().lines().map(str::to_owned).collect()
}

#[tokio::test]
#[cfg(target_arch = "x86_64")]
async fn the_default_filter_stops_what_docker_stops_for_64_and_32_bit_programs() {
    let agent = TestAgent::start().await;
    let calls = [
        // mount, unshare(CLONE_NEWUTS), keyctl, bpf, userfaultfd, clone3, perf_event_open
        "/probe 165 0 0 0 0 0",
        "/probe 272 67108864",
        "/probe 250 0 0",
        "/probe 321 0 0 0",
        "/probe 323 0",
        "/probe 435 0 0",
        "/probe 298 0 0 0 0 0",
        &format!("/probe 41 {AF_VSOCK} 1 0"),
        // The same as 32-bit calls.
        "/probe32 21 0 0 0 0 0",
        "/probe32 310 67108864",
        "/probe32 288 0 0",
        "/probe32 357 0 0 0",
        "/probe32 374 0",
        "/probe32 435 0 0",
        "/probe32 336 0 0 0 0 0",
        &format!("/probe32 359 {AF_VSOCK} 1 0"),
        // getpid by the x32 way, and a call that does not exist yet
        "/probe 1073741863",
        "/probe 700",
    ];
    let came = try_calls(&agent, |_| {}, &calls).await;
    let own = [EPERM, EPERM, EPERM, EPERM, EPERM, ENOSYS, EPERM, EPERM];
    let expected: Vec<_> =
        own.iter().chain(&own).chain(&[ENOSYS, ENOSYS]).map(|code| code.to_string()).collect();
    assert_eq!(came, expected);

    // Ordinary calls are made: getppid, socket(AF_UNIX), personality(ask).
    let came = try_calls(
        &agent,
        |_| {},
        &["/probe 110", "/probe 41 1 1 0", "/probe 135 4294967295", "/probe32 64", "/probe32 359 1 1 0"],
    )
    .await;
    assert!(came.iter().all(|result| !result.starts_with('-')), "{came:?}");
}

#[tokio::test]
#[cfg(target_arch = "x86_64")]
async fn the_filter_follows_the_capabilities_and_can_be_left_out() {
    let agent = TestAgent::start().await;
    // unshare(CLONE_NEWUTS)
    let calls = ["/probe 272 67108864", "/probe 250 0 0", "grep Seccomp: /proc/self/status"];
    let with_admin = |spec: &mut ContainerSpec| spec.process.capabilities.push("CAP_SYS_ADMIN".to_owned());
    assert_eq!(try_calls(&agent, with_admin, &calls).await, ["0", EPERM, "Seccomp:\t2"]);
    let unconfined = |spec: &mut ContainerSpec| {
        with_admin(spec);
        spec.seccomp = Seccomp::Unconfined;
    };
    let came = try_calls(&agent, unconfined, &calls).await;
    assert_eq!((came[0].as_str(), came[2].as_str()), ("0", "Seccomp:\t0"));
    assert_ne!(came[1], EPERM);
}

#[tokio::test]
#[cfg(target_arch = "x86_64")]
async fn every_process_of_a_container_is_filtered_the_same() {
    let agent = TestAgent::start().await;
    for (user, init) in [("", false), ("", true), ("web", false), ("web", true)] {
        let id = new_id();
        let mut spec = container(&[probes()], process(&["sleep", "1000"]));
        spec.init = init;
        spec.process.user = user.to_owned();
        agent.start_container(&id, &spec).await.unwrap();
        // What joins has its filter from the container, whatever capabilities it has itself.
        let exec = new_id();
        let script = "grep -h ^Seccomp: /proc/1/status /proc/self/status; /probe 250 0 0";
        let joined = ExecSpec { container: id.clone(), process: shell(script), privileged: true };
        agent.post(&format!("/v1/execs/{exec}"), &joined).await.unwrap();
        let text = agent.output(&exec).await.text();
        assert_eq!(text, "Seccomp:\t2\nSeccomp:\t2\n-1\n", "{user} {init}");
        agent.signal(&id, 9).await.unwrap();
        agent.output(&id).await;
    }
}

#[tokio::test]
async fn a_profile_need_not_allow_what_only_the_set_up_needs() {
    let agent = TestAgent::start().await;
    let names = [
        "execve",
        "read",
        "write",
        "exit_group",
        "exit",
        "brk",
        "mmap",
        "munmap",
        "mprotect",
        "open",
        "close",
    ];
    let also = [
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlinkat",
        "getrandom",
        "readlink",
        "newfstatat",
        "getuid",
        "setuid",
        "setgid",
        "getgid",
        "prctl",
        "ioctl",
        "fstat",
        "fcntl",
        "futex",
    ];
    let rule = SeccompRule {
        names: names.iter().chain(&also).map(|name| name.to_string()).collect(),
        action: SeccompAction::Allow,
        arguments: Vec::new(),
        with_capabilities: Vec::new(),
        without_capabilities: Vec::new(),
        min_kernel: None,
    };
    let profile = SeccompProfile {
        default_action: SeccompAction::KillProcess,
        architectures: Vec::new(),
        log: false,
        spec_allow: false,
        rules: vec![rule],
    };
    for no_new_privileges in [false, true] {
        let mut spec = container(&[probes()], process(&["echo", "still here"]));
        spec.seccomp = Seccomp::Profile(Box::new(profile.clone()));
        spec.process.no_new_privileges = no_new_privileges;
        let output = agent.run(&spec).await.unwrap();
        assert_eq!((output.text().as_str(), output.code()), ("still here\n", 0));
        spec.process = process(&["mkdir", "/x"]);
        assert_eq!(agent.run(&spec).await.unwrap().code(), 128 + 31);
    }
}
