//! System call filters: Docker's default profile and profiles of clients, compiled once when a container starts; every process
//! of the container, those that join it included, gets the same program. A profile is the client's own and can make the
//! container useless, nothing else: it is checked for what the kernel's program format can hold.

mod compile;
mod default;
mod numbers;
mod policy;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use coracle_agent_api::{Seccomp, SeccompAction, SeccompProfile};
use serde::{Deserialize, Serialize};

use crate::error::{Result, invalid};
pub(crate) use compile::Instruction;
use numbers::ARCHITECTURES;
use policy::{Rule, decide};

/// Conditions in one rule; the jumps of the program reach no further than this many.
const MAX_ARGUMENTS: usize = 32;
/// Rules and names in a profile.
const MAX_RULES: usize = 4096;
/// Kinds of containers whose default filter is remembered.
const REMEMBERED: usize = 64;

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filter {
    /// For `seccomp(2)`.
    pub(crate) flags: u32,
    /// One instruction each: code, the two jumps, and the value, from the upper bits to the lower ones.
    program: Vec<u64>,
}

impl Filter {
    fn new(flags: u32, program: &[Instruction]) -> Self {
        let pack = |instruction: &Instruction| {
            let Instruction { code, jump_true, jump_false, value } = *instruction;
            u64::from(code) << 48
                | u64::from(jump_true) << 40
                | u64::from(jump_false) << 32
                | u64::from(value)
        };
        Self { flags, program: program.iter().map(pack).collect() }
    }

    /// The program.
    pub(crate) fn instructions(&self) -> impl Iterator<Item = Instruction> + '_ {
        self.program.iter().map(|packed| Instruction {
            code: (packed >> 48) as u16,
            jump_true: (packed >> 40) as u8,
            jump_false: (packed >> 32) as u8,
            value: *packed as u32,
        })
    }
}

/// Makes filters, and remembers those that come again and again.
#[derive(Default)]
pub(crate) struct Compiler {
    defaults: Mutex<HashMap<Vec<&'static str>, Arc<Filter>>>,
}

impl Compiler {
    /// The filter of a container with these capabilities.
    pub(crate) fn filter(&self, seccomp: &Seccomp, capabilities: &[String]) -> Result<Option<Arc<Filter>>> {
        match seccomp {
            Seccomp::Unconfined => Ok(None),
            Seccomp::Default => self.docker_default(capabilities).map(Some),
            Seccomp::Profile(profile) => {
                of_profile(profile, capabilities).map(|filter| Some(Arc::new(filter)))
            }
        }
    }

    fn docker_default(&self, capabilities: &[String]) -> Result<Arc<Filter>> {
        let has = |wanted: &str| capabilities.iter().any(|name| name == wanted);
        let key: Vec<&'static str> = default::capabilities().filter(|name| has(name)).collect();
        if let Some(filter) = self.defaults.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(filter.clone());
        }
        let architectures: Vec<_> = ARCHITECTURES.iter().collect();
        let action = SeccompAction::Errno(libc::EPERM as u16);
        let filter = Arc::new(compile(0, &architectures, &default::rules(has), action)?);
        let mut defaults = self.defaults.lock().unwrap_or_else(PoisonError::into_inner);
        if defaults.len() >= REMEMBERED {
            defaults.clear();
        }
        defaults.insert(key, filter.clone());
        Ok(filter)
    }
}

fn of_profile(profile: &SeccompProfile, capabilities: &[String]) -> Result<Filter> {
    let has = |wanted: &String| capabilities.contains(wanted);
    let kernel = kernel_version();
    let names: usize = profile.rules.iter().map(|rule| rule.names.len()).sum();
    if profile.rules.len() > MAX_RULES || names > MAX_RULES {
        return Err(invalid(format!("the seccomp profile has more than {MAX_RULES} rules")));
    }
    let mut rules = Vec::new();
    for rule in &profile.rules {
        if rule.arguments.len() > MAX_ARGUMENTS || rule.arguments.iter().any(|argument| argument.index > 5) {
            return Err(invalid("the seccomp profile has a rule about arguments that no system call has"));
        }
        let applies = rule.with_capabilities.iter().all(has)
            && !rule.without_capabilities.iter().any(has)
            && rule.min_kernel.is_none_or(|version| kernel >= version);
        if applies {
            let names = rule.names.iter().map(String::as_str).collect();
            rules.push(Rule { names, action: rule.action, arguments: rule.arguments.clone() });
        }
    }
    let [own, others @ ..] = &ARCHITECTURES;
    let asked_for = others.iter().filter(|other| profile.architectures.contains(&other.kind));
    let architectures: Vec<_> = std::iter::once(own).chain(asked_for).collect();
    let mut flags = 0;
    if profile.log {
        flags |= libc::SECCOMP_FILTER_FLAG_LOG;
    }
    if profile.spec_allow {
        flags |= libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    }
    compile(flags as u32, &architectures, &rules, profile.default_action)
}

fn compile(
    flags: u32,
    architectures: &[&numbers::Architecture],
    rules: &[Rule<'_>],
    default: SeccompAction,
) -> Result<Filter> {
    let decided: Vec<_> = architectures
        .iter()
        .map(|architecture| (*architecture, decide(architecture, rules, default)))
        .collect();
    Ok(Filter::new(flags, &compile::program(&decided, default)?))
}

/// Major and minor version of the running kernel.
fn kernel_version() -> (u32, u32) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests;
