//! A KVM processor: turns KVM's exits into calls of the bus.
#![allow(unsafe_code)]

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::super::{Bus, Exit, Flow, Processor};
use super::kick;

pub(super) struct KvmProcessor {
    vcpu: VcpuFd,
    registered: bool,
}

impl KvmProcessor {
    pub(super) fn new(vcpu: VcpuFd) -> Self {
        kick::install();
        Self { vcpu, registered: false }
    }
}

impl Processor for KvmProcessor {
    fn run(&mut self, bus: &dyn Bus) -> Exit {
        match self.vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.mmio_read(address, data);
                Exit::MmioRead
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.mmio_write(address, data);
                Exit::MmioWrite
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.pio_read(port, data);
                Exit::PioRead
            }
            Ok(VcpuExit::IoOut(port, data)) => match bus.pio_write(port, data) {
                Flow::Continue => Exit::PioWrite,
                Flow::Reset => Exit::Reset,
            },
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::Intr) => self.interrupted(),
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => Exit::Other,
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(other) => Exit::Failed(format!("unexpected exit: {other:?}")),
            Err(error) if error.errno() == libc::EINTR => self.interrupted(),
            Err(error) if error.errno() == libc::EAGAIN => Exit::Other,
            Err(error) => Exit::Failed(format!("KVM_RUN: {error}")),
        }
    }

    fn prepare_thread(&mut self) {
        let flag = &raw mut self.vcpu.get_kvm_run().immediate_exit;
        // SAFETY: the byte lies in the mapping that `vcpu` owns, and `drop` unregisters it before that goes away. The
        // processor is dropped on the thread that runs it.
        unsafe { kick::register(flag) };
        self.registered = true;
    }

    fn resumed(&mut self) {
        // Refused when the guest does not use the clock; then there is nothing to tell it.
        let _ = self.vcpu.kvmclock_ctrl();
    }
}

impl KvmProcessor {
    fn interrupted(&mut self) -> Exit {
        self.vcpu.set_kvm_immediate_exit(0);
        Exit::Interrupted
    }

    fn internal_error(&mut self) -> Exit {
        let rip = self.vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
        // SAFETY: KVM filled this part of the union, since the exit reason is KVM_EXIT_INTERNAL_ERROR.
        let suberror = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        Exit::Failed(format!("KVM internal error {suberror} at instruction {rip:#x}"))
    }
}

impl Drop for KvmProcessor {
    fn drop(&mut self) {
        if self.registered {
            kick::unregister();
        }
    }
}
