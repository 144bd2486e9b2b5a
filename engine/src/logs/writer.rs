//! Writes a container's log, rotates it, and tells followers how far they can read.
//!
//! Files are `NAME` (the live one), `NAME.1` (the one before it) and so on. A write that fails (a full disk) loses its lines
//! and says so in the daemon's log, as Docker does: a container is not stopped by its log. What a killed daemon left of a line
//! is cut off when the log is opened again.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::watch;

use super::{
    LogError, Stream, format, reader,
    splitter::{Piece, Splitter},
};
use crate::time::UnixNanos;

/// How large a log may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Rotate when a file has reached this many bytes.
    pub(crate) max_size: Option<u64>,
    /// How many files there may be, with the live one.
    pub(crate) max_file: u32,
}

/// How far the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// How often it was rotated since it was opened.
    pub(crate) rotations: u64,
    /// Bytes in the live file.
    pub(crate) size: u64,
    /// A process is writing to it, or will be once it has started.
    pub(crate) active: bool,
}

/// Lines that are in the file already when a daemon takes over from one that was killed.
struct Duplicates {
    newest: UnixNanos,
    with_that_time: usize,
}

struct Inner {
    file: File,
    size: u64,
    rotations: u64,
    active: bool,
    splitter: Splitter,
    duplicates: Option<Duplicates>,
    failing: bool,
}

/// An open log.
pub(crate) struct Log {
    path: PathBuf,
    limits: Limits,
    /// Noted with each line.
    attributes: BTreeMap<String, String>,
    inner: Mutex<Inner>,
    position: watch::Sender<Position>,
}

impl Log {
    /// Opens or makes the log.
    pub(crate) fn open(path: &Path, limits: Limits) -> Result<Self, LogError> {
        Self::with_attributes(path, limits, BTreeMap::new())
    }

    /// Opens or makes the log; these are noted with each line.
    pub(crate) fn with_attributes(
        path: &Path,
        limits: Limits,
        attributes: BTreeMap<String, String>,
    ) -> Result<Self, LogError> {
        let open = || -> io::Result<(File, u64)> {
            let mut options = OpenOptions::new();
            options.read(true).append(true).create(true);
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let file = options.open(path)?;
            let size = cut_torn_line(&file)?;
            Ok((file, size))
        };
        let (file, size) = open().map_err(|error| LogError::new(path, error))?;
        let inner = Inner {
            file,
            size,
            rotations: 0,
            active: false,
            splitter: Splitter::default(),
            duplicates: None,
            failing: false,
        };
        let (position, _) = watch::channel(Position { rotations: 0, size, active: false });
        Ok(Self { path: path.to_owned(), limits, attributes, inner: Mutex::new(inner), position })
    }

    /// A process is about to write. With `resumed_since`, it is one that wrote to this log before, to an earlier daemon, since
    /// then: what it sends again is recognised.
    pub(crate) fn begin(&self, resumed_since: Option<UnixNanos>) -> Result<(), LogError> {
        let duplicates = match resumed_since {
            Some(since) => self.newest_lines(since)?,
            None => None,
        };
        let mut inner = self.lock();
        inner.active = true;
        inner.splitter = Splitter::default();
        inner.duplicates = duplicates;
        self.publish(&inner);
        Ok(())
    }

    /// Takes output of the process. Returns whether everything given so far is in the file, so that it can be acknowledged.
    pub(crate) fn write(&self, stream: Stream, time: UnixNanos, bytes: &[u8]) -> bool {
        let mut inner = self.lock();
        let mut lines = Vec::new();
        let Inner { splitter, duplicates, .. } = &mut *inner;
        splitter.push(stream, time, bytes, |piece| take(duplicates, &mut lines, &piece, &self.attributes));
        self.append(&mut inner, &lines);
        inner.splitter.is_idle()
    }

    /// The process has ended: writes what was held back and lets followers go.
    pub(crate) fn end(&self) {
        let mut inner = self.lock();
        let mut lines = Vec::new();
        let Inner { splitter, duplicates, .. } = &mut *inner;
        splitter.flush(|piece| take(duplicates, &mut lines, &piece, &self.attributes));
        inner.active = false;
        inner.duplicates = None;
        self.append(&mut inner, &lines);
        self.publish(&inner);
    }

    /// The live file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// How far it is written now.
    pub(crate) fn position(&self) -> Position {
        *self.position.borrow()
    }

