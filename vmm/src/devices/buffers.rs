//! The buffers of one descriptor chain as lists of volatile slices, and I/O straight between them and file descriptors.
//! Descriptors may lie in any layout; they are checked against guest memory here, once, when a chain is taken.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;

use smallvec::SmallVec;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, VolatileSlice};

use super::Broken;
use super::nowait;
use crate::memory::Memory;

/// More parts than this do not fit into one system call; no driver needs them.
const MAX_PARTS: usize = 1024;

/// Parts of guest memory that belong together, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers<'m> {
    /// Few in nearly every chain.
    parts: SmallVec<[VolatileSlice<'m>; 4]>,
    len: usize,
}

/// A chain's readable buffers, then its writable ones.
pub(crate) fn collect<'m>(
    memory: &'m Memory,
    chain: DescriptorChain<&Memory>,
) -> Result<(Buffers<'m>, Buffers<'m>), Broken> {
    let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
    let mut goes_on = false;
    for descriptor in chain {
        goes_on = descriptor.has_next();
        let slice =
            memory.get_slice(descriptor.addr(), descriptor.len() as usize).map_err(|_| Broken::Address)?;
        if descriptor.is_write_only() {
            writable.push(slice)?;
        } else if writable.parts.is_empty() {
            readable.push(slice)?;
        } else {
            return Err(Broken::Chain);
        }
    }
    // A chain that ends although it goes on is a loop, or leads out of the table.
    if goes_on || readable.parts.is_empty() && writable.parts.is_empty() {
        return Err(Broken::Chain);
    }
    Ok((readable, writable))
}

impl<'m> Buffers<'m> {
    /// Buffers of one part.
    #[cfg(test)]
    pub(crate) fn of(part: VolatileSlice<'m>) -> Self {
        Self { len: part.len(), parts: smallvec::smallvec![part] }
    }

    fn push(&mut self, slice: VolatileSlice<'m>) -> Result<(), Broken> {
        if self.parts.len() >= MAX_PARTS {
            return Err(Broken::Chain);
        }
        self.len = self.len.checked_add(slice.len()).ok_or(Broken::Chain)?;
        self.parts.push(slice);
        Ok(())
    }

    /// The parts themselves, in order.
    pub(crate) fn parts(&self) -> &[VolatileSlice<'m>] {
        &self.parts
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes the first `at` bytes off; `None` if there are not that many.
    pub(crate) fn split_front(&mut self, at: usize) -> Option<Self> {
        if at > self.len {
            return None;
        }
        let (mut front, mut taken) = (Buffers::default(), 0);
        while front.len < at {
            let part = self.parts.get_mut(taken)?;
            // At most the part's length, so that splitting cannot fail.
            let (before, after) = part.split_at((at - front.len).min(part.len())).ok()?;
            if !before.is_empty() {
                front.len += before.len();
                front.parts.push(before);
            }
            if after.is_empty() {
                taken += 1;
            } else {
                *part = after;
            }
        }
        self.parts.drain(..taken);
        self.len -= at;
        Some(front)
    }

    /// Takes everything but the first `at` bytes off.
    pub(crate) fn split_back(&mut self, at: usize) -> Option<Self> {
        let front = self.split_front(at)?;
        Some(std::mem::replace(self, front))
    }

    /// Copies the first bytes out; `None` if there are too few.
    pub(crate) fn copy_to(&self, mut out: &mut [u8]) -> Option<()> {
        if out.len() > self.len {
            return None;
        }
        for part in &self.parts {
            let count = part.copy_to(out);
            out = &mut out[count..];
        }
        Some(())
    }

    /// Copies bytes in at the front; `None` if there is too little room.
    pub(crate) fn copy_from(&self, mut bytes: &[u8]) -> Option<()> {
        if bytes.len() > self.len {
            return None;
        }
        for part in &self.parts {
            let count = part.len().min(bytes.len());
            part.copy_from(&bytes[..count]);
            bytes = &bytes[count..];
        }
        Some(())
    }

    /// Sets every byte to zero.
    pub(crate) fn fill_zero(&self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for part in &self.parts {
            let mut done = 0;
            while let Ok(rest) = part.offset(done) {
                if rest.is_empty() {
                    break;
                }
                let count = rest.len().min(ZEROES.len());
                rest.copy_from(&ZEROES[..count]);
                done += count;
            }
        }
    }

    /// Adds other buffers behind these; false, and nothing added, if one system call could not take them all.
    pub(crate) fn append(&mut self, other: &Self) -> bool {
        let fits = self.parts.len() + other.parts.len() <= MAX_PARTS;
        if fits {
            self.len += other.len;
            self.parts.extend_from_slice(&other.parts);
        }
        fits
    }

    /// From the descriptor into these buffers, what is there now.
    pub(crate) fn receive(&self, fd: BorrowedFd<'_>, kind: nowait::Kind) -> io::Result<usize> {
        // SAFETY: the vectors point into guest memory that `self` borrows, which is only accessed as volatile memory.
        unsafe { nowait::receive(fd, kind, &self.vectors()) }
    }

    /// From these buffers to the descriptor, what there is room for now.
    pub(crate) fn send(&self, fd: BorrowedFd<'_>, kind: nowait::Kind) -> io::Result<usize> {
        // SAFETY: the vectors point into guest memory that `self` borrows; the kernel only reads it.
        unsafe { nowait::send(fd, kind, &self.vectors()) }
    }

    /// For system calls; it is as good as the buffers themselves, and no longer.
    pub(crate) fn vectors(&self) -> Vec<libc::iovec> {
        self.parts
            .iter()
            .map(|part| libc::iovec { iov_base: part.ptr_guard_mut().as_ptr().cast(), iov_len: part.len() })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn buffers<'m>(memory: &'m Memory, parts: &[(u64, usize)]) -> Buffers<'m> {
        let mut buffers = Buffers::default();
        for &(address, len) in parts {
            buffers.push(memory.get_slice(GuestAddress(address), len).unwrap()).unwrap();
        }
        buffers
    }

    #[test]
    fn splitting_keeps_every_byte_in_order() {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 0x1000)]).unwrap();
        memory.write_slice(b"abcdefgh", GuestAddress(0)).unwrap();
        let all = buffers(&memory, &[(0, 3), (3, 1), (4, 4)]);
        for at in 0..=8 {
            let mut rest = all.clone();
            let front = rest.split_front(at).unwrap();
            let (mut one, mut two) = (vec![0; at], vec![0; 8 - at]);
            front.copy_to(&mut one).unwrap();
            rest.copy_to(&mut two).unwrap();
            assert_eq!([one, two].concat(), b"abcdefgh");
        }
        assert!(all.clone().split_front(9).is_none());
        assert_eq!(all.clone().split_back(5).unwrap().len(), 3);
    }
}
