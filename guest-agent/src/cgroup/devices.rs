//! Which devices the processes of a cgroup may use: rules as a BPF program that the kernel asks at each open and mknod. What no
//! rule allows is forbidden.
//!
//! A development machine may lack cgroup v2's BPF. There the file systems of containers are mounted `nodev` instead, and only what
//! that can give is given.

use std::io;
use std::os::fd::OwnedFd;

use coracle_agent_api::{DeviceAccess, DeviceKind, DeviceRule};

use crate::bpf::{self, Purpose};

/// What a container may do with devices.
pub(crate) enum Devices {
    /// Anything.
    All,
    /// What Docker allows to all, and what these rules say.
    Rules(Vec<DeviceRule>),
}

const fn char(major: u32, minor: Option<u32>) -> DeviceRule {
    let access = DeviceAccess { read: true, write: true, mknod: true };
    DeviceRule { kind: DeviceKind::Char, major: Some(major), minor, access }
}

/// What every container may use: any node may be made; null, zero, full, random, urandom, tty, console, ptmx and terminals can be
/// opened as well.
const ALWAYS: [DeviceRule; 9] = [
    DeviceRule {
        kind: DeviceKind::Any,
        major: None,
        minor: None,
        access: DeviceAccess { read: false, write: false, mknod: true },
    },
    char(1, Some(3)),
    char(1, Some(5)),
    char(1, Some(7)),
    char(1, Some(8)),
    char(1, Some(9)),
    char(5, Some(0)),
    char(5, Some(2)),
    char(136, None),
];

/// Loads the program for some rules besides those for all.
pub(super) fn load(rules: &[DeviceRule]) -> io::Result<OwnedFd> {
    let all: Vec<DeviceRule> = ALWAYS.iter().chain(rules).copied().collect();
    let packed: Vec<u64> = program(&all).iter().map(|instruction| instruction.pack()).collect();
    bpf::load(Purpose::Devices, &packed)
}

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_NOT_EQUAL: u8 = 0x56;
const EXIT: u8 = 0x95;

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// An eBPF instruction, as `struct bpf_insn` has it.
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    value: u32,
}

impl Instruction {
    fn pack(self) -> u64 {
        let offset = u64::from(self.offset as u16);
        u64::from(self.value) << 32
            | offset << 16
            | u64::from(self.source << 4 | self.destination) << 8
            | u64::from(self.code)
    }
}

fn instruction(code: u8, destination: u8, source: u8, offset: i16, value: u32) -> Instruction {
    Instruction { code, destination, source, offset, value }
}

fn program(rules: &[DeviceRule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: the access in the upper half of the first word and the kind in the lower; then the numbers.
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules {
        let DeviceAccess { read, write, mknod } = rule.access;
        let bits = [(read, READ), (write, WRITE), (mknod, MKNOD)];
        let allowed: u32 = bits.iter().filter(|(allowed, _)| *allowed).map(|(_, bit)| bit).sum();
        let mut conditions = Vec::new();
        match rule.kind {
            DeviceKind::Any => {}
            DeviceKind::Char => conditions.push((KIND, CHAR)),
            DeviceKind::Block => conditions.push((KIND, BLOCK)),
        }
        conditions.extend(rule.major.map(|major| (MAJOR, major)));
        conditions.extend(rule.minor.map(|minor| (MINOR, minor)));
        // Behind the conditions: two to look for what is asked beyond the rule, its jump, two to say yes.
        let mut left = conditions.len() as i16 + 5;
        for (register, value) in conditions {
            left -= 1;
            program.push(instruction(JUMP_NOT_EQUAL, register, 0, left, value));
        }
        program.push(instruction(MOVE_REGISTER, RESULT, ACCESS, 0, 0));
        program.push(instruction(AND, RESULT, 0, 0, !allowed & (MKNOD | READ | WRITE)));
        program.push(instruction(JUMP_NOT_EQUAL, RESULT, 0, 2, 0));
        program.push(instruction(MOVE, RESULT, 0, 0, 1));
        program.push(instruction(EXIT, 0, 0, 0, 0));
    }
    program.push(instruction(MOVE, RESULT, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn allows(rules: &[DeviceRule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let all: Vec<DeviceRule> = ALWAYS.iter().chain(rules).copied().collect();
        let program = program(&all);
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u32; 6];
        let mut at = 0;
        loop {
            let Instruction { code, destination, source, offset, value } = program[at];
            let (to, from) = (usize::from(destination), usize::from(source));
            at += 1;
            match code {
                LOAD_WORD => registers[to] = context[offset as usize / 4],
                MOVE => registers[to] = value,
                MOVE_REGISTER => registers[to] = registers[from],
                AND => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                JUMP_NOT_EQUAL => at += if registers[to] == value { 0 } else { offset as usize },
                EXIT => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn what_no_rule_allows_is_forbidden() {
        for (kind, access, major, minor, allowed) in [
            (CHAR, READ | WRITE, 1, 3, true),
            (CHAR, READ, 136, 77, true),
            (CHAR, READ, 1, 1, false),
            (BLOCK, READ, 1, 3, false),
            (BLOCK, MKNOD, 254, 0, true),
            (BLOCK, READ, 254, 0, false),
            (BLOCK, MKNOD | READ, 254, 0, false),
            (CHAR, READ, 10, 229, false),
        ] {
            assert_eq!(allows(&[], kind, access, major, minor), allowed, "{kind} {access} {major}:{minor}");
        }
        let read_only = DeviceRule {
            kind: DeviceKind::Block,
            major: Some(254),
            minor: None,
            access: DeviceAccess { read: true, write: false, mknod: false },
        };
        assert!(allows(&[read_only], BLOCK, READ, 254, 9));
        assert!(!allows(&[read_only], BLOCK, READ | WRITE, 254, 9));
        assert!(!allows(&[read_only], CHAR, READ, 254, 9));
        let any = DeviceRule {
            kind: DeviceKind::Any,
            major: None,
            minor: None,
            access: DeviceAccess { read: true, write: true, mknod: true },
        };
        assert!(allows(&[any], BLOCK, READ | WRITE | MKNOD, 9, 9));
    }
}
