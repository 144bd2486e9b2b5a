//! The state of a processor at start, as the 64-bit boot protocol wants it. Other processors than the first wait for
//! the kernel to start them.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::{ArchError, layout};

const CR0_PROTECTION: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const GDT_LIMIT: u16 = 5 * 8 - 1;
const RFLAGS_RESERVED: u64 = 2;
const FPU_CONTROL_WORD: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// Enabled, write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;
const DELIVERY_EXTERNAL: u32 = 0x700;

/// Prepares every processor.
pub(crate) fn configure(vcpu: &VcpuFd) -> Result<(), ArchError> {
    set_msrs(vcpu)?;
    set_local_interrupts(vcpu)
}

/// Prepares the processor that enters the kernel at `entry`.
pub(crate) fn configure_boot(vcpu: &VcpuFd, entry: u64) -> Result<(), ArchError> {
    let regs = kvm_regs { rip: entry, rsi: layout::ZERO_PAGE, rflags: RFLAGS_RESERVED, ..Default::default() };
    vcpu.set_regs(&regs).map_err(refused("registers"))?;
    let fpu = kvm_fpu { fcw: FPU_CONTROL_WORD, mxcsr: MXCSR, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(refused("floating point state"))?;
    let mut sregs = vcpu.get_sregs().map_err(refused("segment registers"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(refused("segment registers"))
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> ArchError {
    move |error| ArchError::Processor { what, source: error.into() }
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    let data = segment(DATA_SELECTOR, 3, false);
    sregs.cs = segment(CODE_SELECTOR, 11, true);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { s: 0, db: 0, ..segment(TASK_SELECTOR, 11, false) };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.limit = 0;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PROTECTION | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let entries = [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEFAULT, MTRR_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| ArchError::Processor {
        what: "model specific registers",
        source: std::io::ErrorKind::InvalidInput.into(),
    })?;
    // A register that this processor does not have is not needed either: only the call itself must succeed.
    vcpu.set_msrs(&msrs).map_err(refused("model specific registers")).map(drop)
}

/// The legacy interrupt controller arrives at LINT0, NMIs at LINT1.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let mut lapic = vcpu.get_lapic().map_err(refused("interrupt controller"))?;
    for (register, mode) in [(LAPIC_LINT0, DELIVERY_EXTERNAL), (LAPIC_LINT1, DELIVERY_NMI)] {
        let value = lapic_register(&lapic, register) & !DELIVERY_MODE_MASK | mode;
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(refused("interrupt controller"))
}

fn lapic_register(lapic: &kvm_lapic_state, register: usize) -> u32 {
    let mut bytes = [0; 4];
    for (byte, value) in bytes.iter_mut().zip(&lapic.regs[register..register + 4]) {
        *byte = value.cast_unsigned();
    }
    u32::from_le_bytes(bytes)
}
