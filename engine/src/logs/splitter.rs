//! Turns a process's output into log lines: whole lines, or pieces of 16 KiB where a line is longer.
//!
//! What is not a whole line yet is held back. The result depends on nothing but the sequence of calls since the splitter was
//! last idle, so that the same frames, sent again to a daemon that was restarted, give the same lines again.

use super::Stream;
use crate::time::UnixNanos;

/// The longest piece of a line.
const MAX_PIECE: usize = 16 * 1024;
/// How much output may pass while something is held back; then it is let go as it is. Must stay well below what the agent keeps
/// unacknowledged, or the two would wait for each other.
const MAX_HELD_OVER: usize = 128 * 1024;

/// A line or a piece of one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) stream: Stream,
    pub(super) time: UnixNanos,
    pub(super) bytes: Vec<u8>,
}

#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    time: UnixNanos,
}

/// See the module.
#[derive(Default)]
pub(super) struct Splitter {
    stdout: Held,
    stderr: Held,
    passed: usize,
}

impl Splitter {
    /// Nothing is held back.
    pub(super) fn is_idle(&self) -> bool {
        self.stdout.bytes.is_empty() && self.stderr.bytes.is_empty()
    }

    /// Takes output and gives the pieces that are complete.
    pub(super) fn push(
        &mut self,
        stream: Stream,
        time: UnixNanos,
        mut bytes: &[u8],
        mut emit: impl FnMut(Piece),
    ) {
        self.passed = self.passed.saturating_add(bytes.len());
        let held = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        held.time = time;
        while !bytes.is_empty() {
            let newline = bytes.iter().position(|b| *b == b'\n').map(|at| at + 1);
            let room = MAX_PIECE - held.bytes.len();
            let take = newline.unwrap_or(bytes.len()).min(room);
            held.bytes.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if held.bytes.last() == Some(&b'\n') {
                emit(Piece { stream, time, bytes: std::mem::take(&mut held.bytes) });
            } else if held.bytes.len() == MAX_PIECE {
                let tail = held.bytes.split_off(whole_characters(&held.bytes));
                emit(Piece { stream, time, bytes: std::mem::replace(&mut held.bytes, tail) });
            }
        }
        if self.is_idle() {
            self.passed = 0;
        } else if self.passed > MAX_HELD_OVER {
            self.flush(emit);
        }
    }

    /// Lets go of what is held back.
    pub(super) fn flush(&mut self, mut emit: impl FnMut(Piece)) {
        // In the order of their times, so that times in the file do not fall.
        let mut held = [(Stream::Stdout, &mut self.stdout), (Stream::Stderr, &mut self.stderr)];
        held.sort_by_key(|(_, held)| held.time);
        let latest = held[1].1.time;
        for (stream, held) in held {
            if !held.bytes.is_empty() {
                emit(Piece { stream, time: latest, bytes: std::mem::take(&mut held.bytes) });
            }
        }
        self.passed = 0;
    }
}

/// The length without an unfinished UTF-8 sequence at the end; everything, if that would leave nothing or is no such sequence.
fn whole_characters(bytes: &[u8]) -> usize {
    for back in 1..=3.min(bytes.len().saturating_sub(1)) {
        let at = bytes.len() - back;
        let needs = match bytes[at] {
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            0x80..=0xbf => continue,
            _ => break,
        };
        return if needs > back { at } else { bytes.len() };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(inputs: &[(Stream, &[u8])]) -> (Splitter, Vec<Piece>) {
        let mut splitter = Splitter::default();
        let mut pieces = Vec::new();
        for (at, (stream, bytes)) in inputs.iter().enumerate() {
            splitter.push(*stream, UnixNanos(at as i64), bytes, |piece| pieces.push(piece));
        }
        (splitter, pieces)
    }

    #[test]
    fn a_line_that_comes_in_parts_is_one_piece_with_the_last_parts_time() {
        let (splitter, pieces) =
            pieces(&[(Stream::Stdout, b"a"), (Stream::Stderr, b"x\n"), (Stream::Stdout, b"b\nc")]);
        let expected = [
            Piece { stream: Stream::Stderr, time: UnixNanos(1), bytes: b"x\n".to_vec() },
            Piece { stream: Stream::Stdout, time: UnixNanos(2), bytes: b"ab\n".to_vec() },
        ];
        assert_eq!(pieces, expected);
        assert!(!splitter.is_idle());
    }

    #[test]
    fn a_long_line_is_split_at_16_kib_but_not_inside_a_character() {
        let line = "é".repeat(10_000);
        let input = format!("a{line}\n");
        let (_, pieces) = pieces(&[(Stream::Stdout, input.as_bytes())]);
        assert_eq!(pieces.len(), 2);
        assert_eq!(pieces[0].bytes.len(), MAX_PIECE - 1);
        assert!(pieces.iter().all(|piece| std::str::from_utf8(&piece.bytes).is_ok()));
    }

    #[test]
    fn a_prompt_does_not_hold_up_the_other_stream_for_ever() {
        let mut inputs: Vec<(Stream, &[u8])> = vec![(Stream::Stdout, b"> ")];
        let noise = [b'x'; 999].iter().chain(b"\n").copied().collect::<Vec<_>>();
        inputs.extend(std::iter::repeat_n((Stream::Stderr, noise.as_slice()), 140));
        let (splitter, pieces) = pieces(&inputs);
        assert!(splitter.is_idle());
        assert!(pieces.iter().any(|piece| piece.bytes == b"> "));
        assert!(pieces.is_sorted_by_key(|piece| piece.time));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_piece_is_too_long(chunks: Vec<(bool, Vec<u8>)>) {
            let mut splitter = Splitter::default();
            let mut out: [Vec<u8>; 2] = Default::default();
            let mut take = |piece: Piece| {
                assert!(!piece.bytes.is_empty() && piece.bytes.len() <= MAX_PIECE);
                out[usize::from(piece.stream == Stream::Stderr)].extend(piece.bytes);
            };
            let mut expected: [Vec<u8>; 2] = Default::default();
            for (stderr, bytes) in &chunks {
                let stream = if *stderr { Stream::Stderr } else { Stream::Stdout };
                splitter.push(stream, UnixNanos(0), bytes, &mut take);
                expected[usize::from(*stderr)].extend(bytes);
            }
            splitter.flush(&mut take);
            prop_assert_eq!(out, expected);
        }
    }
}
