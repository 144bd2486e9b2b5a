//! `--security-opt seccomp=…`: Docker's JSON of a profile, which the client sends whole, as rules for the agent.
//!
//! The agent makes a filter of the rules; here the file's form is checked, with Docker's words for what is wrong with it, so that
//! a bad profile is refused when the container is created.

use coracle_agent_api::{
    Seccomp, SeccompAction, SeccompArchitecture, SeccompArgument, SeccompOperator, SeccompProfile,
    SeccompRule,
};
use serde::Deserialize;

use crate::error::{Error, Result};

/// A longer text is no profile.
const MAX_PROFILE: usize = 512 * 1024;
/// What a call fails with when a profile says that it fails, and not how.
const EPERM: u16 = 1;

#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u16>,
    architectures: Option<Vec<String>>,
    arch_map: Option<Vec<ArchitectureEntry>>,
    flags: Option<Vec<String>>,
    listener_path: String,
    syscalls: Option<Vec<Rule>>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct ArchitectureEntry {
    architecture: String,
    sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Rule {
    name: String,
    names: Option<Vec<String>>,
    action: String,
    errno_ret: Option<u16>,
    args: Option<Vec<Argument>>,
    includes: Option<Filter>,
    excludes: Option<Filter>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Argument {
    index: u64,
    value: u64,
    value_two: u64,
    op: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Filter {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

/// Reads the value of `seccomp=`.
pub(crate) fn parse(text: &str) -> Result<Seccomp> {
    match text {
        "unconfined" => return Ok(Seccomp::Unconfined),
        "" | "builtin" => return Ok(Seccomp::Default),
        _ => {}
    }
    if text.len() > MAX_PROFILE {
        return Err(bad("it is longer than 512 KiB"));
    }
    let profile: Profile = serde_json::from_str(text).map_err(bad)?;
    Ok(Seccomp::Profile(Box::new(profile.rules()?)))
}

fn bad(reason: impl std::fmt::Display) -> Error {
    Error::invalid(format!("Decoding seccomp profile failed: {reason}"))
}

impl Profile {
    fn rules(self) -> Result<SeccompProfile> {
        if !self.listener_path.is_empty() {
            return Err(bad(
                "listenerPath is not supported by Coracle: no program on the host decides for a container",
            ));
        }
        let (mut log, mut spec_allow) = (false, false);
        for flag in self.flags.iter().flatten() {
            match flag.as_str() {
                "SECCOMP_FILTER_FLAG_LOG" => log = true,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => spec_allow = true,
                // There is one thread when the filter is installed.
                "SECCOMP_FILTER_FLAG_TSYNC" => {}
                other => return Err(bad(format!("the flag {other} is not supported by Coracle"))),
            }
        }
        let default_action = action(&self.default_action, self.default_errno_ret)?;
        let architectures = self.architectures()?;
        let mut rules = Vec::new();
        for rule in self.syscalls.into_iter().flatten() {
            rule.add_to(&mut rules)?;
        }
        Ok(SeccompProfile { default_action, architectures, log, spec_allow, rules })
    }

    /// The architectures beside the machine's own.
    fn architectures(&self) -> Result<Vec<SeccompArchitecture>> {
        let listed = self.architectures.as_ref().filter(|all| !all.is_empty());
        let mapped = self.arch_map.as_ref().filter(|all| !all.is_empty());
        let names: Vec<&String> = match (listed, mapped) {
            (Some(_), Some(_)) => {
                return Err(bad(
                    "both 'architectures' and 'archMap' are specified in the seccomp profile, use either 'architectures' or 'archMap'",
                ));
            }
            (Some(names), None) => names.iter().collect(),
            (None, Some(map)) => {
                let own = map.iter().find(|entry| entry.architecture == own_architecture().1);
                own.into_iter().flat_map(|entry| entry.sub_architectures.iter().flatten()).collect()
            }
            (None, None) => Vec::new(),
        };
        let known = |name: &&String| match name.as_str() {
            "SCMP_ARCH_X86_64" => Some(SeccompArchitecture::X86_64),
            "SCMP_ARCH_X86" => Some(SeccompArchitecture::X86),
            "SCMP_ARCH_AARCH64" => Some(SeccompArchitecture::Aarch64),
            "SCMP_ARCH_ARM" => Some(SeccompArchitecture::Arm),
            // Programs of the others do not run on this machine.
            _ => None,
        };
        match names.iter().find(|name| !name.starts_with("SCMP_ARCH_")) {
            Some(name) => Err(bad(format!("string {name} is not a valid arch for seccomp"))),
            None => Ok(names.iter().filter_map(known).collect()),
        }
    }
}

/// The machine's architecture as Go and as libseccomp call it.
fn own_architecture() -> (&'static str, &'static str) {
    if cfg!(target_arch = "aarch64") { ("arm64", "SCMP_ARCH_AARCH64") } else { ("amd64", "SCMP_ARCH_X86_64") }
}

impl Rule {
    /// Adds the rule as one or more.
    fn add_to(self, rules: &mut Vec<SeccompRule>) -> Result<()> {
        let mut names = self.names.unwrap_or_default();
        if !self.name.is_empty() {
            if !names.is_empty() {
                return Err(bad(
                    "both 'name' and 'names' are specified in the seccomp profile, use either 'name' or 'names'",
                ));
            }
            names.push(self.name);
        }
        let action = action(&self.action, self.errno_ret)?;
        let (includes, excludes) = (self.includes.unwrap_or_default(), self.excludes.unwrap_or_default());
        let own = own_architecture().0;
        let names_own = |arches: &Vec<String>| arches.iter().any(|name| name == own);
        if includes.arches.as_ref().is_some_and(|arches| !arches.is_empty() && !names_own(arches))
            || excludes.arches.as_ref().is_some_and(names_own)
        {
            return Ok(());
        }
        let arguments = self.args.iter().flatten().map(argument).collect::<Result<Vec<_>>>()?;
        let rule = SeccompRule {
            names,
            action,
            arguments,
            with_capabilities: includes.caps.unwrap_or_default(),
            without_capabilities: excludes.caps.unwrap_or_default(),
            min_kernel: includes.min_kernel.as_deref().map(kernel).transpose()?,
        };
        let mut seen = [0; 6];
        for argument in &rule.arguments {
            seen[usize::from(argument.index)] += 1;
        }
        if seen.iter().any(|count| *count > 1) {
            // As in runc: several conditions on one argument are several rules.
            rules.extend(
                rule.arguments.iter().map(|one| SeccompRule { arguments: vec![*one], ..rule.clone() }),
            );
        } else {
            rules.push(rule);
        }
        Ok(())
    }
}

fn action(name: &str, errno: Option<u16>) -> Result<SeccompAction> {
    let number = errno.unwrap_or(EPERM);
    if number > 4095 {
        return Err(bad(format!("{number} is no error number")));
    }
    Ok(match name {
        "SCMP_ACT_ALLOW" => SeccompAction::Allow,
        "SCMP_ACT_LOG" => SeccompAction::Log,
        "SCMP_ACT_ERRNO" => SeccompAction::Errno(number),
        "SCMP_ACT_TRACE" => SeccompAction::Trace(number),
        "SCMP_ACT_TRAP" => SeccompAction::Trap,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => SeccompAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => SeccompAction::KillProcess,
        "SCMP_ACT_NOTIFY" => {
            return Err(bad(
                "SCMP_ACT_NOTIFY is not supported by Coracle: no program on the host decides for a container",
            ));
        }
        other => return Err(bad(format!("string {other} is not a valid action for seccomp"))),
    })
}

fn argument(argument: &Argument) -> Result<SeccompArgument> {
    let index = u8::try_from(argument.index)
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| bad(format!("a system call has no argument {}", argument.index)))?;
    let mut value = argument.value;
    let operator = match argument.op.as_str() {
        "SCMP_CMP_NE" => SeccompOperator::NotEqual,
        "SCMP_CMP_LT" => SeccompOperator::Less,
        "SCMP_CMP_LE" => SeccompOperator::LessOrEqual,
        "SCMP_CMP_EQ" => SeccompOperator::Equal,
        "SCMP_CMP_GE" => SeccompOperator::GreaterOrEqual,
        "SCMP_CMP_GT" => SeccompOperator::Greater,
        "SCMP_CMP_MASKED_EQ" => {
            value = argument.value_two;
            SeccompOperator::MaskedEqual(argument.value)
        }
        other => return Err(bad(format!("string {other} is not a valid operator for seccomp"))),
    };
    Ok(SeccompArgument { index, operator, value })
}

fn kernel(text: &str) -> Result<(u32, u32)> {
    let parse = || {
        let (major, minor) = text.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    parse().ok_or_else(|| bad(format!("invalid kernel version: {text}, expected \"<kernel>.<major>\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(json: &str) -> SeccompProfile {
        match parse(json).unwrap() {
            Seccomp::Profile(profile) => *profile,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_words_that_are_no_profile() {
        assert_eq!(parse("unconfined").unwrap(), Seccomp::Unconfined);
        assert_eq!(parse("builtin").unwrap(), Seccomp::Default);
    }

    #[test]
    fn a_profile_becomes_rules() {
        let read = profile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"flags":["SECCOMP_FILTER_FLAG_LOG"],
                "archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]},
                           {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]}],
                "syscalls":[
                  {"names":["read","write"],"action":"SCMP_ACT_ALLOW","args":null,"comment":"","includes":{},"excludes":{}},
                  {"name":"clone","action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":64,"valueTwo":1,"op":"SCMP_CMP_MASKED_EQ"}],
                   "includes":{"minKernel":"4.8"},"excludes":{"caps":["CAP_SYS_ADMIN"]}},
                  {"name":"personality","action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
                  {"name":"elsewhere","action":"SCMP_ACT_ALLOW","includes":{"arches":["s390x"]}}]}"#,
        );
        assert_eq!(read.default_action, SeccompAction::Errno(38));
        assert_eq!((read.log, read.architectures.len(), read.rules.len()), (true, 1, 4));
        assert_eq!(read.rules[0].names, ["read", "write"]);
        let clone = &read.rules[1];
        let condition = SeccompArgument { index: 0, operator: SeccompOperator::MaskedEqual(64), value: 1 };
        assert_eq!((clone.arguments.as_slice(), clone.min_kernel), (&[condition][..], Some((4, 8))));
        assert_eq!(clone.without_capabilities, ["CAP_SYS_ADMIN"]);
        assert_eq!(read.rules[3].arguments[0].value, 8);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (json, words) in [
            ("{", "EOF"),
            ("[]", "not a valid action"),
            ("7", "invalid type"),
            ("/etc/profile.json", "expected value"),
            (r#"{"defaultAction":"ALLOW"}"#, "string ALLOW is not a valid action"),
            (r#"{}"#, "not a valid action"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["X86"]}"#, "not a valid arch"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"archMap":[{"architecture":"x"}]}"#,
                "both 'architectures' and 'archMap'",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"a","names":["b"],"action":"SCMP_ACT_TRAP"}]}"#,
                "both 'name' and 'names'",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"a","action":"SCMP_ACT_TRAP","args":[{"index":9,"op":"SCMP_CMP_EQ"}]}]}"#,
                "no argument 9",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"name":"a","action":"SCMP_ACT_NOTIFY"}]}"#,
                "SCMP_ACT_NOTIFY",
            ),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["X"]}"#, "the flag X"),
        ] {
            let error = parse(json).unwrap_err();
            assert_eq!(error.status(), 400);
            assert!(error.to_string().contains(words), "{json}: {error}");
        }
    }
}
