//! Prepares guest memory for the Linux 64-bit boot protocol (Documentation/arch/x86/boot.rst): kernel, initramfs,
//! command line, zero page, GDT, page tables and MP table.

use std::fs::File;

use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::{ArchError, kernel, layout, mptable};
use crate::control::FileRegion;
use crate::memory::{self, Memory, PAGE};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const TYPE_OF_LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const PROTOCOL_VERSION: u16 = 0x20f;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
/// Null, unused, 64-bit code, data, task state: the selectors that the boot protocol prescribes.
const GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// What to load.
pub(crate) struct BootImage<'a> {
    pub(crate) kernel: (&'a File, FileRegion),
    pub(crate) initramfs: (&'a File, FileRegion),
    pub(crate) command_line: &'a str,
    pub(crate) vcpus: u8,
}

/// Fills guest memory and returns the physical address at which the first processor begins.
pub(crate) fn prepare(memory: &Memory, image: &BootImage<'_>) -> Result<u64, ArchError> {
    check_file("the kernel", image.kernel)?;
    check_file("the initramfs", image.initramfs)?;
    let kernel = kernel::load(memory, image.kernel.0, image.kernel.1)?;
    let initramfs = load_initramfs(memory, kernel.end, image.initramfs)?;
    write_command_line(memory, image.command_line)?;
    let in_memory = |what| move |source| ArchError::Memory { what, source };
    memory::write(memory, layout::ZERO_PAGE, &zero_page(memory, initramfs, image.command_line.len()))
        .map_err(in_memory("the zero page"))?;
    write_tables(memory).map_err(in_memory("the page tables"))?;
    mptable::write(memory, image.vcpus).map_err(in_memory("the MP table"))?;
    Ok(kernel.entry)
}

fn check_file(what: &'static str, (file, region): (&File, FileRegion)) -> Result<(), ArchError> {
    let len = file.metadata().map_err(|source| ArchError::Read { what, source })?.len();
    let end = region.offset.saturating_add(region.len);
    if end > len {
        return Err(ArchError::FileTooShort { what, end, len });
    }
    Ok(())
}

/// Loads the initramfs as high as possible below the device hole; returns its address and size.
fn load_initramfs(
    memory: &Memory,
    kernel_end: u64,
    (file, region): (&File, FileRegion),
) -> Result<(u64, u64), ArchError> {
    let too_large = || ArchError::InitramfsTooLarge(region.len);
    let top = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let address = top.checked_sub(region.len).ok_or_else(too_large)? / PAGE * PAGE;
    if address < kernel_end.next_multiple_of(PAGE) {
        return Err(too_large());
    }
    memory::load_file(memory, address, file, region.offset, region.len)
        .map_err(|source| ArchError::Memory { what: "the initramfs", source })?;
    Ok((address, region.len))
}

fn write_command_line(memory: &Memory, line: &str) -> Result<(), ArchError> {
    if line.len() >= layout::COMMAND_LINE_MAX {
        return Err(ArchError::CommandLineTooLong(line.len()));
    }
    if !line.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(ArchError::CommandLineCharacters);
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory::write(memory, layout::COMMAND_LINE, &bytes)
        .map_err(|source| ArchError::Memory { what: "the command line", source })
}

/// Field offsets are those of `struct boot_params`.
fn zero_page(memory: &Memory, (initramfs, initramfs_size): (u64, u64), command_line: usize) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1fe, &BOOT_FLAG.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &PROTOCOL_VERSION.to_le_bytes());
    put(0x210, &[TYPE_OF_LOADER_UNDEFINED]);
    put(0x218, &(initramfs as u32).to_le_bytes());
    put(0x21c, &(initramfs_size as u32).to_le_bytes());
    put(0x228, &(layout::COMMAND_LINE as u32).to_le_bytes());
    put(0x230, &(LARGE_PAGE as u32).to_le_bytes());
    put(0x238, &(command_line as u32).to_le_bytes());
    let map = memory_map(memory);
    put(0x1e8, &[map.len() as u8]);
    for (index, (address, size, kind)) in map.into_iter().enumerate() {
        let at = 0x2d0 + index * 20;
        put(at, &address.to_le_bytes());
        put(at + 8, &size.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    page
}

fn memory_map(memory: &Memory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::MP_TABLE, E820_RAM),
        (layout::MP_TABLE, layout::LOW_MEMORY_END - layout::MP_TABLE, E820_RESERVED),
    ];
    for region in memory.iter() {
        let begin = region.start_addr().0.max(layout::HIGH_MEMORY);
        map.push((begin, region.start_addr().0 + region.len() - begin, E820_RAM));
    }
    map
}

/// A GDT, and page tables that map the first GiB to itself.
fn write_tables(memory: &Memory) -> Result<(), memory::MemoryError> {
    let gdt: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory::write(memory, layout::GDT, &gdt)?;
    memory::write(memory, layout::PML4, &(layout::PDPT | PAGE_PRESENT_WRITABLE).to_le_bytes())?;
    memory::write(memory, layout::PDPT, &(layout::PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE).to_le_bytes())?;
    let directory: Vec<u8> = (0..512u64)
        .flat_map(|index| ((index * LARGE_PAGE) | PAGE_PRESENT_WRITABLE | PAGE_LARGE).to_le_bytes())
        .collect();
    memory::write(memory, layout::PAGE_DIRECTORY, &directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    fn prepare_with(initramfs: &[u8], command_line: &str) -> Result<(Memory, u64), ArchError> {
        let image = kernel::tests::image();
        let mut kernel_file = tempfile::tempfile().unwrap();
        kernel_file.write_all(&image).unwrap();
        let mut initramfs_file = tempfile::tempfile().unwrap();
        initramfs_file.write_all(initramfs).unwrap();
        let memory = memory::allocate(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let entry = prepare(
            &memory,
            &BootImage {
                kernel: (&kernel_file, FileRegion { offset: 0, len: image.len() as u64 }),
                initramfs: (&initramfs_file, FileRegion { offset: 0, len: initramfs.len() as u64 }),
                command_line,
                vcpus: 2,
            },
        )?;
        Ok((memory, entry))
    }

    #[test]
    fn the_zero_page_names_the_initramfs_and_the_memory() {
        let (memory, entry) = prepare_with(&[7; 5000], "quiet").unwrap();
        assert_eq!(entry, 0x20_0010);
        let read = |at: u64| memory.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + at)).unwrap();
        assert_eq!((read(0x218), read(0x21c)), ((4 << 20) - 8192, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::from(read(0x218)) + 4999)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(layout::ZERO_PAGE + 0x1e8)).unwrap(), 3);
        assert_eq!(memory.read_obj::<[u8; 6]>(GuestAddress(layout::COMMAND_LINE)).unwrap(), *b"quiet\0");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(matches!(prepare_with(&vec![0; 3 << 20], ""), Err(ArchError::InitramfsTooLarge(_))));
        assert!(matches!(prepare_with(&[], &"x".repeat(2048)), Err(ArchError::CommandLineTooLong(2048))));
        assert!(matches!(prepare_with(&[], "a\nb"), Err(ArchError::CommandLineCharacters)));
    }
}
