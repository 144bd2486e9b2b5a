//! Where things stand in the guest's physical memory.

use vm_memory::GuestAddress;

use super::ArchError;

/// The GDT that the kernel is entered with.
pub(crate) const GDT: u64 = 0x500;
/// The zero page, `boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Page tables: one PML4, one PDPT, one page directory.
pub(crate) const PML4: u64 = 0x9000;
pub(crate) const PDPT: u64 = 0xa000;
pub(crate) const PAGE_DIRECTORY: u64 = 0xb000;
/// The command line.
pub(crate) const COMMAND_LINE: u64 = 0x20000;
pub(crate) const COMMAND_LINE_MAX: usize = 2048;
/// The MP configuration table; usable memory below 640 KiB ends here.
pub(crate) const MP_TABLE: u64 = 0x9f000;
/// The MP floating pointer, in the last KiB of low memory, where kernels look for it.
pub(crate) const MP_POINTER: u64 = 0x9fc00;
pub(crate) const LOW_MEMORY_END: u64 = 0xa0000;
/// Kernel and everything else begin here.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
/// Device registers; memory continues at 4 GiB.
pub(crate) const MMIO_BEGIN: u64 = 0xd000_0000;
pub(crate) const MMIO_END: u64 = 0x1_0000_0000;
/// Size of one device's register window.
pub(crate) const MMIO_WINDOW: u64 = 0x1000;
/// Three pages that KVM needs on Intel processors, and one before it.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Interrupt lines for virtio devices begin here and end before 16.
pub(crate) const FIRST_DEVICE_LINE: u32 = 5;
pub(crate) const SERIAL_LINE: u32 = 4;
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's command port: writing 0xfe resets the machine.
pub(crate) const RESET_PORT: u16 = 0x64;
pub(crate) const RESET_COMMAND: u8 = 0xfe;

/// The ranges of memory of a machine with this much of it.
pub(crate) fn memory_ranges(mib: u64) -> Result<Vec<(GuestAddress, usize)>, ArchError> {
    if !(64..=1 << 20).contains(&mib) || !mib.is_multiple_of(2) {
        return Err(ArchError::MemorySize(mib));
    }
    let size = mib << 20;
    let to_usize = |bytes: u64| usize::try_from(bytes).map_err(|_| ArchError::MemorySize(mib));
    let mut ranges = vec![(GuestAddress(0), to_usize(size.min(MMIO_BEGIN))?)];
    if size > MMIO_BEGIN {
        ranges.push((GuestAddress(MMIO_END), to_usize(size - MMIO_BEGIN)?));
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(512, &[(0, 512 << 20)])]
    #[case(3328, &[(0, 0xd000_0000)])]
    #[case(5120, &[(0, 0xd000_0000), (1 << 32, (5120 << 20) - 0xd000_0000)])]
    fn memory_leaves_the_device_hole_free(#[case] mib: u64, #[case] expected: &[(u64, usize)]) {
        let ranges = memory_ranges(mib).unwrap();
        assert_eq!(ranges.iter().map(|(a, l)| (a.0, *l)).collect::<Vec<_>>(), expected);
    }

    #[rstest::rstest]
    #[case(0)]
    #[case(62)]
    #[case(1025)]
    #[case(u64::MAX)]
    fn odd_sizes_are_refused(#[case] mib: u64) {
        assert!(matches!(memory_ranges(mib), Err(ArchError::MemorySize(_))));
    }
}
