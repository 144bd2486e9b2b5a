//! What depends on the processor's architecture: the memory map, the boot protocol, the state of a processor at start.

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
