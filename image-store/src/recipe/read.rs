//! Gives a layer's tar stream back. The recipe and the image are our own files, but a damaged one must not pass for
//! the layer: whatever does not fit is an error, and at the end the digest is compared.

use std::io::{self, BufReader, Read, Seek, SeekFrom, Take};

use super::{MARK, MAX_LITERAL, Step, TRAILER, expected_after, unzigzag};
use crate::digest::{Digest, Hasher};

/// A frame of a recipe.
type Frame<R> = BufReader<zstd::Decoder<'static, BufReader<Take<R>>>>;

/// A layer's uncompressed tar stream, as it was when the layer came. [`Read`] gives its bytes; if they turn out not to
/// be the layer's, it ends in an error of kind [`io::ErrorKind::InvalidData`].
pub struct LayerTar<R: Read, I> {
    steps: Frame<R>,
    tails: Frame<R>,
    image: I,
    source: Source,
    /// Bytes of the current step that were not read yet.
    left: u64,
    expected: u64,
    last_tail: u64,
    remaining: u64,
    hasher: Option<Hasher>,
    diff_id: Digest,
    length: u64,
}

#[derive(Clone, Copy)]
enum Source {
    Steps,
    Tails,
    Image,
}

impl<R: Read + Seek, I: Read + Seek> LayerTar<R, I> {
    /// From a layer's recipe, opened twice, and its image.
    pub fn open(mut recipe: R, mut again: R, image: I, diff_id: Digest) -> io::Result<Self> {
        let end = recipe.seek(SeekFrom::End(0))?;
        let mark = MARK.len() as u64;
        let body = end.checked_sub(TRAILER as u64 + mark).ok_or_else(damaged)?;
        recipe.seek(SeekFrom::Start(mark + body))?;
        let mut trailer = [0; TRAILER];
        recipe.read_exact(&mut trailer)?;
        let word =
            |at: usize| trailer[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (steps_length, length) = (word(0), word(8));
        if trailer[16..] != MARK || steps_length > body {
            return Err(damaged());
        }
        recipe.seek(SeekFrom::Start(mark))?;
        again.seek(SeekFrom::Start(mark + steps_length))?;
        Ok(Self {
            steps: frame(recipe, steps_length)?,
            tails: frame(again, body - steps_length)?,
            image,
            source: Source::Steps,
            left: 0,
            expected: 0,
            last_tail: 0,
            remaining: length,
            hasher: Some(Hasher::default()),
            diff_id,
            length,
        })
    }

    /// The whole stream's length in bytes, known from the start.
    pub fn length(&self) -> u64 {
        self.length
    }

    fn next_step(&mut self) -> io::Result<()> {
        let step = number(&mut self.steps)?;
        self.left = step >> 2;
        self.source = match step & 3 {
            kind if kind == Step::Literal as u64 && self.left <= MAX_LITERAL as u64 => Source::Steps,
            kind if kind == Step::Data as u64 => {
                let distance = unzigzag(number(&mut self.steps)?);
                let offset = self.expected.checked_add_signed(distance).ok_or_else(damaged)?;
                self.expected = expected_after(offset.checked_add(self.left).ok_or_else(damaged)?);
                self.image.seek(SeekFrom::Start(offset))?;
                Source::Image
            }
            kind if kind == Step::Tail as u64 => self.next_tail()?,
            _ => return Err(damaged()),
        };
        Ok(())
    }

    fn next_tail(&mut self) -> io::Result<Source> {
        let place = number(&mut self.tails)?;
        if place & 1 == 1 {
            return Ok(Source::Tails);
        }
        let offset = self.last_tail.checked_add_signed(unzigzag(place >> 1)).ok_or_else(damaged)?;
        self.last_tail = offset;
        self.image.seek(SeekFrom::Start(offset))?;
        Ok(Source::Image)
    }

    /// At the end of the stream: it must be what it is taken for.
    fn check(&mut self) -> io::Result<()> {
        match self.hasher.take().map(Hasher::finish) {
            Some((digest, _)) if digest != self.diff_id => Err(damaged()),
            _ => Ok(()),
        }
    }
}

impl<R: Read + Seek, I: Read + Seek> Read for LayerTar<R, I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.remaining == 0 {
            return self.check().map(|()| 0);
        }
        while self.left == 0 {
            self.next_step()?;
        }
        let want = self.left.min(self.remaining).min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..want];
        let read = match self.source {
            Source::Steps => self.steps.read(buffer),
            Source::Tails => self.tails.read(buffer),
            Source::Image => self.image.read(buffer),
        }?;
        if read == 0 {
            return Err(damaged());
        }
        self.left -= read as u64;
        self.remaining -= read as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..read]);
        }
        // The last bytes are given only if all are right.
        if self.remaining == 0 {
            self.check()?;
        }
        Ok(read)
    }
}

impl<R: Read, I> std::fmt::Debug for LayerTar<R, I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerTar")
            .field("diff_id", &self.diff_id)
            .field("remaining", &self.remaining)
            .finish_non_exhaustive()
    }
}

fn frame<R: Read>(recipe: R, length: u64) -> io::Result<Frame<R>> {
    let decoder = zstd::Decoder::with_buffer(BufReader::with_capacity(32 * 1024, recipe.take(length)))?;
    Ok(BufReader::with_capacity(32 * 1024, decoder.single_frame()))
}

fn number(from: &mut impl Read) -> io::Result<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let mut byte = [0];
        from.read_exact(&mut byte)?;
        value |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(damaged())
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the layer's image or its recipe is damaged")
}
