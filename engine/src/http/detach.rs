//! The keys that let go of a terminal, `ctrl-p,ctrl-q` unless a client says otherwise.

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Result};

const DEFAULT: &[u8] = &[0x10, 0x11];

/// Finds the sequence in a client's input.
#[derive(Debug)]
pub(crate) struct DetachKeys {
    sequence: Vec<u8>,
    seen: usize,
}

impl DetachKeys {
    /// Reads `ctrl-p,ctrl-q`, `a,b` and the like; nothing means the default.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self> {
        let sequence = match text {
            None => DEFAULT.to_vec(),
            Some(text) => text.split(',').map(key).collect::<Result<Vec<u8>>>()?,
        };
        Ok(Self { sequence, seen: 0 })
    }

    /// Takes input; gives what is to be passed on, and whether the sequence was complete.
    pub(crate) fn filter(&mut self, input: Bytes) -> (Bytes, bool) {
        if self.seen == 0 && !input.contains(&self.sequence[0]) {
            return (input, false);
        }
        let mut passed = BytesMut::with_capacity(input.len());
        for byte in input {
            if byte == self.sequence[self.seen] {
                self.seen += 1;
                if self.seen == self.sequence.len() {
                    return (passed.freeze(), true);
                }
                continue;
            }
            // What looked like the sequence was input after all.
            passed.extend_from_slice(&self.sequence[..self.seen]);
            self.seen = usize::from(byte == self.sequence[0]);
            if self.seen == 0 {
                passed.extend_from_slice(&[byte]);
            }
        }
        (passed.freeze(), false)
    }
}

fn key(text: &str) -> Result<u8> {
    let bad = || {
        Error::invalid(format!(
            "invalid detach keys: unknown key '{}'",
            text.chars().take(20).collect::<String>()
        ))
    };
    let control = |c: u8| match c.to_ascii_lowercase() {
        c @ b'a'..=b'z' => Some(c - b'a' + 1),
        b'@' => Some(0),
        b'[' => Some(27),
        b'\\' => Some(28),
        b']' => Some(29),
        b'^' => Some(30),
        b'_' => Some(31),
        _ => None,
    };
    match (text.as_bytes(), text.strip_prefix("ctrl-").map(str::as_bytes)) {
        ([byte], _) if byte.is_ascii() => Ok(*byte),
        (_, Some([c])) => control(*c).ok_or_else(bad),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(keys: Option<&str>, inputs: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut keys = DetachKeys::parse(keys).unwrap();
        let mut passed = Vec::new();
        for input in inputs {
            let (bytes, done) = keys.filter(Bytes::copy_from_slice(input));
            passed.extend_from_slice(&bytes);
            if done {
                return (passed, true);
            }
        }
        (passed, false)
    }

    #[test]
    fn the_sequence_is_found_also_across_reads() {
        assert_eq!(run(None, &[b"ab\x10\x11cd"]), (b"ab".to_vec(), true));
        assert_eq!(run(None, &[b"ab\x10", b"\x11"]), (b"ab".to_vec(), true));
        assert_eq!(run(None, &[b"ab\x10", b"x\x11"]), (b"ab\x10x\x11".to_vec(), false));
        assert_eq!(run(Some("a,b"), &[b"aab"]), (b"a".to_vec(), true));
    }

    #[test]
    fn unknown_keys_are_refused() {
        for bad in ["ctrl-", "ctrl-1", "abc", ""] {
            assert!(DetachKeys::parse(Some(bad)).is_err(), "{bad}");
        }
    }
}
