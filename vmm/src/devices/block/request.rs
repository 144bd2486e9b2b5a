//! Block requests: taken apart, checked against the disk, turned into jobs. A request that makes no sense is answered with an
//! error status where there is a place for one; only a chain without that place breaks the device.

use std::collections::VecDeque;
use std::io;

use virtio_queue::DescriptorChain;

use super::super::Broken;
use super::super::buffers::{self, Buffers};
use super::job::Job;
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
    /// Jobs that fill the buffers.
    fn read<'m>(&self, position: u64, into: Buffers<'m>) -> io::Result<Vec<Job<'m>>>;
    fn write<'m>(&self, position: u64, from: Buffers<'m>) -> io::Result<Job<'m>>;
    /// Makes everything that was written durable; `None` if nothing is ever written.
    fn flush<'m>(&self) -> Option<Job<'m>>;
    /// Gives the space back; what is read afterwards does not matter.
    fn discard<'m>(&self, position: u64, len: u64) -> io::Result<Job<'m>>;
    /// Makes the range read as zeroes; its space may be given back if `unmap`.
    fn write_zeroes<'m>(&self, position: u64, len: u64, unmap: bool) -> io::Result<Job<'m>>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    Error = 1,
    Unsupported = 2,
}

/// A request that was taken apart: what is to be done for it, and where its answer goes.
#[derive(Debug)]
pub(super) struct Request<'m> {
    head: u16,
    /// To be done one after the other.
    pub(super) jobs: VecDeque<Job<'m>>,
    status_byte: Buffers<'m>,
    status: Status,
    /// What stands in the driver's buffers if all goes well.
    written: usize,
    kind: u32,
    sector: u64,
}

impl Request<'_> {
    /// It failed: what else it needs is not done.
    pub(super) fn fail(&mut self, disk: &'static str, error: &io::Error) {
        warn_limited!(disk, kind = self.kind, sector = self.sector, %error, "a disk request failed");
        self.jobs.clear();
        (self.status, self.written) = (Status::Error, 0);
    }

    /// Writes the answer; returns the head of the request's chain and how many bytes were written to its buffers.
    pub(super) fn finish(self) -> Result<(u16, u32), Broken> {
        self.status_byte.copy_from(&[self.status as u8]).ok_or(Broken::Chain)?;
        Ok((self.head, u32::try_from(self.written).unwrap_or(u32::MAX).saturating_add(1)))
    }
}

/// Takes requests apart for a backend.
pub(super) struct Requests<B> {
    backend: B,
    /// The driver knows of the write cache and flushes it when it must.
    write_back: bool,
}

impl<B: Backend> Requests<B> {
    pub(super) fn new(backend: B) -> Self {
        Self { backend, write_back: false }
    }

    pub(super) fn name(&self) -> &'static str {
        self.backend.name()
    }

    /// The driver took the device into service with these features.
    pub(super) fn activated(&mut self, features: u64) {
        self.write_back = features & FEATURE_FLUSH != 0;
    }

    /// Takes a request apart.
    pub(super) fn begin<'m>(
        &self,
        memory: &'m Memory,
        chain: DescriptorChain<&Memory>,
    ) -> Result<Request<'m>, Broken> {
        let head = chain.head_index();
        let (mut readable, mut writable) = buffers::collect(memory, chain)?;
        let status_at = writable.len().checked_sub(1).ok_or(Broken::Chain)?;
        let status_byte = writable.split_back(status_at).ok_or(Broken::Chain)?;
        let mut header = [0; HEADER];
        readable.split_front(HEADER).and_then(|front| front.copy_to(&mut header)).ok_or(Broken::Chain)?;
        let (kind, sector) = (u32_at(&header, 0), u64_at(&header, 8));
        let mut request = Request {
            head,
            jobs: VecDeque::new(),
            status_byte,
            status: Status::Ok,
            written: if kind == TYPE_IN { writable.len() } else { 0 },
            kind,
            sector,
        };
        match self.plan(kind, sector, readable, writable) {
            Ok(Plan::Jobs(jobs)) => request.jobs = jobs.into(),
            Ok(Plan::Done(status, written)) => (request.status, request.written) = (status, written),
            Err(error) => request.fail(self.name(), &error),
        }
        Ok(request)
    }

    fn plan<'m>(
        &self,
        kind: u32,
        sector: u64,
        data_out: Buffers<'m>,
        data_in: Buffers<'m>,
    ) -> io::Result<Plan<'m>> {
        let jobs = match kind {
            TYPE_IN => self.backend.read(self.check(sector, data_in.len() as u64)?, data_in)?,
            TYPE_OUT => self.write(sector, data_out)?,
            TYPE_FLUSH => self.backend.flush().into_iter().collect(),
            TYPE_GET_ID => return Ok(self.identify(&data_in)),
            TYPE_DISCARD | TYPE_WRITE_ZEROES if !self.backend.read_only() => match ranges(kind, &data_out) {
                Some(ranges) => self.clear(kind, &ranges)?,
                None => return Ok(Plan::Done(Status::Unsupported, 0)),
            },
            _ => return Ok(Plan::Done(Status::Unsupported, 0)),
        };
        Ok(Plan::Jobs(jobs))
    }

    fn write<'m>(&self, sector: u64, data: Buffers<'m>) -> io::Result<Vec<Job<'m>>> {
        let position = self.check(sector, data.len() as u64)?;
        if self.backend.read_only() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut jobs = vec![self.backend.write(position, data)?];
        jobs.extend(self.write_through());
        Ok(jobs)
    }

    fn clear<'m>(&self, kind: u32, ranges: &[Range]) -> io::Result<Vec<Job<'m>>> {
        let mut jobs = Vec::new();
        for range in ranges {
            let len = u64::from(range.sectors) * SECTOR;
            let position = self.check(range.sector, len)?;
            jobs.push(match kind {
                TYPE_DISCARD => self.backend.discard(position, len)?,
                _ => self.backend.write_zeroes(position, len, range.unmap)?,
            });
        }
        jobs.extend(self.write_through());
        Ok(jobs)
    }

    /// Without a driver that flushes, a write is done when it is durable.
    fn write_through<'m>(&self) -> Option<Job<'m>> {
        if self.write_back { None } else { self.backend.flush() }
    }

    fn identify<'m>(&self, into: &Buffers<'m>) -> Plan<'m> {
        let mut id = [0; ID_LENGTH];
        for (byte, value) in id.iter_mut().zip(self.backend.name().bytes()) {
            *byte = value;
        }
        let len = into.len().min(ID_LENGTH);
        match into.copy_from(&id[..len]) {
            Some(()) => Plan::Done(Status::Ok, len),
            None => Plan::Done(Status::Error, 0),
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

/// What a request leads to.
enum Plan<'m> {
    Jobs(Vec<Job<'m>>),
    /// It is answered already.
    Done(Status, usize),
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
