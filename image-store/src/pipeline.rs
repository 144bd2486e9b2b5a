//! Work on a stream, spread over threads: a stage reads its source on a thread of its own, hashes what it reads, and
//! hands it on in pieces. The pieces' buffers are used again and the queues are short, so that memory is bounded
//! whatever the stream's size. A consumer that goes away ends the stages before it.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

use crate::digest::{Digest, Hasher};

const PIECE: usize = 256 * 1024;
/// Pieces that wait between two stages.
const QUEUE: usize = 4;

/// Buffers that are not in use.
type Pool = Arc<Mutex<Vec<Vec<u8>>>>;

/// Part of a stream.
struct Piece {
    bytes: Vec<u8>,
    length: usize,
    pool: Pool,
}

impl Piece {
    fn from(pool: &Pool) -> Self {
        let unused = pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Self { bytes: unused.unwrap_or_else(|| vec![0; PIECE]), length: 0, pool: Arc::clone(pool) }
    }

    /// Reads until the piece is full or the source ends.
    fn fill(&mut self, source: &mut impl Read) -> io::Result<()> {
        while self.length < self.bytes.len() {
            match source.read(&mut self.bytes[self.length..]) {
                Ok(0) => break,
                Ok(read) => self.length += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn filled(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.bytes));
    }
}

/// A stage's end: the digest and the length of what it read.
pub(crate) struct Stage<'scope>(ScopedJoinHandle<'scope, (Digest, u64)>);

impl Stage<'_> {
    /// Waits for the stage to end. The digest is of the whole source if the stage's reader came to its end.
    pub(crate) fn finish(self) -> (Digest, u64) {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Starts a stage; what it reads comes out of the reader.
pub(crate) fn stage<'scope, R: Read + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    source: R,
) -> (StageReader, Stage<'scope>) {
    let (sender, pieces) = sync_channel(QUEUE);
    let thread = scope.spawn(move || run(source, &sender));
    (StageReader { pieces, current: None, position: 0, failed: false }, Stage(thread))
}

fn run(mut source: impl Read, to: &SyncSender<io::Result<Piece>>) -> (Digest, u64) {
    let pool = Pool::default();
    let mut hasher = Hasher::default();
    loop {
        let mut piece = Piece::from(&pool);
        let filled = piece.fill(&mut source);
        if piece.length > 0 {
            hasher.update(piece.filled());
            if to.send(Ok(piece)).is_err() {
                break;
            }
        } else if filled.is_ok() {
            break;
        }
        if let Err(error) = filled {
            // Whoever is gone does not need to know.
            let _ = to.send(Err(error));
            break;
        }
    }
    hasher.finish()
}

/// What a stage read.
pub(crate) struct StageReader {
    pieces: Receiver<io::Result<Piece>>,
    current: Option<Piece>,
    position: usize,
    failed: bool,
}

impl Read for StageReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = io::BufRead::fill_buf(self)?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        io::BufRead::consume(self, length);
        Ok(length)
    }
}

impl io::BufRead for StageReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.as_ref().is_none_or(|piece| self.position >= piece.length) {
            self.current = None;
            self.position = 0;
            if self.failed {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match self.pieces.recv() {
                Ok(Ok(piece)) => self.current = Some(piece),
                Ok(Err(error)) => {
                    self.failed = true;
                    return Err(error);
                }
                Err(_) => return Ok(&[]),
            }
        }
        Ok(self.current.as_ref().map_or(&[], |piece| &piece.filled()[self.position..]))
    }

    fn consume(&mut self, amount: usize) {
        self.position += amount;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_hashed() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 / 3) as u8).collect();
        let (read, hashed) = std::thread::scope(|scope| {
            let (mut reader, stage) = stage(scope, bytes.as_slice());
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            (read, stage.finish())
        });
        assert!(read == bytes);
        assert_eq!(hashed, (Digest::of(&bytes), bytes.len() as u64));
    }

    #[test]
    fn a_reader_that_goes_away_ends_the_stage_and_errors_come_through() {
        std::thread::scope(|scope| {
            let (mut reader, stage) = stage(scope, io::repeat(1));
            reader.read_exact(&mut [0; 1000]).unwrap();
            drop(reader);
            stage.finish();
        });
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
        std::thread::scope(|scope| {
            let (mut reader, _stage) = stage(scope, io::repeat(1).take(10).chain(Broken));
            let mut read = Vec::new();
            let error = reader.read_to_end(&mut read).unwrap_err();
            assert_eq!((read.len(), error.kind()), (10, io::ErrorKind::ConnectionReset));
            assert!(reader.read(&mut [0]).is_err());
        });
    }
}
