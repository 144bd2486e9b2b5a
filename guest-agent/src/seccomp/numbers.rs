//! The system call numbers of the architectures whose programs this kernel runs.

use coracle_agent_api::SeccompArchitecture;

/// An architecture.
pub(super) struct Architecture {
    pub kind: SeccompArchitecture,
    /// `AUDIT_ARCH_…`.
    pub audit: u32,
    /// A call's number, if the architecture has it.
    pub number: fn(&str) -> Option<u32>,
    /// Numbers from here on are none of its own.
    pub end: Option<u32>,
}

macro_rules! number_in {
    ($sysno:path) => {
        |name| name.parse::<$sysno>().ok().and_then(|sysno| u32::try_from(sysno.id()).ok())
    };
}

/// The machine's own architecture first.
#[cfg(target_arch = "x86_64")]
pub(super) const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        kind: SeccompArchitecture::X86_64,
        audit: 0xc000_003e,
        number: number_in!(syscalls::x86_64::Sysno),
        // From here on they are x32's, whose calls see pointers of another size.
        end: Some(0x4000_0000),
    },
    Architecture {
        kind: SeccompArchitecture::X86,
        audit: 0x4000_0003,
        number: number_in!(syscalls::x86::Sysno),
        end: None,
    },
];

/// The machine's own architecture first.
#[cfg(target_arch = "aarch64")]
pub(super) const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        kind: SeccompArchitecture::Aarch64,
        audit: 0xc000_00b7,
        number: number_in!(syscalls::aarch64::Sysno),
        end: None,
    },
    Architecture {
        kind: SeccompArchitecture::Arm,
        audit: 0x4000_0028,
        number: number_in!(syscalls::arm::Sysno),
        end: None,
    },
];