    /// Every later change of [`Log::position`].
    pub(super) fn watch(&self) -> watch::Receiver<Position> {
        self.position.subscribe()
    }

    /// The files as they are at one moment, oldest first, the live one last, and the position of that moment.
    pub(super) fn files(&self) -> Result<(Vec<Arc<File>>, Position), LogError> {
        let inner = self.lock();
        let mut files = Vec::new();
        for number in (0..self.limits.max_file).rev() {
            match File::open(self.numbered(number)) {
                Ok(file) => files.push(Arc::new(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(LogError::new(&self.numbered(number), error)),
            }
        }
        Ok((files, self.position_of(&inner)))
    }

    /// The live file and those that became `.1` and so on in the last `rotations` rotations, oldest first.
    pub(super) fn files_since(&self, rotations: u64) -> Result<(Vec<Arc<File>>, Position), LogError> {
        let (mut files, position) = self.files()?;
        let missed = usize::try_from(position.rotations.saturating_sub(rotations)).unwrap_or(usize::MAX);
        let skip = files.len().saturating_sub(missed);
        files.drain(..skip);
        Ok((files, position))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder panics")
    }

    fn position_of(&self, inner: &Inner) -> Position {
        Position { rotations: inner.rotations, size: inner.size, active: inner.active }
    }

    fn publish(&self, inner: &Inner) {
        self.position.send_replace(self.position_of(inner));
    }

    fn numbered(&self, number: u32) -> PathBuf {
        if number == 0 {
            return self.path.clone();
        }
        let mut name = OsString::from(&self.path);
        name.push(format!(".{number}"));
        PathBuf::from(name)
    }

    fn append(&self, inner: &mut Inner, lines: &[u8]) {
        let mut rest = lines;
        while !rest.is_empty() {
            let mut part = rest;
            if let Some(max) = self.limits.max_size {
                match if inner.size >= max { self.rotate(inner) } else { Ok(()) } {
                    // A file ends with the line that fills it, however many lines come together.
                    Ok(()) => part = up_to_line_end(rest, max.saturating_sub(inner.size)),
                    Err(error) => self.complain(inner, &error),
                }
            }
            match inner.file.write_all(part) {
                Ok(()) => {
                    inner.size += part.len() as u64;
                    inner.failing = false;
                }
                Err(error) => {
                    self.complain(inner, &error);
                    // Whatever part of it went in is not a line: back to the last good end.
                    let _ = inner.file.set_len(inner.size);
                }
            }
            rest = &rest[part.len()..];
        }
        if !lines.is_empty() {
            self.publish(inner);
        }
    }

    fn complain(&self, inner: &mut Inner, error: &io::Error) {
        if !inner.failing {
            tracing::error!(log = %self.path.display(), %error, "cannot write a container's log; its lines are lost until that ends");
        }
        inner.failing = true;
    }

    fn rotate(&self, inner: &mut Inner) -> io::Result<()> {
        if self.limits.max_file <= 1 {
            inner.file.set_len(0)?;
        } else {
            for number in (1..self.limits.max_file).rev() {
                match std::fs::rename(self.numbered(number - 1), self.numbered(number)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            let mut options = OpenOptions::new();
            options.read(true).append(true).create(true);
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            inner.file = options.open(&self.path)?;
        }
        inner.size = 0;
        inner.rotations += 1;
        Ok(())
    }

    /// The time of the newest line, if not before `since`, and how many lines have it.
    fn newest_lines(&self, since: UnixNanos) -> Result<Option<Duplicates>, LogError> {
        let (files, _) = self.files()?;
        let mut newest = None;
        let mut with_that_time = 0;
        let result = reader::backwards(&files, |line| {
            let Some(entry) = format::decode(line) else { return true };
            match newest {
                None if entry.time < since => return false,
                None => newest = Some(entry.time),
                Some(time) if entry.time != time => return false,
                Some(_) => {}
            }
            with_that_time += 1;
            true
        });
        result.map_err(|error| LogError::new(&self.path, error))?;
        Ok(newest.map(|newest| Duplicates { newest, with_that_time }))
    }
}

/// Encodes a piece unless it is in the file already.
fn take(
    duplicates: &mut Option<Duplicates>,
    lines: &mut Vec<u8>,
    piece: &Piece,
    attributes: &BTreeMap<String, String>,
) {
    if let Some(known) = duplicates {
        if piece.time < known.newest {
            return;
        }
        if piece.time == known.newest && known.with_that_time > 0 {
            known.with_that_time -= 1;
            return;
        }
        *duplicates = None;
    }
    format::encode(lines, piece.stream, piece.time, &piece.bytes, attributes);
}

/// Shortens the file to its last newline; gives the length.
fn cut_torn_line(file: &File) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let mut end = size;
    let mut block = vec![0; 64 * 1024];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..usize::try_from(end - start).expect("at most one block")];
        file.read_exact_at(part, start)?;
        if let Some(at) = part.iter().rposition(|b| *b == b'\n') {
            end = start + at as u64 + 1;
            break;
        }
        end = start;
    }
    if end < size {
        file.set_len(end)?;
    }
    Ok(end)
}

/// The lines that begin in the first `room` bytes; at least one.
fn up_to_line_end(lines: &[u8], room: u64) -> &[u8] {
    let begin = usize::try_from(room).unwrap_or(usize::MAX).min(lines.len()).saturating_sub(1);
    let end = lines[begin..].iter().position(|byte| *byte == b'\n').map_or(lines.len(), |at| begin + at + 1);
    &lines[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNLIMITED: Limits = Limits { max_size: None, max_file: 1 };

    fn texts(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| format::decode(line.as_bytes()).unwrap().text).collect()
    }

    #[test]
    fn a_line_is_acknowledged_only_when_it_is_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::open(&path, UNLIMITED).unwrap();
        log.begin(None).unwrap();
        assert!(!log.write(Stream::Stdout, UnixNanos(1), b"hel"));
        assert!(texts(&path).is_empty());
        assert!(log.write(Stream::Stdout, UnixNanos(2), b"lo\n"));
        assert!(!log.write(Stream::Stdout, UnixNanos(3), b"end"));
        log.end();
        assert_eq!(texts(&path), ["hello\n", "end"]);
    }

