//! The person's terminal: raw mode that is always undone, its size, the keys that detach, and plain output.

use std::io::{self, IsTerminal, Write};

use anyhow::{Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// A terminal's lines and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// The size of the terminal on standard output, if there is one.
pub(crate) fn size() -> Option<Size> {
    let size = tcgetwinsize(io::stdout()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(Size { rows: size.ws_row, columns: size.ws_col })
}

/// Whether standard input is a terminal.
pub(crate) fn stdin_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Whether progress can be shown: on a terminal, and only there.
pub(crate) fn shows_progress() -> bool {
    io::stderr().is_terminal()
}

/// Writes data to standard output. A reader that went away is no error: the command just ends.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result,
    }
}

/// Writes to standard error; there is nobody left to tell if that fails.
pub(crate) fn complain(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Asks the person for a line; for a secret one nothing is shown.
pub(crate) fn ask(prompt: &str, is_shown: bool) -> Result<String> {
    if !stdin_is_terminal() {
        bail!("cannot ask for a user name or a password: standard input is not a terminal");
    }
    complain(prompt);
    let original = tcgetattr(io::stdin())?;
    if !is_shown {
        let mut hidden = original.clone();
        hidden.local_modes.remove(rustix::termios::LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Now, &hidden)?;
    }
    let mut line = String::new();
    let read = io::stdin().read_line(&mut line);
    tcsetattr(io::stdin(), OptionalActions::Now, &original)?;
    if !is_shown {
        complain("\n");
    }
    read?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// The terminal on standard input in raw mode, until this is dropped.
#[derive(Debug)]
pub(crate) struct RawMode {
    original: Termios,
}

impl RawMode {
    /// Hands every key to the program.
    pub(crate) fn enable() -> io::Result<Self> {
        let original = tcgetattr(io::stdin())?;
        let mut raw = original.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { original })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.original);
    }
}

/// The keys that leave a container without stopping it, as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys(Vec<u8>);

impl DetachKeys {
    /// Docker's own: ctrl-p ctrl-q.
    pub(crate) const DEFAULT: &'static str = "ctrl-p,ctrl-q";

    /// Reads `ctrl-p,ctrl-q` or `a,b`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let key = |part: &str| match part.as_bytes() {
            [byte] => Ok(*byte),
            _ => match part.strip_prefix("ctrl-").map(str::as_bytes) {
                Some([letter @ b'a'..=b'z']) => Ok(letter - b'a' + 1),
                Some([b'@']) => Ok(0),
                Some([sign @ b'['..=b'_']) => Ok(sign - b'@'),
                _ => bail!(
                    "`{part}` is no detach key: expected a character, or ctrl- and one of a-z, @, [, \\, ], ^, _"
                ),
            },
        };
        Ok(Self(text.split(',').map(key).collect::<Result<_>>()?))
    }

    /// Looks for the keys in what is typed.
    pub(crate) fn scanner(self) -> DetachScanner {
        DetachScanner { keys: self.0, matched: 0 }
    }
}

/// Finds the detach keys in a stream of bytes, wherever it is cut.
#[derive(Debug)]
pub(crate) struct DetachScanner {
    keys: Vec<u8>,
    matched: usize,
}

impl DetachScanner {
    /// Moves `input` to `output`, without keys that may yet become the sequence. True: it is complete.
    pub(crate) fn feed(&mut self, input: &[u8], output: &mut Vec<u8>) -> bool {
        for &byte in input {
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return true;
                }
                continue;
            }
            output.extend_from_slice(&self.keys[..self.matched]);
            self.matched = 0;
            if self.keys.first() == Some(&byte) && self.keys.len() > 1 {
                self.matched = 1;
            } else {
                output.push(byte);
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("ctrl-p,ctrl-q", &[16, 17])]
    #[case("a,ctrl-[", &[b'a', 27])]
    fn detach_keys_are_read(#[case] text: &str, #[case] keys: &[u8]) {
        assert_eq!(DetachKeys::parse(text).unwrap(), DetachKeys(keys.to_vec()));
    }

    #[rstest]
    #[case("")]
    #[case("ctrl-")]
    #[case("ctrl-pp")]
    #[case("ab")]
    fn what_is_no_key_is_refused(#[case] text: &str) {
        assert!(DetachKeys::parse(text).is_err());
    }

    #[test]
    fn the_sequence_is_found_wherever_the_stream_is_cut() {
        let mut scanner = DetachKeys::parse("ctrl-p,ctrl-q").unwrap().scanner();
        let mut output = Vec::new();
        assert!(!scanner.feed(b"ab\x10", &mut output));
        assert_eq!(output, b"ab");
        assert!(!scanner.feed(b"\x10c", &mut output));
        assert_eq!(output, b"ab\x10\x10c"[..].to_vec());
        assert!(!scanner.feed(b"\x10", &mut output));
        assert!(scanner.feed(b"\x11rest", &mut output));
        assert_eq!(output, b"ab\x10\x10c"[..].to_vec());
    }
}
