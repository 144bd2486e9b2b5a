//! Reads a container's log: from its beginning or its last lines, and on as it grows.
//!
//! A reader holds the files open that it has yet to read, so rotation takes nothing away from it. It reads no further than the
//! writer says.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use tokio::sync::{mpsc, watch};

use super::{Entry, Log, LogError, Position, format};
use crate::time::UnixNanos;

/// Longer lines than this are not ours; they are skipped.
const MAX_LINE: usize = 1024 * 1024;
/// How much is read at once.
const BLOCK: usize = 256 * 1024;

/// Which part of a log to read.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReadOptions {
    /// Skip until the first entry that is not before this; then no more, since clocks may step.
    pub(crate) since: Option<UnixNanos>,
    /// End before the first entry that is after this.
    pub(crate) until: Option<UnixNanos>,
    /// Begin with this many of the last entries.
    pub(crate) tail: Option<usize>,
    /// Go on until the container stops.
    pub(crate) follow: bool,
    /// Read no further than this (for clients that get the rest elsewhere).
    pub(crate) up_to: Option<Position>,
}

/// Reads the log into a channel; returns at its end, or when no one listens any more.
pub(crate) async fn read(
    log: Arc<Log>,
    options: ReadOptions,
    out: mpsc::Sender<Vec<Entry>>,
) -> Result<(), LogError> {
    let mut reader = Reader { log, since: options.since, until: options.until, out };
    let listener = reader.out.clone();
    tokio::select! {
        () = listener.closed() => Ok(()),
        result = reader.run(&options) => result,
    }
}

/// The sink took no more, or everything asked for was given.
struct Done;

/// Whether an entry is in the asked-for time.
enum Wanted {
    Yes,
    No,
    NoMore,
}

struct Reader {
    log: Arc<Log>,
    since: Option<UnixNanos>,
    until: Option<UnixNanos>,
    out: mpsc::Sender<Vec<Entry>>,
}

impl Reader {
    async fn run(&mut self, options: &ReadOptions) -> Result<(), LogError> {
        let watch = self.log.watch();
        let (mut files, mut position) = self.log.files()?;
        if let Some(up_to) = options.up_to {
            // Rotated since: what was the live file is an older one now, and ends itself.
            let newer =
                usize::try_from(position.rotations.saturating_sub(up_to.rotations)).unwrap_or(usize::MAX);
            files.truncate(files.len().saturating_sub(newer));
            if newer == 0 {
                position = up_to;
            }
        }
        let Some(live) = files.pop() else { return Ok(()) };
        let (skip, start) = match options.tail {
            Some(lines) => self.tail(files.clone(), Arc::clone(&live), position.size, lines).await?,
            None => (0, 0),
        };
        let mut start = start;
        for file in files.drain(..).skip(skip) {
            if self.drain(&file, &mut std::mem::take(&mut start), None).await?.is_err() {
                return Ok(());
            }
        }
        let mut at = start;
        let limit = if options.up_to.is_some_and(|up_to| up_to.rotations != position.rotations) {
            None
        } else {
            Some(position.size)
        };
        if self.drain(&live, &mut at, limit).await?.is_err() || !options.follow {
            return Ok(());
        }
        self.follow(watch, live, at, position).await
    }

