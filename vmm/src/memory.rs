//! Guest memory, aligned so that the host can give it in huge pages: anonymous, or, where another process serves a device, a file in memory
//! that can be handed to that process. The module trusts nothing that the guest writes.
//!
//! The file can neither grow nor shrink, so that whoever has it mapped is never struck by a page that is gone. What is returned to the
//! host is punched out of it, for all who have it mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileSlice,
};

/// The memory of one machine. Clones share it.
pub(crate) type Memory = GuestMemoryMmap<()>;

/// The host's page size on every machine that is supported.
pub(crate) const PAGE: u64 = 4096;
/// The host's huge pages. Guest addresses are aligned to them as the host's are, so that one fault can bring 512 pages.
const HUGE: usize = 2 << 20;

/// Why memory could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("the host does not give {mib} MiB of memory for the guest")]
    Allocate {
        mib: u64,
        #[source]
        source: std::io::Error,
    },
    #[error("the machine cannot have {mib} MiB of memory: the host has {host} MiB, its swap included")]
    MoreThanTheHost { mib: u64, host: u64 },
    #[error("guest address {address:#x} with {len:#x} bytes is outside of the guest's memory")]
    Outside { address: u64, len: u64 },
    #[error("cannot read from the file")]
    Read(#[source] std::io::Error),
}

/// Refuses what the host could not give even if it did nothing else.
pub(crate) fn check_host(mib: u64) -> Result<(), MemoryError> {
    let host = rustix::system::sysinfo();
    let units = host.totalram.saturating_add(host.totalswap);
    let host = units.saturating_mul(u64::from(host.mem_unit)) >> 20;
    if mib > host { Err(MemoryError::MoreThanTheHost { mib, host }) } else { Ok(()) }
}

/// Reserves memory for these ranges, for this process alone; pages come into being when they are touched. The memory stays until the
/// process ends, as the machine does.
pub(crate) fn allocate(ranges: &[(GuestAddress, usize)]) -> Result<Memory, MemoryError> {
    build(ranges, None)
}

/// The same as one file in memory, which each region names with its place in it.
pub(crate) fn allocate_shared(ranges: &[(GuestAddress, usize)]) -> Result<Memory, MemoryError> {
    let file = memory_file(ranges.iter().map(|(_, len)| *len as u64).sum());
    build(ranges, Some(Arc::new(file.map_err(failure(ranges))?)))
}

fn failure(ranges: &[(GuestAddress, usize)]) -> impl Fn(std::io::Error) -> MemoryError + use<> {
    let mib = ranges.iter().map(|(_, len)| *len as u64).sum::<u64>() >> 20;
    move |source| MemoryError::Allocate { mib, source }
}

fn build(ranges: &[(GuestAddress, usize)], file: Option<Arc<File>>) -> Result<Memory, MemoryError> {
    let failed = failure(ranges);
    let mut regions = Vec::with_capacity(ranges.len());
    let mut offset = 0;
    for (start, len) in ranges {
        let place = file.as_ref().map(|file| FileOffset::from_arc(Arc::clone(file), offset));
        let region = reserve(*len, place).map_err(&failed)?;
        regions.push(
            GuestRegionMmap::new(region, *start).ok_or_else(|| failed(ErrorKind::InvalidInput.into()))?,
        );
        offset += *len as u64;
    }
    Memory::from_regions(regions).map_err(|error| failed(std::io::Error::other(error)))
}

/// A file in memory of this length, for ever.
fn memory_file(len: u64) -> std::io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match rustix::fs::memfd_create(c"guest-memory", flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3 it cannot be said that nothing in it is to be executed.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(c"guest-memory", flags)?,
        result => result?,
    };
    rustix::fs::ftruncate(&file, len)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// Memory of `len` bytes, a multiple of the page size, from a multiple of `HUGE` on.
fn reserve(len: usize, file: Option<FileOffset>) -> std::io::Result<MmapRegion> {
    let roomy = len.checked_add(HUGE).ok_or(ErrorKind::InvalidInput)?;
    let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let whole = unsafe { libc::mmap(std::ptr::null_mut(), roomy, libc::PROT_NONE, nothing, -1, 0) };
    if whole == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    let before = whole.addr().next_multiple_of(HUGE) - whole.addr();
    let start = whole.wrapping_byte_add(before);
    for (part, size) in [(whole, before), (start.wrapping_byte_add(len), HUGE - before)] {
        // SAFETY: both parts lie in the mapping that was just made, before and behind what is kept, and nobody knows of them.
        // A failure leaves unused address space behind, an empty part is refused by the kernel; neither matters.
        unsafe { libc::munmap(part, size) };
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let (flags, fd, offset) = match &file {
        Some(place) => {
            let offset = libc::off_t::try_from(place.start()).map_err(|_| ErrorKind::InvalidInput)?;
            (libc::MAP_SHARED | libc::MAP_NORESERVE, place.file().as_raw_fd(), offset)
        }
        None => (nothing, -1, 0),
    };
    // SAFETY: the kept part of the mapping that was just made, of which nobody knows, is replaced as a whole.
    let mapped = unsafe { libc::mmap(start, len, protection, flags | libc::MAP_FIXED, fd, offset) };
    if mapped == libc::MAP_FAILED {
        let error = std::io::Error::last_os_error();
        // SAFETY: as above.
        unsafe { libc::munmap(start, len) };
        return Err(error);
    }
    if len >= HUGE {
        // SAFETY: the range is the mapping that was just made; the advice changes no contents. A host without huge pages refuses it.
        unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
    }
    let mut builder = MmapRegionBuilder::new(len).with_mmap_prot(protection).with_mmap_flags(flags);
    if let Some(place) = file {
        builder = builder.with_file_offset(place);
    }
    // SAFETY: `len` bytes from `start` on are mapped with this protection and these flags, and are never unmapped.
    unsafe { builder.with_raw_mmap_pointer(start.cast()) }.build().map_err(std::io::Error::other)
}

/// Copies bytes into guest memory.
pub(crate) fn write(memory: &Memory, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| MemoryError::Outside { address, len: bytes.len() as u64 })
}

