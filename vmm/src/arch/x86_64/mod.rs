//! x86-64: a Linux kernel is entered directly in 64-bit mode. There is no firmware, no ACPI and no PCI; processors and
//! interrupts are described by an MP table, devices by the kernel's command line.

pub(crate) mod boot;
pub(crate) mod cpu;
pub(crate) mod cpuid;
mod kernel;
pub(crate) mod layout;
mod mptable;

/// Most processors of a machine.
pub(crate) const MAX_VCPUS: u32 = 64;

/// Why a machine could not be prepared for boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchError {
    #[error("{0} MiB of memory are not possible: give at least 64 MiB, at most 1 TiB, and an even number")]
    MemorySize(u64),
    #[error("the kernel is not an uncompressed 64-bit x86 Linux image: {0}")]
    NotAKernel(&'static str),
    #[error("the kernel is truncated: {what} reaches to byte {end}, the file's part has {len}")]
    KernelTruncated { what: &'static str, end: u64, len: u64 },
    #[error("the kernel does not fit: {address:#x} to {end:#x} is outside of the guest's memory")]
    KernelOutside { address: u64, end: u64 },
    #[error("{what} lies at {end} of its file, which has only {len} bytes")]
    FileTooShort { what: &'static str, end: u64, len: u64 },
    #[error("the initramfs of {0} bytes does not fit into the guest's memory")]
    InitramfsTooLarge(u64),
    #[error("the kernel command line is {0} bytes long; at most 2047 are possible")]
    CommandLineTooLong(usize),
    #[error("the kernel command line contains a character that is not printable ASCII")]
    CommandLineCharacters,
    #[error("cannot read {what}")]
    Read {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot put {what} into guest memory")]
    Memory {
        what: &'static str,
        #[source]
        source: crate::memory::MemoryError,
    },
    #[error("the hypervisor refused the processor's {what}")]
    Processor {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}
