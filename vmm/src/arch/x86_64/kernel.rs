//! Loads an uncompressed `vmlinux` (ELF) into guest memory. The file is checked as if it were hostile: every offset,
//! length and address.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemory};

use super::{ArchError, layout};
use crate::control::FileRegion;
use crate::memory::{self, Memory};

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const MAX_PROGRAM_HEADERS: u16 = 64;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const SEGMENT_LOAD: u32 = 1;

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LoadedKernel {
    /// Physical address of the 64-bit entry point.
    pub(super) entry: u64,
    /// First address after the kernel, its zeroed data included.
    pub(super) end: u64,
}

struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    end: u64,
}

/// Copies the kernel's segments to the addresses it asks for.
pub(super) fn load(memory: &Memory, file: &File, region: FileRegion) -> Result<LoadedKernel, ArchError> {
    let mut header = [0; ELF_HEADER];
    read_part(file, region, 0, &mut header, "the ELF header")?;
    if header[..4] != *b"\x7fELF" {
        return Err(ArchError::NotAKernel(
            "it does not begin with an ELF header (is it a compressed bzImage?)",
        ));
    }
    if header[4] != 2 || header[5] != 1 || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(ArchError::NotAKernel("it is an ELF file for another machine"));
    }
    if ![TYPE_EXECUTABLE, TYPE_SHARED].contains(&u16_at(&header, 16)) {
        return Err(ArchError::NotAKernel("it is an ELF file that is not executable"));
    }
    let (entry, table) = (u64_at(&header, 24), u64_at(&header, 32));
    let (entry_size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(entry_size) != PROGRAM_HEADER || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(ArchError::NotAKernel("its program headers are malformed"));
    }
    let mut headers = vec![0; PROGRAM_HEADER * usize::from(count)];
    read_part(file, region, table, &mut headers, "the program header table")?;
    let segments = headers
        .chunks_exact(PROGRAM_HEADER)
        .filter(|header| u32_at(header, 0) == SEGMENT_LOAD && u64_at(header, 40) > 0)
        .map(|header| check_segment(memory, region, header))
        .collect::<Result<Vec<_>, _>>()?;
    if !segments.iter().any(|segment| (segment.address..segment.end).contains(&entry)) {
        return Err(ArchError::NotAKernel("its entry point is in none of its segments"));
    }
    for segment in &segments {
        memory::load_file(memory, segment.address, file, region.offset + segment.offset, segment.file_size)
            .map_err(|source| ArchError::Memory { what: "the kernel", source })?;
    }
    let end = segments.iter().map(|segment| segment.end).max().unwrap_or(0);
    Ok(LoadedKernel { entry, end })
}

fn check_segment(memory: &Memory, region: FileRegion, header: &[u8]) -> Result<Segment, ArchError> {
    let (offset, address) = (u64_at(header, 8), u64_at(header, 24));
    let (file_size, memory_size) = (u64_at(header, 32), u64_at(header, 40));
    if file_size > memory_size {
        return Err(ArchError::NotAKernel("a segment is larger in the file than in memory"));
    }
    let file_end = offset.saturating_add(file_size);
    if file_end > region.len {
        return Err(ArchError::KernelTruncated { what: "a segment", end: file_end, len: region.len });
    }
    let end = address.saturating_add(memory_size);
    let fits =
        usize::try_from(memory_size).is_ok_and(|size| memory.get_slice(GuestAddress(address), size).is_ok());
    if address < layout::HIGH_MEMORY || !fits {
        return Err(ArchError::KernelOutside { address, end });
    }
    Ok(Segment { offset, address, file_size, end })
}

fn read_part(
    file: &File,
    region: FileRegion,
    offset: u64,
    buffer: &mut [u8],
    what: &'static str,
) -> Result<(), ArchError> {
    let end = offset.saturating_add(buffer.len() as u64);
    if end > region.len {
        return Err(ArchError::KernelTruncated { what, end, len: region.len });
    }
    file.read_exact_at(buffer, region.offset.saturating_add(offset))
        .map_err(|source| ArchError::Read { what: "the kernel", source })
}

/// The callers' offsets are constants within buffers of constant size.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    /// An ELF file with one segment of 0x1800 bytes at 0x1000, loaded to 0x200000 with 0x3000 bytes of memory.
    pub(in crate::arch::x86_64) fn image() -> Vec<u8> {
        let mut bytes = vec![0; 0x2800];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16..18].copy_from_slice(&2u16.to_le_bytes());
        bytes[18..20].copy_from_slice(&62u16.to_le_bytes());
        bytes[24..32].copy_from_slice(&0x20_0010u64.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_le_bytes());
        let header = &mut bytes[64..120];
        header[0..4].copy_from_slice(&1u32.to_le_bytes());
        for (at, value) in [(8, 0x1000u64), (24, 0x20_0000), (32, 0x1800), (40, 0x3000)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes[0x1000..].fill(0xab);
        bytes
    }

    fn try_load(bytes: &[u8]) -> Result<LoadedKernel, ArchError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let memory = memory::allocate(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let kernel = load(&memory, &file, FileRegion { offset: 0, len: bytes.len() as u64 })?;
        let (mut inside, mut after) = ([0; 1], [0; 1]);
        memory.read_slice(&mut inside, GuestAddress(0x20_17ff)).unwrap();
        memory.read_slice(&mut after, GuestAddress(0x20_1800)).unwrap();
        assert_eq!((inside, after), ([0xab], [0]));
        Ok(kernel)
    }

    #[test]
    fn a_segment_lands_at_its_physical_address() {
        assert_eq!(try_load(&image()).unwrap(), LoadedKernel { entry: 0x20_0010, end: 0x20_3000 });
    }

    #[rstest::rstest]
    #[case::not_elf(0, b"MZ", "not an uncompressed")]
    #[case::other_machine(18, &[183, 0], "another machine")]
    #[case::no_segments(56, &[0, 0], "malformed")]
    #[case::header_table_far_away(32, &[0xff; 8], "truncated")]
    #[case::segment_beyond_the_file(64 + 8, &[0, 0xff], "truncated")]
    #[case::segment_beyond_memory(64 + 24, &[0, 0, 0, 0x10], "outside")]
    #[case::segment_over_low_memory(64 + 24, &[0, 0, 0], "outside")]
    #[case::segment_wraps(64 + 40, &[0xff; 8], "outside")]
    #[case::file_size_over_memory_size(64 + 40, &[0, 1], "larger in the file")]
    #[case::entry_elsewhere(24, &[0; 8], "entry point")]
    fn a_broken_kernel_is_named(#[case] at: usize, #[case] patch: &[u8], #[case] expected: &str) {
        let mut bytes = image();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        let message = try_load(&bytes).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn a_truncated_kernel_is_named() {
        for len in [0, 63, 100, 0x1400] {
            assert!(matches!(try_load(&image()[..len]), Err(ArchError::KernelTruncated { .. })));
        }
    }
}