/// Copies `len` bytes of a file, from `offset` on, to a guest address. Mapping the file would not share its pages for long and cost
/// thousands of faults: a kernel patches its own text nearly everywhere when it starts, and unpacks an initramfs once.
pub(crate) fn load_file(
    memory: &Memory,
    address: u64,
    file: &File,
    offset: u64,
    len: u64,
) -> Result<(), MemoryError> {
    let outside = || MemoryError::Outside { address, len };
    let size = usize::try_from(len).map_err(|_| outside())?;
    if len == 0 {
        return Ok(());
    }
    memory.get_slice(GuestAddress(address), size).map_err(|_| outside())?;
    let mut buffer = vec![0; 1 << 16];
    let mut done = 0;
    while done < len {
        let part = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
        file.read_exact_at(&mut buffer[..part], offset + done).map_err(MemoryError::Read)?;
        write(memory, address + done, &buffer[..part])?;
        done += part as u64;
    }
    Ok(())
}

/// Gives the whole pages within a part of this memory back to the host; they read as zeroes until they are written again.
pub(crate) fn release(memory: &Memory, part: &VolatileSlice<'_>) -> std::io::Result<()> {
    let guard = part.ptr_guard_mut();
    let begin = guard.as_ptr();
    let before = begin.addr().next_multiple_of(PAGE as usize) - begin.addr();
    let Some(len) = part.len().checked_sub(before).map(|len| len / PAGE as usize * PAGE as usize) else {
        return Ok(());
    };
    if len == 0 {
        return Ok(());
    }
    // Pages of a file stay in it, whoever has it mapped, until they are removed from it.
    let shared = memory.iter().any(|region| region.file_offset().is_some());
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    // SAFETY: the range lies within the part, which lies within a mapping of guest memory. That is only accessed as volatile memory,
    // whose contents may change at any time.
    let result = unsafe { libc::madvise(begin.wrapping_add(before).cast(), len, advice) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[rstest::rstest]
    #[case::aligned(0x1000, 0, 0x3000)]
    #[case::ragged_edges(0x1234, 0x2234, 0x4567)]
    #[case::unlike_alignment(0x1234, 0x1000, 0x2222)]
    #[case::small(0x10, 0x10, 0x20)]
    fn a_file_is_copied_into_memory_and_stays_as_it_was(
        #[case] address: u64,
        #[case] offset: u64,
        #[case] len: u64,
    ) {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..0x8000u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&content).unwrap();
        let memory = allocate(&[(GuestAddress(0), 0x10000)]).unwrap();
        load_file(&memory, address, &file, offset, len).unwrap();
        let mut all = vec![0; 0x10000];
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        let (begin, end) = (address as usize, (address + len) as usize);
        assert_eq!(all[begin..end], content[offset as usize..(offset + len) as usize]);
        assert!(all[..begin].iter().chain(&all[end..]).all(|&byte| byte == 0));
        memory.write_slice(&vec![0xff; len as usize], GuestAddress(address)).unwrap();
        let mut after = vec![0; content.len()];
        file.read_exact_at(&mut after, 0).unwrap();
        assert_eq!(after, content);
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let memory = allocate(&[(GuestAddress(0), 0x10000)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        for (address, len) in [(0xf000, 0x2000), (u64::MAX, 2), (0x20000, 1)] {
            assert!(matches!(load_file(&memory, address, &file, 0, len), Err(MemoryError::Outside { .. })));
        }
    }

    #[test]
    fn shared_memory_is_one_file_that_keeps_its_length_and_gives_back_what_is_released() {
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)];
        let memory = allocate_shared(&ranges).unwrap();
        memory.write_slice(&vec![7; 4 << 20], GuestAddress(0)).unwrap();
        memory.write_slice(b"second", GuestAddress(1 << 32)).unwrap();
        let place = memory.iter().nth(1).unwrap().file_offset().unwrap();
        let (file, offset) = (place.file(), place.start());
        let mut found = [0; 6];
        file.read_exact_at(&mut found, offset).unwrap();
        assert_eq!((&found, offset), (b"second", 4 << 20));
        assert!(file.set_len(1 << 20).is_err() && file.set_len(1 << 30).is_err());
        let blocks = || rustix::fs::fstat(file).unwrap().st_blocks;
        let before = blocks();
        let part = memory.get_slice(GuestAddress(PAGE), 2 << 20).unwrap();
        release(&memory, &part).unwrap();
        assert!(blocks() <= before - (2 << 20) / 512, "{before} {}", blocks());
        assert_eq!(memory.read_obj::<u8>(GuestAddress(PAGE)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(PAGE - 1)).unwrap(), 7);
    }
}
