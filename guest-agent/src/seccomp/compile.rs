//! From decisions to a program for the kernel (classic BPF over `struct seccomp_data`). A binary search by the call's number
//! leads to a decision; each part of the program ends with a return, so that parts can be put one behind the other. The
//! kernel remembers which numbers are allowed whatever their arguments are, and does not run the program for those.

use std::collections::BTreeMap;

use coracle_agent_api::{SeccompAction, SeccompArgument, SeccompOperator};

use super::numbers::Architecture;
use super::policy::Decision;
use crate::error::{Result, invalid};

/// The kernel takes no longer program.
const MAX_LEN: usize = 4096;

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

/// One instruction, as `struct sock_filter` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) jump_true: u8,
    pub(crate) jump_false: u8,
    pub(crate) value: u32,
}

type Program = Vec<Instruction>;

fn plain(code: u16, value: u32) -> Instruction {
    Instruction { code, jump_true: 0, jump_false: 0, value }
}

fn jump_if(code: u16, value: u32, jump_true: u8, jump_false: u8) -> Instruction {
    Instruction { code, jump_true, jump_false, value }
}

fn end(action: SeccompAction) -> Instruction {
    let value = match action {
        SeccompAction::Allow => libc::SECCOMP_RET_ALLOW,
        SeccompAction::Log => libc::SECCOMP_RET_LOG,
        SeccompAction::Errno(number) => libc::SECCOMP_RET_ERRNO | u32::from(number),
        SeccompAction::Trace(number) => libc::SECCOMP_RET_TRACE | u32::from(number),
        SeccompAction::Trap => libc::SECCOMP_RET_TRAP,
        SeccompAction::KillThread => libc::SECCOMP_RET_KILL_THREAD,
        SeccompAction::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
    };
    plain(RETURN, value)
}

/// A program for some architectures; calls of others end the thread, as with libseccomp.
pub(super) fn program(
    architectures: &[(&Architecture, BTreeMap<u32, Decision>)],
    default: SeccompAction,
) -> Result<Program> {
    let mut program = vec![plain(LOAD, ARCHITECTURE_OFFSET)];
    for (architecture, decisions) in architectures {
        let part = of_architecture(architecture, decisions, default);
        program.push(jump_if(JUMP_EQUAL, architecture.audit, 1, 0));
        program.push(plain(JUMP, part.len() as u32));
        program.extend(part);
    }
    program.push(end(SeccompAction::KillThread));
    if program.len() > MAX_LEN {
        let len = program.len();
        return Err(invalid(format!(
            "the seccomp profile is too large: {len} instructions of at most {MAX_LEN}"
        )));
    }
    Ok(program)
}

fn of_architecture(
    architecture: &Architecture,
    decisions: &BTreeMap<u32, Decision>,
    default: SeccompAction,
) -> Program {
    let mut program = vec![plain(LOAD, NUMBER_OFFSET)];
    if let Some(end_of_numbers) = architecture.end {
        program.push(jump_if(JUMP_GREATER_OR_EQUAL, end_of_numbers, 0, 1));
        program.push(end(SeccompAction::Errno(libc::ENOSYS as u16)));
    }
    // Calls that are newer than the rules: programs know how to do without what does not exist, and not without what is
    // forbidden.
    let unknown = match default {
        SeccompAction::Errno(_) => SeccompAction::Errno(libc::ENOSYS as u16),
        other => other,
    };
    let default = Decision::Always(default);
    let mut ranges: Vec<(u32, &Decision)> = vec![(0, &default)];
    for (number, decision) in decisions {
        append(&mut ranges, *number, decision);
        append(&mut ranges, number.saturating_add(1), &default);
    }
    let unknown = Decision::Always(unknown);
    if let Some((last, _)) = decisions.last_key_value() {
        append(&mut ranges, last.saturating_add(1), &unknown);
    }
    program.extend(search(&ranges, &default));
    program
}

/// From this number on, this is decided.
fn append<'a>(ranges: &mut Vec<(u32, &'a Decision)>, from: u32, decision: &'a Decision) {
    if ranges.last().is_some_and(|(start, _)| *start == from) {
        ranges.pop();
    }
    // What has conditions stands alone: the same conditions are not worth looking for.
    if ranges.last().is_none_or(|(_, before)| *before != decision) {
        ranges.push((from, decision));
    }
}

fn search(ranges: &[(u32, &Decision)], default: &Decision) -> Program {
    match ranges {
        [] => decision(default, default),
        [(_, only)] => decision(only, default),
        _ => {
            let (below, above) = ranges.split_at(ranges.len() / 2);
            let (lower, upper) = (search(below, default), search(above, default));
            let mut program = Vec::with_capacity(lower.len() + upper.len() + 2);
            match u8::try_from(lower.len()) {
                Ok(len) => program.push(jump_if(JUMP_GREATER_OR_EQUAL, above[0].0, len, 0)),
                Err(_) => {
                    program.push(jump_if(JUMP_GREATER_OR_EQUAL, above[0].0, 0, 1));
                    program.push(plain(JUMP, lower.len() as u32));
                }
            }
            program.extend(lower);
            program.extend(upper);
            program
        }
    }
}

