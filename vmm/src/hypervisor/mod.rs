//! What a machine needs of a hypervisor: memory, processors, interrupt lines and doorbells. Nothing outside of a
//! hypervisor's own module and `arch` knows which one it is.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) mod kvm;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;

/// An interrupt line of the machine's interrupt controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line(pub(crate) u32);

/// Why the hypervisor refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HypervisorError {
    #[error("the hypervisor cannot {action}")]
    Refused {
        action: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("this host's hypervisor runs machines with at most {most} processors, not {asked}")]
    TooManyProcessors { asked: u32, most: u32 },
    #[error(transparent)]
    Arch(#[from] crate::arch::x86_64::ArchError),
}

/// How many processors and where the first one begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) vcpus: u32,
    pub(crate) entry: u64,
}

/// Makes machines.
pub(crate) trait Hypervisor: Send {
    /// Makes a machine around this memory.
    fn create_machine(&self, memory: &Memory) -> Result<Box<dyn Machine>, HypervisorError>;
}

/// A machine without its devices.
pub(crate) trait Machine: Send {
    /// Raises a line whenever the event is signalled.
    fn connect_line(&self, event: &EventFd, line: Line) -> Result<(), HypervisorError>;
    /// Signals the event whenever the guest writes this 32-bit value to this address.
    fn connect_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), HypervisorError>;
    /// Makes all processors, in order.
    fn create_processors(&self, start: Start) -> Result<Vec<Box<dyn Processor>>, HypervisorError>;
}

/// A virtual processor; it belongs to the thread that runs it.
pub(crate) trait Processor: Send {
    /// Runs until the guest needs the VMM; register accesses are answered by `bus`.
    fn run(&mut self, bus: &dyn Bus) -> Exit;
    /// Called on the processor's thread before its first run: from then on, [`kick`] interrupts `run`.
    fn prepare_thread(&mut self);
    /// Called after a pause, so that the guest does not take the lost time for a lockup.
    fn resumed(&mut self);
}

/// Interrupts the processor that runs on a thread, or will run there next. It returns [`Exit::Interrupted`].
pub(crate) use platform::kick;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use kvm as platform;

/// Why [`Processor::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Exit {
    MmioRead,
    MmioWrite,
    PioRead,
    PioWrite,
    /// The guest asked to be reset by a register write.
    Reset,
    /// A triple fault, or the processor was shut down.
    Shutdown,
    /// Kicked.
    Interrupted,
    /// Something that needs nothing.
    Other,
    /// The processor cannot go on.
    Failed(String),
}

/// What a register write led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Continue,
    Reset,
}

/// The machine's registers, called from all processors' threads.
pub(crate) trait Bus: Sync {
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    fn mmio_write(&self, address: u64, data: &[u8]);
    fn pio_read(&self, port: u16, data: &mut [u8]);
    fn pio_write(&self, port: u16, data: &[u8]) -> Flow;
}
