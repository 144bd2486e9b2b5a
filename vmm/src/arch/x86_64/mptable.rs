//! The MultiProcessor table (Intel MP specification 1.4): how the kernel learns of processors and interrupt lines
//! without ACPI.

use super::layout;
use crate::memory::{self, Memory, MemoryError};

const SPECIFICATION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;
const PROCESSOR_FEATURES_APIC_FPU: u32 = 0x201;
const PROCESSOR_SIGNATURE: u32 = 0x600;
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const INTERRUPT_NORMAL: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
const LINES: u8 = 24;

/// Writes the floating pointer and the table for `vcpus` processors, whose APIC ids are 0, 1, 2, …
pub(super) fn write(memory: &Memory, vcpus: u8) -> Result<(), MemoryError> {
    memory::write(memory, layout::MP_TABLE, &table(vcpus))?;
    memory::write(memory, layout::MP_POINTER, &pointer())
}

fn pointer() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&(layout::MP_TABLE as u32).to_le_bytes());
    bytes[8] = 1;
    bytes[9] = SPECIFICATION;
    bytes[10] = checksum(&bytes);
    bytes
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic = vcpus.saturating_add(1);
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = PROCESSOR_ENABLED | if id == 0 { PROCESSOR_BOOT } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, id, APIC_VERSION, flags];
        entry.extend_from_slice(&PROCESSOR_SIGNATURE.to_le_bytes());
        entry.extend_from_slice(&PROCESSOR_FEATURES_APIC_FPU.to_le_bytes());
        entry.extend_from_slice(&[0; 8]);
        add(&entry);
    }
    add(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut entry = vec![ENTRY_IO_APIC, io_apic, APIC_VERSION, 1];
    entry.extend_from_slice(&layout::IO_APIC.to_le_bytes());
    add(&entry);
    for line in 0..LINES {
        add(&[ENTRY_INTERRUPT, INTERRUPT_NORMAL, 0, 0, 0, line, io_apic, line]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, 0, 0, 0, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut bytes = vec![0; 44];
    bytes[..4].copy_from_slice(b"PCMP");
    bytes[4..6].copy_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    bytes[6] = SPECIFICATION;
    bytes[8..16].copy_from_slice(b"CORACLE ");
    bytes[16..28].copy_from_slice(b"000000000000");
    bytes[34..36].copy_from_slice(&count.to_le_bytes());
    bytes[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    bytes.extend_from_slice(&entries);
    bytes[7] = checksum(&bytes);
    bytes
}

/// What makes the sum of all bytes zero, the checksum's own being zero now.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_sums_to_zero_and_fits_for_every_number_of_processors() {
        for vcpus in 1..=64 {
            let bytes = table(vcpus);
            assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert!(layout::MP_TABLE + bytes.len() as u64 <= layout::MP_POINTER);
            let length = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
            assert_eq!(length, bytes.len());
        }
        assert_eq!(pointer().iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }
}
