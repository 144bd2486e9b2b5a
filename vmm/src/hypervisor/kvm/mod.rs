//! Linux KVM, with its interrupt controllers in the kernel. `/dev/kvm` is the only path that the VMM ever opens, and it
//! is opened before anything else.

mod kick;
mod vcpu;

use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestMemory, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Hypervisor, HypervisorError, Line, Machine, Processor, Start};
use crate::arch::x86_64::{cpu, cpuid, layout};
use crate::memory::Memory;

pub(crate) use kick::kick;

/// An open `/dev/kvm`.
#[derive(Debug)]
pub(crate) struct KvmHypervisor {
    kvm: Kvm,
}

impl KvmHypervisor {
    pub(crate) fn open() -> Result<Self, HypervisorError> {
        Kvm::new().map(|kvm| Self { kvm }).map_err(refused("open /dev/kvm"))
    }

    /// Its descriptor, to be kept when stray ones are closed.
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.kvm.as_raw_fd()
    }
}

fn refused(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HypervisorError {
    move |error| HypervisorError::Refused { action, source: error.into() }
}

impl Hypervisor for KvmHypervisor {
    fn create_machine(&self, memory: &Memory) -> Result<Box<dyn Machine>, HypervisorError> {
        let vm = create_vm(&self.kvm)?;
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell the CPUID it supports"))?;
        let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        vm.set_tss_address(layout::KVM_TSS).map_err(refused("set the task state's address"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(refused("set the identity map's address"))?;
        vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
        if cpuid::needs_pit(supported.as_slice(), tsc_deadline) {
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(config).map_err(refused("create the interval timer"))?;
        }
        map_memory(&vm, memory)?;
        Ok(Box::new(KvmMachine {
            vm,
            // The descriptors and mappings of guest memory live as long as the machine.
            _memory: memory.clone(),
            supported,
            tsc_deadline,
            max_vcpus: u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        }))
    }
}

/// A signal can interrupt the creation of a machine; it is then tried again.
fn create_vm(kvm: &Kvm) -> Result<VmFd, HypervisorError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(refused("create a machine")),
        }
    }
}

#[allow(unsafe_code)]
fn map_memory(vm: &VmFd, memory: &Memory) -> Result<(), HypervisorError> {
    for (slot, region) in memory.iter().enumerate() {
        let address =
            region.get_host_address(MemoryRegionAddress(0)).map_err(|_| HypervisorError::Refused {
                action: "find the guest's memory",
                source: std::io::ErrorKind::InvalidInput.into(),
            })?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: address as u64,
        };
        // SAFETY: the region describes one mapping, which `KvmMachine` keeps alive; all of our own accesses to it are
        // volatile.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("map the guest's memory"))?;
    }
    Ok(())
}

struct KvmMachine {
    vm: VmFd,
    _memory: Memory,
    supported: CpuId,
    tsc_deadline: bool,
    max_vcpus: u32,
}

impl Machine for KvmMachine {
    fn connect_line(&self, event: &EventFd, line: Line) -> Result<(), HypervisorError> {
        self.vm.register_irqfd(event, line.0).map_err(refused("connect an interrupt line"))
    }

    fn connect_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), HypervisorError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(refused("connect a doorbell"))
    }

    fn create_processors(&self, start: Start) -> Result<Vec<Box<dyn Processor>>, HypervisorError> {
        if start.vcpus > self.max_vcpus {
            return Err(HypervisorError::TooManyProcessors { asked: start.vcpus, most: self.max_vcpus });
        }
        (0..start.vcpus).map(|index| self.create_processor(index, start)).collect()
    }
}

impl KvmMachine {
    fn create_processor(&self, index: u32, start: Start) -> Result<Box<dyn Processor>, HypervisorError> {
        let vcpu = self.vm.create_vcpu(u64::from(index)).map_err(refused("create a processor"))?;
        let topology = cpuid::Topology { index, vcpus: start.vcpus, tsc_deadline: self.tsc_deadline };
        let entries = cpuid::adapt(self.supported.as_slice(), topology);
        let cpuid = CpuId::from_entries(&entries).map_err(|_| HypervisorError::Refused {
            action: "take that many CPUID leaves",
            source: std::io::ErrorKind::InvalidInput.into(),
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(refused("set a processor's CPUID"))?;
        cpu::configure(&vcpu)?;
        if index == 0 {
            cpu::configure_boot(&vcpu, start.entry)?;
        }
        Ok(Box::new(vcpu::KvmProcessor::new(vcpu)))
    }
}
