//! Maps of sparse files: which ranges of the file the stored bytes fill. The map comes from the stream, so its ranges
//! are checked to be in order, inside the file, and to hold exactly the stored bytes.

use super::{BLOCK, header, pax};

/// More ranges than this are refused; a real file of that kind is better stored whole.
const MAX_RANGES: usize = 1 << 20;

/// The ranges that hold data, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseMap {
    /// The file's size, holes included.
    pub real_size: u64,
    /// Offsets and lengths.
    pub ranges: Vec<(u64, u64)>,
}

impl SparseMap {
    /// From the old GNU header (type `S`); also whether extension blocks follow.
    pub(super) fn from_gnu_header(block: &[u8; BLOCK]) -> Result<(Self, bool), &'static str> {
        let real_size = field(&block[483..495])?;
        let mut map = Self { real_size, ranges: Vec::new() };
        map.push_gnu_slots(&block[386..482])?;
        Ok((map, block[482] != 0))
    }

    /// From an extension block of it; also whether another follows.
    pub(super) fn extend_from_gnu_block(&mut self, block: &[u8; BLOCK]) -> Result<bool, &'static str> {
        self.push_gnu_slots(&block[..504])?;
        Ok(block[504] != 0)
    }

    fn push_gnu_slots(&mut self, slots: &[u8]) -> Result<(), &'static str> {
        for slot in slots.chunks_exact(24) {
            if slot[0] == 0 {
                break;
            }
            self.push(field(&slot[..12])?, field(&slot[12..])?)?;
        }
        Ok(())
    }

    /// From alternating offsets and lengths.
    pub(super) fn from_pairs(real_size: u64, pairs: &[u64]) -> Result<Self, &'static str> {
        let mut map = Self { real_size, ranges: Vec::new() };
        if !pairs.len().is_multiple_of(2) {
            return Err("a sparse map with an offset but no length");
        }
        for pair in pairs.chunks_exact(2) {
            map.push(pair[0], pair[1])?;
        }
        Ok(map)
    }

    fn push(&mut self, offset: u64, length: u64) -> Result<(), &'static str> {
        if self.ranges.len() >= MAX_RANGES {
            return Err("a sparse map with too many ranges");
        }
        self.ranges.push((offset, length));
        Ok(())
    }

    /// Checks the ranges against the file's size and the number of bytes that are stored.
    pub(super) fn check(&self, stored: u64) -> Result<(), &'static str> {
        const BAD: &str = "a sparse map whose ranges overlap or leave the file";
        let mut end = 0;
        let mut total = 0u64;
        for &(offset, length) in &self.ranges {
            if offset < end {
                return Err(BAD);
            }
            end = offset.checked_add(length).ok_or(BAD)?;
            total += length;
        }
        if end > self.real_size {
            return Err(BAD);
        }
        if total != stored {
            return Err("a sparse map that does not match the stored size");
        }
        Ok(())
    }
}

fn field(bytes: &[u8]) -> Result<u64, &'static str> {
    header::number(bytes).and_then(|number| u64::try_from(number).ok()).ok_or("a malformed sparse header")
}

/// Format 1.0: the map stands before the data, as decimal lines padded to a block: count, then offsets and lengths.
pub(super) struct PayloadMapParser {
    real_size: u64,
    count: Option<usize>,
    numbers: Vec<u64>,
    line: Vec<u8>,
}

impl PayloadMapParser {
    pub(super) fn new(real_size: u64) -> Self {
        Self { real_size, count: None, numbers: Vec::new(), line: Vec::new() }
    }

    /// Takes the next block; the map once it is complete.
    pub(super) fn push(&mut self, block: &[u8; BLOCK]) -> Result<Option<SparseMap>, &'static str> {
        for byte in block {
            if *byte != b'\n' {
                if self.line.len() >= 20 {
                    return Err("a malformed sparse map");
                }
                self.line.push(*byte);
                continue;
            }
            let number = pax::decimal(&self.line).ok_or("a malformed sparse map")?;
            self.line.clear();
            match self.count {
                None if number > MAX_RANGES as u64 => return Err("a sparse map with too many ranges"),
                None => self.count = Some(number as usize * 2),
                Some(_) => self.numbers.push(number),
            }
            if self.count == Some(self.numbers.len()) {
                return SparseMap::from_pairs(self.real_size, &self.numbers).map(Some);
            }
        }
        Ok(None)
    }
}
