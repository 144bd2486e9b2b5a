//! Which devices the processes of a cgroup may use: rules as a BPF program that the kernel asks at each open and mknod. What no
//! rule allows is forbidden.
//!
//! A development machine may lack cgroup v2's BPF. There the file systems of containers are mounted `nodev` instead, and only what
//! that can give is given.

use std::io;
use std::os::fd::OwnedFd;

use coracle_agent_api::{DeviceAccess, DeviceKind, DeviceRule};

use crate::bpf::assembler::{
    AND, Assembler, EXIT, Instruction, LOAD, MOVE, NOT_EQUAL_WORD, SET, SHIFT_RIGHT,
};
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
    let program = program(&all).ok_or(io::ErrorKind::InvalidInput)?;
    bpf::load(Purpose::Devices, &program)
}

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// The program; `None` for more rules than one can have.
fn program(rules: &[DeviceRule]) -> Option<Vec<Instruction>> {
    // struct bpf_cgroup_dev_ctx: the access in the upper half of the first word and the kind in the lower; then the numbers.
    let mut code = Assembler::default();
    code.emit(LOAD, KIND, CONTEXT, 0, 0)
        .emit(MOVE, ACCESS, KIND, 0, 0)
        .emit(SHIFT_RIGHT, ACCESS, 0, 0, 16)
        .emit(AND, KIND, 0, 0, 0xffff)
        .emit(LOAD, MAJOR, CONTEXT, 4, 0)
        .emit(LOAD, MINOR, CONTEXT, 8, 0);
    for (next, rule) in (0..).zip(rules) {
        let DeviceAccess { read, write, mknod } = rule.access;
        let bits = [(read, READ), (write, WRITE), (mknod, MKNOD)];
        let allowed: u32 = bits.iter().filter(|(allowed, _)| *allowed).map(|(_, bit)| bit).sum();
        let kind = match rule.kind {
            DeviceKind::Any => None,
            DeviceKind::Char => Some(CHAR),
            DeviceKind::Block => Some(BLOCK),
        };
        let conditions = [(KIND, kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        for (register, value) in
            conditions.iter().filter_map(|(register, value)| Some((*register, (*value)?)))
        {
            code.jump(NOT_EQUAL_WORD, register, value.cast_signed(), next);
        }
        // What is asked beyond the rule is no matter of this one.
        code.emit(MOVE, RESULT, ACCESS, 0, 0)
            .emit(AND, RESULT, 0, 0, (!allowed & (MKNOD | READ | WRITE)).cast_signed())
            .jump(NOT_EQUAL_WORD, RESULT, 0, next)
            .emit(SET, RESULT, 0, 0, 1)
            .emit(EXIT, 0, 0, 0, 0)
            .label(next);
    }
    code.emit(SET, RESULT, 0, 0, 0).emit(EXIT, 0, 0, 0, 0);
    code.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn allows(rules: &[DeviceRule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let all: Vec<DeviceRule> = ALWAYS.iter().chain(rules).copied().collect();
        let program = program(&all).unwrap();
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u32; 6];
        let mut at = 0;
        loop {
            let Instruction { code, destination, source, offset, value } = program[at];
            let value = value.cast_unsigned();
            let (to, from) = (usize::from(destination), usize::from(source));
            at += 1;
            match code {
                LOAD => registers[to] = context[offset as usize / 4],
                SET => registers[to] = value,
                MOVE => registers[to] = registers[from],
                AND => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                NOT_EQUAL_WORD => at += if registers[to] == value { 0 } else { offset as usize },
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
