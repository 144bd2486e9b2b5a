//! Keeps KVM's code in the emulated machine as it is.
//!
//! KVM counts processors whose local APIC is off or missing, and when such a count leaves or reaches zero it patches its own code
//! (`apic_sw_disabled`, `apic_hw_disabled` and `kvm_has_noapic_vcpu` in the kernel's arch/x86/kvm/lapic.c), which happens with nearly each
//! machine that starts; the scheduler's code changes with the first and the last machine (`preempt_notifier_key` in kernel/sched/core.c).
//! QEMU before 8.1 can miss such a change when one emulated processor translates the code at the very moment when another one writes
//! it, and then runs the old code for ever: both processors spin, and the lab hangs. A machine that is never run and stays keeps all
//! these counts above zero; it is made before the lab's other processors start. (A newer QEMU is no way out: with 10.0, guests of the
//! lab stopped answering in about one of six boots.)

use std::io::Write as _;

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

/// Makes the machines, says so on standard output, and holds them until it is killed.
pub(crate) fn run() -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("cannot make a virtual machine")?;
    vm.create_irq_chip().context("cannot make interrupt controllers")?;
    let with_apic = vm.create_vcpu(0).context("cannot make a virtual processor")?;
    let mut registers = with_apic.get_sregs().context("cannot read a virtual processor's registers")?;
    registers.apic_base = 0;
    with_apic.set_sregs(&registers).context("cannot switch a local APIC off")?;
    let without = kvm.create_vm().context("cannot make a virtual machine")?;
    let without_apic = without.create_vcpu(0).context("cannot make a virtual processor")?;

    let mut out = std::io::stdout();
    writeln!(out, "held").and_then(|()| out.flush()).context("cannot say that KVM is held")?;
    loop {
        std::thread::park();
        let _ = (&with_apic, &without_apic);
    }
}