    #[test]
    fn a_log_continues_exactly_where_a_killed_daemon_left_it() {
        let frames: [(Stream, &[u8]); 5] = [
            (Stream::Stdout, b"one\ntw"),
            (Stream::Stderr, b"error\n"),
            (Stream::Stdout, b"o\nthree\nfour\n"),
            (Stream::Stdout, b"five\n"),
            (Stream::Stdout, b"six"),
        ];
        let folder = tempfile::tempdir().unwrap();
        let whole_path = folder.path().join("whole");
        let run = |log: &Log, frames: &[(Stream, &[u8])]| {
            for (at, (stream, bytes)) in frames.iter().enumerate() {
                log.write(*stream, UnixNanos(100 + at as i64), bytes);
            }
        };
        let whole = Log::open(&whole_path, UNLIMITED).unwrap();
        whole.begin(None).unwrap();
        run(&whole, &frames);
        whole.end();
        let expected = std::fs::read(&whole_path).unwrap();

        for killed_at in 0..=expected.len() {
            let path = folder.path().join(format!("killed-{killed_at}"));
            std::fs::write(&path, &expected[..killed_at]).unwrap();
            let log = Log::open(&path, UNLIMITED).unwrap();
            log.begin(Some(UnixNanos(100))).unwrap();
            run(&log, &frames);
            log.end();
            assert_eq!(std::fs::read(&path).unwrap(), expected, "killed after {killed_at} bytes");
        }
    }

    #[test]
    fn lines_of_an_earlier_run_are_no_duplicates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::open(&path, UNLIMITED).unwrap();
        log.begin(None).unwrap();
        log.write(Stream::Stdout, UnixNanos(50), b"first run\n");
        log.end();
        log.begin(Some(UnixNanos(100))).unwrap();
        log.write(Stream::Stdout, UnixNanos(101), b"second run\n");
        log.end();
        assert_eq!(texts(&path), ["first run\n", "second run\n"]);
    }

    #[test]
    fn rotation_keeps_as_many_files_as_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = Log::open(&path, Limits { max_size: Some(100), max_file: 3 }).unwrap();
        log.begin(None).unwrap();
        for line in 0..10 {
            log.write(
                Stream::Stdout,
                UnixNanos(line),
                format!("line {line}, long enough to fill a file\n").as_bytes(),
            );
        }
        let names = |n: u32| texts(&log.numbered(n)).len();
        assert_eq!((names(0), names(1), names(2)), (1, 1, 1));
        assert!(!log.numbered(3).exists());
        assert_eq!(texts(&path), ["line 9, long enough to fill a file\n"]);
    }
}