    async fn follow(
        &mut self,
        mut watch: watch::Receiver<Position>,
        mut live: Arc<File>,
        mut at: u64,
        mut seen: Position,
    ) -> Result<(), LogError> {
        loop {
            let now = *watch.borrow_and_update();
            if now.rotations != seen.rotations {
                if self.drain(&live, &mut at, None).await?.is_err() {
                    return Ok(());
                }
                let (mut files, position) = self.log.files_since(seen.rotations)?;
                let Some(newest) = files.pop() else { return Ok(()) };
                for file in files {
                    if self.drain(&file, &mut 0, None).await?.is_err() {
                        return Ok(());
                    }
                }
                (live, at, seen) = (newest, 0, position);
            } else {
                seen = now;
            }
            if self.drain(&live, &mut at, Some(seen.size)).await?.is_err() || !seen.active {
                return Ok(());
            }
            if watch.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    /// Sends the entries of a file from `at` to `limit` or its end.
    async fn drain(
        &mut self,
        file: &Arc<File>,
        at: &mut u64,
        limit: Option<u64>,
    ) -> Result<Result<(), Done>, LogError> {
        let mut pending = Vec::new();
        loop {
            let want = limit.map_or(BLOCK as u64, |limit| limit.saturating_sub(*at).min(BLOCK as u64));
            if want == 0 {
                return Ok(Ok(()));
            }
            let block = self.read_block(Arc::clone(file), *at, want).await?;
            if block.is_empty() {
                return Ok(Ok(()));
            }
            *at += block.len() as u64;
            pending.extend_from_slice(&block);
            let mut consumed = 0;
            let mut batch = Vec::new();
            let mut ended = false;
            while let Some(len) = pending[consumed..].iter().position(|b| *b == b'\n') {
                let line = &pending[consumed..consumed + len];
                consumed += len + 1;
                let Some(entry) = format::decode(line) else { continue };
                match self.wants(&entry) {
                    Wanted::Yes => batch.push(entry),
                    Wanted::No => {}
                    Wanted::NoMore => {
                        ended = true;
                        break;
                    }
                }
            }
            if !batch.is_empty() && self.out.send(batch).await.is_err() || ended {
                return Ok(Err(Done));
            }
            pending.drain(..consumed);
            if pending.len() > MAX_LINE {
                pending.clear();
            }
        }
    }

    fn wants(&mut self, entry: &Entry) -> Wanted {
        if self.since.is_some_and(|since| entry.time < since) {
            return Wanted::No;
        }
        self.since = None;
        if self.until.is_some_and(|until| entry.time > until) { Wanted::NoMore } else { Wanted::Yes }
    }

    async fn read_block(&self, file: Arc<File>, at: u64, len: u64) -> Result<Vec<u8>, LogError> {
        let read = move || {
            let mut block = vec![0; usize::try_from(len).unwrap_or(BLOCK)];
            let got = file.read_at(&mut block, at)?;
            block.truncate(got);
            Ok(block)
        };
        self.blocking(read).await
    }

    /// Which file, and which place in it, the last lines begin at.
    async fn tail(
        &self,
        older: Vec<Arc<File>>,
        live: Arc<File>,
        size: u64,
        lines: usize,
    ) -> Result<(usize, u64), LogError> {
        self.blocking(move || tail_start(&older, &live, size, lines)).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, LogError> {
        let result =
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
        result.map_err(|error| LogError::new(std::path::Path::new("of the container"), error))
    }
}

fn tail_start(older: &[Arc<File>], live: &File, size: u64, lines: usize) -> io::Result<(usize, u64)> {
    let mut left = lines;
    let mut sizes = Vec::new();
    for file in older {
        sizes.push(file.metadata()?.len());
    }
    let all = older.iter().map(Arc::as_ref).zip(sizes).chain([(live, size)]).enumerate();
    for (index, (file, size)) in all.collect::<Vec<_>>().into_iter().rev() {
        if left == 0 {
            return Ok(if index == older.len() { (index, size) } else { (index + 1, 0) });
        }
        let mut found = None;
        newlines_backwards(file, size, |at| {
            // A newline at the very end ends the last line; every other one begins a line.
            if at + 1 < size {
                left -= 1;
                if left == 0 {
                    found = Some(at + 1);
                }
            }
            left > 0
        })?;
        if let Some(at) = found {
            return Ok((index, at));
        }
        left = left.saturating_sub(usize::from(size > 0));
    }
    Ok((0, 0))
}

/// Gives the place of each newline from the end of the file to its beginning, until told to stop.
fn newlines_backwards(file: &File, size: u64, mut each: impl FnMut(u64) -> bool) -> io::Result<()> {
    let mut end = size;
    let mut block = vec![0; 64 * 1024];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..usize::try_from(end - start).unwrap_or(0)];
        file.read_exact_at(part, start)?;
        for (at, _) in part.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            if !each(start + at as u64) {
                return Ok(());
            }
        }
        end = start;
    }
    Ok(())
}

