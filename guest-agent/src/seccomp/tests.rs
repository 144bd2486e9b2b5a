//! What filters decide, by running their programs.

use coracle_agent_api::{SeccompArchitecture, SeccompArgument, SeccompOperator, SeccompRule};
use proptest::prelude::*;

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
const KILLED: u32 = libc::SECCOMP_RET_KILL_THREAD;

fn default_filter(capabilities: &[&str]) -> Filter {
    let capabilities: Vec<_> = capabilities.iter().map(|name| name.to_string()).collect();
    (*Compiler::default().filter(&Seccomp::Default, &capabilities).unwrap().unwrap()).clone()
}

fn decide(filter: &Filter, architecture: usize, name: &str, arguments: &[u64]) -> u32 {
    let architecture = &ARCHITECTURES[architecture];
    let number = (architecture.number)(name).unwrap_or_else(|| panic!("{name} is no system call"));
    run(filter, architecture.audit, number, arguments)
}

fn run(filter: &Filter, audit: u32, number: u32, arguments: &[u64]) -> u32 {
    let program: Vec<_> = filter.instructions().collect();
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    compile::run(&program, audit, number, all)
}

#[test]
fn the_default_filter_decides_as_dockers() {
    let plain = default_filter(&["CAP_CHOWN", "CAP_SYS_CHROOT"]);
    let cases: &[(&str, &[u64], u32)] = &[
        ("read", &[], ALLOW),
        ("execve", &[], ALLOW),
        ("ptrace", &[], ALLOW),
        ("chroot", &[], ALLOW),
        ("openat2", &[], ALLOW),
        ("mount", &[], EPERM),
        ("unshare", &[], EPERM),
        ("setns", &[], EPERM),
        ("keyctl", &[], EPERM),
        ("add_key", &[], EPERM),
        ("bpf", &[], EPERM),
        ("perf_event_open", &[], EPERM),
        ("userfaultfd", &[], EPERM),
        ("init_module", &[], EPERM),
        ("kexec_load", &[], EPERM),
        ("reboot", &[], EPERM),
        ("settimeofday", &[], EPERM),
        ("clone3", &[], ENOSYS),
        ("clone", &[libc::SIGCHLD as u64], ALLOW),
        ("clone", &[libc::CLONE_NEWUSER as u64], EPERM),
        ("clone", &[libc::CLONE_NEWNS as u64 | 17], EPERM),
        ("personality", &[0], ALLOW),
        ("personality", &[0xffff_ffff], ALLOW),
        ("personality", &[0x004_0000], EPERM),
        ("personality", &[1 << 32], EPERM),
    ];
    for (name, arguments, expected) in cases {
        assert_eq!(decide(&plain, 0, name, arguments), *expected, "{name} {arguments:?}");
        if *name != "kexec_load" || cfg!(target_arch = "x86_64") {
            assert_eq!(decide(&plain, 1, name, arguments), *expected, "32-bit {name} {arguments:?}");
        }
    }
    for (family, expected) in [
        (libc::AF_UNIX, ALLOW),
        (libc::AF_INET, ALLOW),
        (libc::AF_INET6, ALLOW),
        (libc::AF_NETLINK, ALLOW),
        (libc::AF_PACKET, ALLOW),
        (libc::AF_VSOCK, EPERM),
        (libc::AF_ALG, EPERM),
        (60, EPERM),
    ] {
        assert_eq!(decide(&plain, 0, "socket", &[family as u64]), expected, "family {family}");
        assert_eq!(decide(&plain, 1, "socket", &[family as u64]), expected, "32-bit family {family}");
    }
}

#[test]
fn capabilities_open_what_belongs_to_them() {
    for (capability, names) in [
        ("CAP_SYS_ADMIN", &["mount", "unshare", "setns", "bpf", "clone3", "syslog"][..]),
        ("CAP_SYS_TIME", &["settimeofday", "clock_settime"]),
        ("CAP_BPF", &["bpf"]),
        ("CAP_SYS_MODULE", &["init_module"]),
        ("CAP_DAC_READ_SEARCH", &["open_by_handle_at"]),
    ] {
        let (without, with) = (default_filter(&["CAP_CHOWN"]), default_filter(&["CAP_CHOWN", capability]));
        for name in names {
            assert_ne!(decide(&without, 0, name, &[]), ALLOW, "{name}");
            assert_eq!(decide(&with, 0, name, &[]), ALLOW, "{name}");
        }
    }
    let admin = default_filter(&["CAP_SYS_ADMIN"]);
    assert_eq!(decide(&admin, 0, "clone", &[libc::CLONE_NEWUSER as u64]), ALLOW);
}

#[test]
fn what_the_filter_does_not_know_fails_harmlessly() {
    let plain = default_filter(&[]);
    let own = ARCHITECTURES[0].audit;
    assert_eq!(run(&plain, own, 1_000, &[]), ENOSYS);
    assert_eq!(run(&plain, ARCHITECTURES[1].audit, 5_000, &[]), ENOSYS);
    assert_eq!(run(&plain, 0x1234_5678, 0, &[]), KILLED);
    #[cfg(target_arch = "x86_64")]
    for number in [0x4000_0000, 0x4000_0001, 0x7fff_ffff, u32::MAX] {
        assert_eq!(run(&plain, own, number, &[]), ENOSYS, "x32 {number:#x}");
    }
}

fn profile(default_action: SeccompAction, rules: Vec<SeccompRule>) -> SeccompProfile {
    SeccompProfile { default_action, architectures: Vec::new(), log: false, spec_allow: false, rules }
}

