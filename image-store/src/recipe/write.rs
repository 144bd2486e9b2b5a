//! Writes a recipe while the tar stream passes.

use std::io::{self, Write};

use super::{MARK, MAX_LITERAL, Step, expected_after, zigzag};
use coracle_tarball::Witness;

/// Quick; headers compress well whatever the level.
const LEVEL: i32 = 1;

/// What a recipe came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecipeStats {
    pub(crate) size: u64,
}

/// Where the end of a file is to be found.
pub(crate) enum Tail<'a> {
    /// In the image, at this offset.
    At(u64),
    /// Not in the image, because a later entry replaced the file.
    Lost(&'a [u8]),
}

/// A recipe under construction. A failure to write it is told at its end, as the stream's reader is not concerned.
pub(crate) struct RecipeWriter<W: Write> {
    steps: zstd::Encoder<'static, Counting<W>>,
    literal: Vec<u8>,
    expected: u64,
    tar_length: u64,
    failed: Option<io::Error>,
}

impl<W: Write> RecipeWriter<W> {
    pub(crate) fn new(mut out: W) -> io::Result<Self> {
        out.write_all(&MARK)?;
        Ok(Self {
            steps: zstd::Encoder::new(Counting { inner: out, count: 0 }, LEVEL)?,
            literal: Vec::with_capacity(MAX_LITERAL),
            expected: 0,
            tar_length: 0,
            failed: None,
        })
    }

    /// The next bytes of the stream stand in the image at this offset.
    pub(crate) fn data(&mut self, offset: u64, length: u64) {
        let distance = offset.wrapping_sub(self.expected) as i64;
        self.step(Step::Data, length, &number(zigzag(distance)));
        self.expected = expected_after(offset + length);
    }

    /// The next bytes of the stream are the next tail.
    pub(crate) fn tail(&mut self, length: usize) {
        self.step(Step::Tail, length as u64, &[]);
    }

    fn step(&mut self, step: Step, length: u64, rest: &[u8]) {
        self.flush_literal();
        self.tar_length += length;
        self.put(&number(length << 2 | step as u64));
        self.put(rest);
    }

    fn flush_literal(&mut self) {
        if self.literal.is_empty() {
            return;
        }
        let literal = std::mem::take(&mut self.literal);
        self.put(&number((literal.len() as u64) << 2 | Step::Literal as u64));
        self.put(&literal);
        self.literal = literal;
        self.literal.clear();
    }

    fn put(&mut self, bytes: &[u8]) {
        if self.failed.is_none()
            && let Err(error) = self.steps.write_all(bytes)
        {
            self.failed = Some(error);
        }
    }

    /// Ends the steps; the tails follow, as many as there were steps for them.
    pub(crate) fn finish_steps(mut self) -> io::Result<TailWriter<W>> {
        self.flush_literal();
        if let Some(error) = self.failed {
            return Err(error);
        }
        let out = self.steps.finish()?;
        let steps_length = out.count;
        let tails = zstd::Encoder::new(out, LEVEL)?;
        Ok(TailWriter { tails, steps_length, tar_length: self.tar_length, last: 0 })
    }
}

impl<W: Write> Witness for RecipeWriter<W> {
    fn passed(&mut self, bytes: &[u8]) {
        self.tar_length += bytes.len() as u64;
        for piece in bytes.chunks(MAX_LITERAL) {
            if self.literal.len() + piece.len() > MAX_LITERAL {
                self.flush_literal();
            }
            self.literal.extend_from_slice(piece);
        }
    }
}

/// The second half of a recipe.
pub(crate) struct TailWriter<W: Write> {
    tails: zstd::Encoder<'static, Counting<W>>,
    steps_length: u64,
    tar_length: u64,
    last: u64,
}

impl<W: Write> TailWriter<W> {
    pub(crate) fn tail(&mut self, tail: &Tail<'_>) -> io::Result<()> {
        match tail {
            Tail::At(offset) => {
                let distance = zigzag(offset.wrapping_sub(self.last) as i64);
                self.last = *offset;
                self.tails.write_all(&number(distance << 1))
            }
            Tail::Lost(bytes) => {
                self.tails.write_all(&number(1))?;
                self.tails.write_all(bytes)
            }
        }
    }

    pub(crate) fn finish(self) -> io::Result<RecipeStats> {
        let mut out = self.tails.finish()?;
        out.write_all(&self.steps_length.to_le_bytes())?;
        out.write_all(&self.tar_length.to_le_bytes())?;
        out.write_all(&MARK)?;
        out.flush()?;
        Ok(RecipeStats { size: MARK.len() as u64 + out.count })
    }
}

struct Counting<W> {
    inner: W,
    count: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Seven bits per byte, the lowest first.
fn number(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4);
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
