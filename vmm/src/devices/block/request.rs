//! Block requests: taken apart, checked against the disk, answered. A request that makes no sense is answered with an
//! error status where there is a place for one; only a chain without that place breaks the device.

use std::io;

use virtio_queue::DescriptorChain;

use super::super::Broken;
use super::super::buffers::{self, Buffers};
use super::super::worker::RequestHandler;
use super::{FEATURE_FLUSH, MAX_CLEAR_RANGES, MAX_CLEAR_SECTORS, SECTOR};
use crate::limit::warn_limited;
use crate::memory::Memory;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
const ID_LENGTH: usize = 20;
const HEADER: usize = 16;
const RANGE: usize = 16;
const FLAG_UNMAP: u32 = 1;

/// Where a disk's bytes are. Positions and lengths were checked against the capacity.
pub(crate) trait Backend: Send + 'static {
    /// For logs and for the guest's `serial` attribute; ASCII, at most 20 bytes.
    fn name(&self) -> &'static str;
    /// In bytes.
    fn capacity(&self) -> u64;
    fn read_only(&self) -> bool;
    fn read(&self, position: u64, into: Buffers<'_>) -> io::Result<()>;
    fn write(&self, position: u64, from: Buffers<'_>) -> io::Result<()>;
    /// Makes everything that was written durable.
    fn flush(&self) -> io::Result<()>;
    /// Gives the space back; what is read afterwards does not matter.
    fn discard(&self, position: u64, len: u64) -> io::Result<()>;
    /// Makes the range read as zeroes; its space may be given back if `unmap`.
    fn write_zeroes(&self, position: u64, len: u64, unmap: bool) -> io::Result<()>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    Error = 1,
    Unsupported = 2,
}

/// Answers requests from a backend.
pub(super) struct Requests<B> {
    backend: B,
    /// The driver knows of the write cache and flushes it when it must.
    write_back: bool,
}

impl<B: Backend> Requests<B> {
    pub(super) fn new(backend: B) -> Self {
        Self { backend, write_back: false }
    }

    fn perform(
        &self,
        kind: u32,
        sector: u64,
        data_out: Buffers<'_>,
        data_in: Buffers<'_>,
    ) -> (Status, usize) {
        let read = data_in.len();
        let result = match kind {
            TYPE_IN => self.read(sector, data_in),
            TYPE_OUT => self.write(sector, data_out),
            TYPE_FLUSH => self.backend.flush(),
            TYPE_GET_ID => return self.identify(&data_in),
            TYPE_DISCARD | TYPE_WRITE_ZEROES if !self.backend.read_only() => match ranges(kind, &data_out) {
                Some(ranges) => self.clear(kind, &ranges),
                None => return (Status::Unsupported, 0),
            },
            _ => return (Status::Unsupported, 0),
        };
        match result {
            Ok(()) => (Status::Ok, if kind == TYPE_IN { read } else { 0 }),
            Err(error) => {
                warn_limited!(disk = self.backend.name(), kind, sector, %error, "a disk request failed");
                (Status::Error, 0)
            }
        }
    }

    fn read(&self, sector: u64, data: Buffers<'_>) -> io::Result<()> {
        let position = self.check(sector, data.len() as u64)?;
        self.backend.read(position, data)
    }

    fn write(&self, sector: u64, data: Buffers<'_>) -> io::Result<()> {
        let position = self.check(sector, data.len() as u64)?;
        if self.backend.read_only() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.backend.write(position, data)?;
        self.write_through()
    }

    fn clear(&self, kind: u32, ranges: &[Range]) -> io::Result<()> {
        for range in ranges {
            let len = u64::from(range.sectors) * SECTOR;
            let position = self.check(range.sector, len)?;
            match kind {
                TYPE_DISCARD => self.backend.discard(position, len)?,
                _ => self.backend.write_zeroes(position, len, range.unmap)?,
            }
        }
        self.write_through()
    }

    /// Without a driver that flushes, a write is done when it is durable.
    fn write_through(&self) -> io::Result<()> {
        if self.write_back { Ok(()) } else { self.backend.flush() }
    }

    fn identify(&self, into: &Buffers<'_>) -> (Status, usize) {
        let mut id = [0; ID_LENGTH];
        for (byte, value) in id.iter_mut().zip(self.backend.name().bytes()) {
            *byte = value;
        }
        let len = into.len().min(ID_LENGTH);
        match into.copy_from(&id[..len]) {
            Some(()) => (Status::Ok, len),
            None => (Status::Error, 0),
        }
    }

    /// The position in bytes of a range that lies on the disk.
    fn check(&self, sector: u64, len: u64) -> io::Result<u64> {
        let bad = || io::Error::new(io::ErrorKind::InvalidInput, "outside of the disk or not whole sectors");
        let position = sector.checked_mul(SECTOR).ok_or_else(bad)?;
        let end = position.checked_add(len).ok_or_else(bad)?;
        if !len.is_multiple_of(SECTOR) || end > self.backend.capacity() {
            return Err(bad());
        }
        Ok(position)
    }
}

impl<B: Backend> RequestHandler for Requests<B> {
    fn activated(&mut self, features: u64) {
        self.write_back = features & FEATURE_FLUSH != 0;
    }

    fn handle(&mut self, memory: &Memory, chain: DescriptorChain<&Memory>) -> Result<u32, Broken> {
        let (mut readable, mut writable) = buffers::collect(memory, chain)?;
        let status_at = writable.len().checked_sub(1).ok_or(Broken::Chain)?;
        let status_byte = writable.split_back(status_at).ok_or(Broken::Chain)?;
        let mut header = [0; HEADER];
        readable.split_front(HEADER).and_then(|front| front.copy_to(&mut header)).ok_or(Broken::Chain)?;
        let (kind, sector) = (u32_at(&header, 0), u64_at(&header, 8));
        let (status, written) = self.perform(kind, sector, readable, writable);
        status_byte.copy_from(&[status as u8]).ok_or(Broken::Chain)?;
        Ok(u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1))
    }
}

struct Range {
    sector: u64,
    sectors: u32,
    unmap: bool,
}

/// The ranges of a DISCARD or WRITE_ZEROES request, if they are well formed.
fn ranges(kind: u32, data: &Buffers<'_>) -> Option<Vec<Range>> {
    let most = MAX_CLEAR_RANGES as usize * RANGE;
    if data.len() == 0 || data.len() > most || !data.len().is_multiple_of(RANGE) {
        return None;
    }
    let mut bytes = vec![0; data.len()];
    data.copy_to(&mut bytes)?;
    bytes
        .chunks_exact(RANGE)
        .map(|chunk| {
            let (sector, sectors, flags) = (u64_at(chunk, 0), u32_at(chunk, 8), u32_at(chunk, 12));
            let allowed = if kind == TYPE_DISCARD { 0 } else { FLAG_UNMAP };
            (flags & !allowed == 0 && sectors <= MAX_CLEAR_SECTORS).then_some(Range {
                sector,
                sectors,
                unmap: flags & FLAG_UNMAP != 0,
            })
        })
        .collect()
}

/// The callers' offsets are constants within buffers of constant size.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests;