fn rule(name: &str, action: SeccompAction, arguments: &[SeccompArgument]) -> SeccompRule {
    SeccompRule {
        names: vec![name.to_owned()],
        action,
        arguments: arguments.to_vec(),
        with_capabilities: Vec::new(),
        without_capabilities: Vec::new(),
        min_kernel: None,
    }
}

#[test]
fn a_profile_of_the_clients_own_has_its_effect() {
    let mut later = rule("getpid", SeccompAction::KillProcess, &[]);
    later.min_kernel = Some((100, 0));
    let mut admin = rule("mount", SeccompAction::Trap, &[]);
    admin.with_capabilities = vec!["CAP_SYS_ADMIN".to_owned()];
    let mut others = rule("mount", SeccompAction::Errno(13), &[]);
    others.without_capabilities = vec!["CAP_SYS_ADMIN".to_owned()];
    let big = SeccompArgument { index: 2, operator: SeccompOperator::Greater, value: 1 << 40 };
    let mut given = profile(
        SeccompAction::Allow,
        vec![
            rule("mkdir", SeccompAction::Errno(1), &[]),
            rule("no_such_call", SeccompAction::Trap, &[]),
            rule("write", SeccompAction::Errno(5), &[big]),
            later,
            admin,
            others,
        ],
    );
    let filter = of_profile(&given, &[]).unwrap();
    assert_eq!(decide(&filter, 0, "mkdir", &[]), EPERM);
    assert_eq!(decide(&filter, 0, "getpid", &[]), ALLOW);
    assert_eq!(decide(&filter, 0, "mount", &[]), libc::SECCOMP_RET_ERRNO | 13);
    assert_eq!(decide(&filter, 0, "write", &[1, 0, 1 << 40]), ALLOW);
    assert_eq!(decide(&filter, 0, "write", &[1, 0, (1 << 40) + 1]), libc::SECCOMP_RET_ERRNO | 5);
    assert_eq!(run(&filter, ARCHITECTURES[0].audit, 900, &[]), ALLOW);
    // The other architecture was not named.
    assert_eq!(decide(&filter, 1, "read", &[]), KILLED);
    let with = of_profile(&given, &["CAP_SYS_ADMIN".to_owned()]).unwrap();
    assert_eq!(decide(&with, 0, "mount", &[]), libc::SECCOMP_RET_TRAP);
    given.architectures = vec![SeccompArchitecture::X86, SeccompArchitecture::Arm];
    assert_eq!(decide(&of_profile(&given, &[]).unwrap(), 1, "mkdir", &[]), EPERM);
}

#[test]
fn a_profile_that_is_too_much_is_refused() {
    let many = vec![rule("read", SeccompAction::Allow, &[]); 5000];
    assert!(of_profile(&profile(SeccompAction::Trap, many), &[]).is_err());
    let condition = SeccompArgument { index: 0, operator: SeccompOperator::Equal, value: 1 };
    let long = vec![rule("read", SeccompAction::Allow, &[condition; 33])];
    assert!(of_profile(&profile(SeccompAction::Trap, long), &[]).is_err());
    let bulky = vec![rule("read", SeccompAction::Allow, &[condition; 32]); 100];
    assert!(of_profile(&profile(SeccompAction::Trap, bulky), &[]).is_err());
    let beyond = SeccompArgument { index: 6, ..condition };
    assert!(
        of_profile(&profile(SeccompAction::Trap, vec![rule("read", SeccompAction::Allow, &[beyond])]), &[])
            .is_err()
    );
}

#[test]
fn a_default_filter_is_compiled_once() {
    let compiler = Compiler::default();
    let filter = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|name| name.to_string()).collect();
        compiler.filter(&Seccomp::Default, &names).unwrap().unwrap()
    };
    assert!(Arc::ptr_eq(&filter(&["CAP_CHOWN"]), &filter(&["CAP_KILL"])));
    assert!(!Arc::ptr_eq(&filter(&["CAP_CHOWN"]), &filter(&["CAP_SYS_ADMIN"])));
    assert!(compiler.filter(&Seccomp::Unconfined, &[]).unwrap().is_none());
}

proptest! {
    #[test]
    fn comparisons_are_those_of_64_bit_numbers(
        value in prop_oneof![any::<u64>(), 0..4u64, any::<u32>().prop_map(|high| u64::from(high) << 32)],
        near in -1i64..=1,
        far in any::<u64>(),
        mask in any::<u64>(),
        index in 0u8..6,
    ) {
        for argument in [value.wrapping_add_signed(near), far, value ^ (1 << 32), value & mask] {
            for (operator, expected) in [
                (SeccompOperator::Equal, argument == value),
                (SeccompOperator::NotEqual, argument != value),
                (SeccompOperator::Less, argument < value),
                (SeccompOperator::LessOrEqual, argument <= value),
                (SeccompOperator::Greater, argument > value),
                (SeccompOperator::GreaterOrEqual, argument >= value),
                (SeccompOperator::MaskedEqual(mask), argument & mask == value),
            ] {
                let condition = SeccompArgument { index, operator, value };
                let rules = vec![rule("read", SeccompAction::Allow, &[condition])];
                let filter = of_profile(&profile(SeccompAction::Trap, rules), &[]).unwrap();
                let mut arguments = [0; 6];
                arguments[usize::from(index)] = argument;
                let allowed = decide(&filter, 0, "read", &arguments) == ALLOW;
                prop_assert_eq!(allowed, expected, "{:?} {:#x} {:#x}", operator, argument, value);
            }
        }
    }
}