/// Gives the lines of the files (oldest first) from the last to the first, without newlines, until told to stop.
pub(super) fn backwards(files: &[Arc<File>], mut each: impl FnMut(&[u8]) -> bool) -> io::Result<()> {
    for file in files.iter().rev() {
        let size = file.metadata()?.len();
        let mut line_end = None;
        let mut go_on = true;
        let mut failed = Ok(());
        let mut line = |start: u64, end: u64| -> bool {
            let len = usize::try_from(end - start).unwrap_or(usize::MAX);
            if len > MAX_LINE {
                return true;
            }
            let mut bytes = vec![0; len];
            match file.read_exact_at(&mut bytes, start) {
                Ok(()) => each(&bytes),
                Err(error) => {
                    failed = Err(error);
                    false
                }
            }
        };
        newlines_backwards(file, size, |at| {
            if let Some(end) = line_end.replace(at) {
                go_on = line(at + 1, end);
            }
            go_on
        })?;
        if go_on && let Some(end) = line_end {
            go_on = line(0, end);
        }
        failed?;
        if !go_on {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Limits, Stream},
        *,
    };

    async fn texts(log: &Arc<Log>, options: ReadOptions) -> Vec<String> {
        let (out, mut entries) = mpsc::channel(1);
        let task = tokio::spawn(read(Arc::clone(log), options, out));
        let mut texts = Vec::new();
        while let Some(batch) = entries.recv().await {
            texts.extend(batch.into_iter().map(|entry| entry.text.trim_end().to_owned()));
        }
        task.await.unwrap().unwrap();
        texts
    }

    fn log_with(lines: std::ops::Range<i64>, limits: Limits) -> (tempfile::TempDir, Arc<Log>) {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(&folder.path().join("log"), limits).unwrap();
        log.begin(None).unwrap();
        for line in lines {
            log.write(Stream::Stdout, UnixNanos(line), format!("{line}\n").as_bytes());
        }
        (folder, Arc::new(log))
    }

    fn numbers(range: std::ops::Range<i64>) -> Vec<String> {
        range.map(|n| n.to_string()).collect()
    }

    const ROTATING: Limits = Limits { max_size: Some(300), max_file: 4 };
    const SINGLE: Limits = Limits { max_size: None, max_file: 1 };

    #[tokio::test]
    async fn the_last_lines_are_found_across_files() {
        let (_folder, log) = log_with(0..20, ROTATING);
        log.end();
        let all = texts(&log, ReadOptions::default()).await;
        assert_eq!(all, numbers(20 - all.len() as i64..20));
        for tail in 0..=all.len() {
            let options = ReadOptions { tail: Some(tail), ..ReadOptions::default() };
            assert_eq!(texts(&log, options).await, all[all.len() - tail..], "tail {tail}");
        }
        let options = ReadOptions { tail: Some(1000), ..ReadOptions::default() };
        assert_eq!(texts(&log, options).await, all);
    }

    #[tokio::test]
    async fn since_and_until_cut_the_log() {
        let (_folder, log) = log_with(0..10, SINGLE);
        log.end();
        let options =
            ReadOptions { since: Some(UnixNanos(3)), until: Some(UnixNanos(6)), ..ReadOptions::default() };
        assert_eq!(texts(&log, options).await, numbers(3..7));
    }

    #[tokio::test]
    async fn a_follower_reads_across_rotations_and_ends_with_the_container() {
        let (_folder, log) = log_with(0..2, Limits { max_size: Some(300), max_file: 100 });
        let follower = tokio::spawn({
            let log = Arc::clone(&log);
            async move { texts(&log, ReadOptions { follow: true, ..ReadOptions::default() }).await }
        });
        for line in 2..100 {
            log.write(Stream::Stdout, UnixNanos(line), format!("{line}\n").as_bytes());
            tokio::task::yield_now().await;
        }
        log.end();
        assert_eq!(follower.await.unwrap(), numbers(0..100));
    }

    #[tokio::test]
    async fn a_reader_can_be_told_where_to_end() {
        let (_folder, log) = log_with(0..5, SINGLE);
        let up_to = Some(log.position());
        log.write(Stream::Stdout, UnixNanos(5), b"5\n");
        assert_eq!(texts(&log, ReadOptions { up_to, ..ReadOptions::default() }).await, numbers(0..5));
    }
}
