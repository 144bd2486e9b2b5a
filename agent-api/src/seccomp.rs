//! Which system calls a container may make: the rules of a profile, as Docker's and the OCI's files write them, in types.

use serde::{Deserialize, Serialize};

/// A container's system call filter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// What Docker allows when nothing is said, which depends on the container's capabilities.
    #[default]
    Default,
    /// No filter.
    Unconfined,
    /// Rules of the client's own.
    Profile(Box<SeccompProfile>),
}

/// A filter's rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeccompProfile {
    /// What happens to a call that no rule is about.
    pub default_action: SeccompAction,
    /// The architectures whose programs may run, besides the machine's own.
    #[serde(default)]
    pub architectures: Vec<SeccompArchitecture>,
    /// Log what is not allowed (SECCOMP_FILTER_FLAG_LOG).
    #[serde(default)]
    pub log: bool,
    /// Leave the speculative store bypass mitigation off (SECCOMP_FILTER_FLAG_SPEC_ALLOW).
    #[serde(default)]
    pub spec_allow: bool,
    /// The rules, in their order.
    pub rules: Vec<SeccompRule>,
}

/// An architecture whose programs a filter lets run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompArchitecture {
    /// 64-bit x86.
    X86_64,
    /// 32-bit x86.
    X86,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM.
    Arm,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompAction {
    /// It is made.
    Allow,
    /// It is made, and logged.
    Log,
    /// It fails with this error number.
    Errno(u16),
    /// A tracer decides; without one it fails with ENOSYS.
    Trace(u16),
    /// The thread gets SIGSYS.
    Trap,
    /// The thread ends.
    KillThread,
    /// The process ends.
    KillProcess,
}

/// A rule about some calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeccompRule {
    /// The calls' names; one that the guest's architecture does not have is no error.
    pub names: Vec<String>,
    /// What happens to them.
    pub action: SeccompAction,
    /// It is about calls with arguments for which all of these are true.
    #[serde(default)]
    pub arguments: Vec<SeccompArgument>,
    /// It is about containers that have all of these capabilities, `CAP_…`.
    #[serde(default)]
    pub with_capabilities: Vec<String>,
    /// It is about containers that have none of these capabilities.
    #[serde(default)]
    pub without_capabilities: Vec<String>,
    /// It is about kernels of this version, major and minor, and newer ones.
    #[serde(default)]
    pub min_kernel: Option<(u32, u32)>,
}

/// A condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeccompArgument {
    /// Which argument, 0 to 5.
    pub index: u8,
    /// How it is compared.
    pub operator: SeccompOperator,
    /// With what.
    pub value: u64,
}

/// A comparison of an argument with a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompOperator {
    /// Other than the value.
    NotEqual,
    /// Below the value.
    Less,
    /// Below or at the value.
    LessOrEqual,
    /// The value.
    Equal,
    /// Above or at the value.
    GreaterOrEqual,
    /// Above the value.
    Greater,
    /// The bits of this mask are those of the value.
    MaskedEqual(u64),
}