fn decision(decision: &Decision, default: &Decision) -> Program {
    match (decision, default) {
        (Decision::Always(action), _) => vec![end(*action)],
        (Decision::ByArguments(cases), Decision::Always(default)) => {
            let mut program = Vec::new();
            for (arguments, action) in cases {
                program.extend(case(arguments, *action));
            }
            program.push(end(*default));
            program
        }
        (Decision::ByArguments(_), Decision::ByArguments(_)) => vec![end(SeccompAction::KillProcess)],
    }
}

/// Where a comparison leads to.
#[derive(Clone, Copy)]
enum To {
    /// The next instruction.
    Next,
    /// Past the rest of this comparison: it is true.
    True,
    /// Past the whole case.
    False,
}

struct Step {
    code: u16,
    value: u32,
    /// Where it leads to, for jumps.
    to: Option<(To, To)>,
}

/// Returns the action if all conditions are true, else goes on behind itself.
fn case(arguments: &[SeccompArgument], action: SeccompAction) -> Program {
    let parts: Vec<Vec<Step>> = arguments.iter().map(comparison).collect();
    let body: usize = parts.iter().map(Vec::len).sum();
    let mut program = Vec::with_capacity(body + 1);
    let mut part_end = 0;
    for part in parts {
        part_end += part.len();
        for step in part {
            let next = program.len() + 1;
            // At most 6 arguments of 5 steps each in Docker's words; longer lists of conditions are refused earlier.
            let distance = |to: To| match to {
                To::Next => 0,
                To::True => (part_end - next) as u8,
                To::False => (body + 1 - next) as u8,
            };
            program.push(match step.to {
                None => plain(step.code, step.value),
                Some((yes, no)) => jump_if(step.code, step.value, distance(yes), distance(no)),
            });
        }
    }
    program.push(end(action));
    program
}

fn comparison(argument: &SeccompArgument) -> Vec<Step> {
    let offset = ARGUMENTS_OFFSET + 8 * u32::from(argument.index);
    let (low, high) = (argument.value as u32, (argument.value >> 32) as u32);
    let load_low = || Step { code: LOAD, value: offset, to: None };
    let load_high = || Step { code: LOAD, value: offset + 4, to: None };
    let jump = |code, value, yes, no| Step { code, value, to: Some((yes, no)) };
    let mask = |value: u32| Step { code: AND, value, to: None };
    // The upper halves decide, unless they are the same.
    let ordered = |above: To, below: To, code, yes, no| {
        vec![
            load_high(),
            jump(JUMP_GREATER, high, above, To::Next),
            jump(JUMP_EQUAL, high, To::Next, below),
            load_low(),
            jump(code, low, yes, no),
        ]
    };
    match argument.operator {
        SeccompOperator::Equal => vec![
            load_high(),
            jump(JUMP_EQUAL, high, To::Next, To::False),
            load_low(),
            jump(JUMP_EQUAL, low, To::True, To::False),
        ],
        SeccompOperator::NotEqual => vec![
            load_high(),
            jump(JUMP_EQUAL, high, To::Next, To::True),
            load_low(),
            jump(JUMP_EQUAL, low, To::False, To::True),
        ],
        SeccompOperator::MaskedEqual(bits) => vec![
            load_high(),
            mask((bits >> 32) as u32),
            jump(JUMP_EQUAL, high, To::Next, To::False),
            load_low(),
            mask(bits as u32),
            jump(JUMP_EQUAL, low, To::True, To::False),
        ],
        SeccompOperator::Greater => ordered(To::True, To::False, JUMP_GREATER, To::True, To::False),
        SeccompOperator::GreaterOrEqual => {
            ordered(To::True, To::False, JUMP_GREATER_OR_EQUAL, To::True, To::False)
        }
        SeccompOperator::Less => ordered(To::False, To::True, JUMP_GREATER_OR_EQUAL, To::False, To::True),
        SeccompOperator::LessOrEqual => ordered(To::False, To::True, JUMP_GREATER, To::False, To::True),
    }
}

/// Runs a program as the kernel would.
#[cfg(test)]
pub(super) fn run(program: &[Instruction], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(architecture.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
    let (mut at, mut register) = (0, 0u32);
    loop {
        let Instruction { code, jump_true, jump_false, value } = program[at];
        at += 1;
        let mut branch = |taken: bool| at += usize::from(if taken { jump_true } else { jump_false });
        match code {
            LOAD => register = u32::from_le_bytes(data[value as usize..][..4].try_into().unwrap()),
            JUMP => at += value as usize,
            JUMP_EQUAL => branch(register == value),
            JUMP_GREATER => branch(register > value),
            JUMP_GREATER_OR_EQUAL => branch(register >= value),
            AND => register &= value,
            RETURN => return value,
            other => panic!("an instruction that is none: {other:#x}"),
        }
    }
}
