//! Asks whether this machine's KVM can run stock code, by running a few 64-bit instructions to their end.
//!
//! Opening `/dev/kvm` proves little: on some machines that are guests themselves every instruction is emulated in software, and the
//! first one that the emulator does not know ends the guest. The instructions here are such ones. The file depends on nothing but the
//! KVM bindings, so that the build tool can include it as well.
#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};

/// Why KVM cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no KVM device.
    #[error("there is no /dev/kvm: the processor's virtualization is off, or the kvm module is not loaded")]
    Missing,
    /// The device is there and closed to this user.
    #[error("no permission to open /dev/kvm: add yourself to the group that owns it, usually kvm")]
    Denied,
    /// The device could not be opened for another reason.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] io::Error),
    /// The interface is not the one that every Linux since 2.6.22 has.
    #[error("/dev/kvm speaks version {0} of its interface instead of 12")]
    Version(i32),
    /// KVM lacks something that a virtual machine of ours is built on.
    #[error("this KVM lacks {0}")]
    Lacks(&'static str),
    /// KVM refused to set up the trial machine.
    #[error("KVM refused to {0}")]
    Refused(&'static str, #[source] io::Error),
    /// Stock instructions are not run as they should.
    #[error(
        "this KVM cannot run stock code: {0} (usual where the machine is itself a guest and its processor does not pass virtualization on)"
    )]
    CannotRun(String),
}

/// Runs a few 64-bit instructions (`pxor`, `lock cmpxchg16b`) in a machine of 32 KiB.
///
/// The machine has KVM's interrupt controllers although the code needs none: when the first processor without a local APIC comes, and
/// when the last one goes, KVM patches its code on all of the host's processors (`kvm_has_noapic_vcpu` in the kernel's
/// arch/x86/kvm/lapic.c), which machines that run would feel.
///
/// # Errors
/// Says in plain words what is missing.
pub fn probe() -> Result<(), ProbeError> {
    let kvm = Kvm::new().map_err(|error| match io::Error::from(error) {
        error if error.kind() == io::ErrorKind::NotFound => ProbeError::Missing,
        error if error.kind() == io::ErrorKind::PermissionDenied => ProbeError::Denied,
        error if matches!(error.raw_os_error(), Some(ENODEV | ENXIO)) => ProbeError::Missing,
        error => ProbeError::Open(error),
    })?;
    if kvm.get_api_version() != 12 {
        return Err(ProbeError::Version(kvm.get_api_version()));
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(ProbeError::Lacks(name));
        }
    }
    run_trial(&kvm)
}

const ENXIO: i32 = 6;
const ENODEV: i32 = 19;

const NEEDED: [(Cap, &str); 5] = [
    (Cap::UserMemory, "guest memory from user space"),
    (Cap::Irqchip, "an interrupt controller in the kernel"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::ExtCpuid, "CPUID for guests"),
];

/// A page of guest memory; the alignment is what KVM asks for.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

const PAGES: usize = 8;
/// Page tables: one entry in each of the first two levels, and one large page that covers the first gigabyte's first 2 MiB.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x5000;
const NEW_LOW: u64 = 0x0123_4567_89ab_cdef;
const NEW_HIGH: u64 = 0xfedc_ba98_7654_3210;

/// A port that nothing listens to: writing to it ends the trial.
const END_PORT: u8 = 0xf4;
/// `pxor %xmm0,%xmm0; lock cmpxchg16b (%rdi); out %al,$END_PORT`
const INSTRUCTIONS: [u8; 11] = [0x66, 0x0f, 0xef, 0xc0, 0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xe6, END_PORT];

fn run_trial(kvm: &Kvm) -> Result<(), ProbeError> {
    let mut memory = vec![Page([0; 4096]); PAGES];
    put(&mut memory, PML4, &(PDPT | 3).to_le_bytes());
    put(&mut memory, PDPT, &(PD | 3).to_le_bytes());
    put(&mut memory, PD, &0x83_u64.to_le_bytes());
    put(&mut memory, CODE, &INSTRUCTIONS);
    let address = memory.as_mut_ptr();

    let vm = kvm.create_vm().map_err(refused("make a virtual machine"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: (PAGES * size_of::<Page>()) as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the region is exactly the vector's storage, page aligned, and the vector is neither moved nor dropped before `vm` and `vcpu` are;
    // it is read again only after they are gone.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("take guest memory"))?;
    vm.create_irq_chip().map_err(refused("create interrupt controllers"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(refused("make a virtual processor"))?;
    let cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("tell the CPUID it supports"))?;
    vcpu.set_cpuid2(&cpuid).map_err(refused("set the CPUID"))?;
    enter_long_mode(&vcpu)?;

    let ended = match vcpu.run() {
        Ok(VcpuExit::IoOut(port, _)) if port == u16::from(END_PORT) => Ok(()),
        Ok(VcpuExit::InternalError) => {
            Err("it stops with an internal error at an instruction that it cannot emulate".to_owned())
        }
        Ok(other) => Err(format!("a trial of three instructions ended with {other:?}")),
        Err(error) => return Err(refused("run a virtual processor")(error)),
    };
    drop(vcpu);
    drop(vm);
    ended.map_err(ProbeError::CannotRun)?;
    if get(&memory, DATA) != NEW_LOW || get(&memory, DATA + 8) != NEW_HIGH {
        return Err(ProbeError::CannotRun("cmpxchg16b did not store what it was given".to_owned()));
    }
    Ok(())
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 16,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs: kvm_sregs = vcpu.get_sregs().map_err(refused("read registers"))?;
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
    sregs.efer = 0x500; // LME, LMA
    vcpu.set_sregs(&sregs).map_err(refused("enter 64-bit mode"))?;
    let regs =
        kvm_regs { rip: CODE, rflags: 2, rdi: DATA, rbx: NEW_LOW, rcx: NEW_HIGH, ..Default::default() };
    vcpu.set_regs(&regs).map_err(refused("set registers"))
}

fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |error| ProbeError::Refused(what, error.into())
}

fn put(memory: &mut [Page], address: u64, bytes: &[u8]) {
    let page = &mut memory[(address / 4096) as usize].0;
    let start = (address % 4096) as usize;
    page[start..start + bytes.len()].copy_from_slice(bytes);
}

fn get(memory: &[Page], address: u64) -> u64 {
    let start = (address % 4096) as usize;
    let bytes = &memory[(address / 4096) as usize].0[start..start + 8];
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
