//! The download of one layer: its blob streams in, with resumption after a cut, and through the converter on a thread of
//! its own; a channel of a few pieces connects the two. Whoever wants the same layer meanwhile waits for the same
//! download, which goes on for as long as anyone does.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{HeaderMap, StatusCode, header};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::AbortHandle;

use super::error::RegistryError;
use super::manifest::Descriptor;
use super::repository::Repository;
use crate::digest::Digest;
use crate::store::{ImageStore, LayerLease};

/// How many layers are downloaded at the same time; Docker's number.
const PARALLEL: usize = 3;
/// How many pieces wait for the converter.
const QUEUE: usize = 4;
/// So much must have come for an attempt to count as one that got on.
const PROGRESS: u64 = 64 << 10;

/// How far a download is.
#[derive(Debug, Clone)]
pub(super) enum State {
    Waiting,
    Downloading {
        current: u64,
    },
    /// It broke and is tried again after this time.
    Retrying {
        delay: Duration,
    },
    Verifying,
    Converting,
    Done(Arc<LayerLease>),
    Failed(Arc<RegistryError>),
}

/// A download that someone waits for.
#[derive(Debug)]
pub(super) struct Download {
    pub(super) state: watch::Receiver<State>,
    task: AbortHandle,
}

impl Drop for Download {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a blob must turn out to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    blob: Digest,
    size: u64,
    diff_id: Digest,
}

/// All downloads that go on.
#[derive(Debug)]
pub(super) struct Downloads {
    active: Mutex<HashMap<Key, Weak<Download>>>,
    permits: Arc<Semaphore>,
}

impl Default for Downloads {
    fn default() -> Self {
        Self { active: Mutex::default(), permits: Arc::new(Semaphore::new(PARALLEL)) }
    }
}

impl Downloads {
    /// Joins the download of a layer, or begins it.
    pub(super) fn join(
        &self,
        store: &Arc<ImageStore>,
        repository: &Repository,
        layer: &Descriptor,
        diff_id: Digest,
    ) -> Arc<Download> {
        let key = Key { blob: layer.digest, size: layer.size, diff_id };
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        active.retain(|_, download| download.strong_count() > 0);
        let under_way = active.get(&key).and_then(Weak::upgrade);
        if let Some(download) = under_way.filter(|download| !download.has_failed()) {
            return download;
        }
        let (sender, state) = watch::channel(State::Waiting);
        let work = Work {
            store: Arc::clone(store),
            repository: repository.clone(),
            layer: layer.clone(),
            diff_id,
            state: sender,
        };
        let permits = Arc::clone(&self.permits);
        let task = tokio::spawn(async move {
            // The semaphore is never closed.
            let Ok(_permit) = permits.acquire_owned().await else { return };
            let end = match work.run().await {
                Ok(lease) => State::Done(Arc::new(lease)),
                Err(error) => State::Failed(Arc::new(error)),
            };
            work.state.send_replace(end);
        });
        let download = Arc::new(Download { state, task: task.abort_handle() });
        active.insert(key, Arc::downgrade(&download));
        download
    }
}

impl Download {
    fn has_failed(&self) -> bool {
        // A task that ended without a word was aborted, or worse.
        let ended_silently = self.state.has_changed().is_err();
        let state = self.state.borrow();
        matches!(*state, State::Failed(_)) || (ended_silently && !matches!(*state, State::Done(_)))
    }
}

struct Work {
    store: Arc<ImageStore>,
    repository: Repository,
    layer: Descriptor,
    diff_id: Digest,
    state: watch::Sender<State>,
}

impl Work {
    async fn run(&self) -> Result<LayerLease, RegistryError> {
        self.state.send_replace(State::Downloading { current: 0 });
        let (pieces, reader) = mpsc::channel(QUEUE);
        let store = Arc::clone(&self.store);
        let (blob, size, diff_id) = (self.layer.digest, self.layer.size, self.diff_id);
        let state = self.state.clone();
        let converting = tokio::task::spawn_blocking(move || {
            let reader = PieceReader { pieces: reader, current: Bytes::new(), has_ended: false };
            let converted = store.convert_layer(reader)?;
            let layer = converted.converted;
            if layer.blob != blob {
                let what = "filesystem layer".to_owned();
                return Err(RegistryError::DigestMismatch { what, expected: blob, found: layer.blob });
            }
            if layer.blob_size != size {
                return Err(wrong_size(blob, size, format!("it has {}", layer.blob_size)));
            }
            if layer.diff_id != diff_id {
                let what = format!("filesystem layer {blob} (uncompressed)");
                return Err(RegistryError::DigestMismatch { what, expected: diff_id, found: layer.diff_id });
            }
            state.send_replace(State::Converting);
            Ok(store.lease_new_layer(converted)?)
        });
        let fetched = self.fetch(&pieces).await;
        let is_whole = matches!(fetched, Ok(Fetched::Whole));
        if is_whole {
            self.state.send_replace(State::Verifying);
            let _ = pieces.send(None).await;
        }
        drop(pieces);
        let converted = converting.await.map_err(|_| RegistryError::Cancelled)?;
        match (fetched, converted) {
            // What broke the transfer also broke the conversion.
            (Err(error), _) => Err(error),
            (Ok(_), converted) => converted.map_err(|error| self.explain(error)),
        }
    }

    /// Names the layer that cannot be used.
    fn explain(&self, error: RegistryError) -> RegistryError {
        match error {
            RegistryError::Store(crate::store::Error::Layer(source)) if !source.is_local() => {
                RegistryError::Layer { digest: self.layer.digest, source }
            }
            other => other,
        }
    }

    /// Moves the blob into the channel, in as many attempts as it takes.
    async fn fetch(&self, pieces: &mpsc::Sender<Option<Bytes>>) -> Result<Fetched, RegistryError> {
        let http = &self.repository.session.http;
        let mut received = 0;
        let mut failures = 0;
        loop {
            let before = received;
            let error = match self.attempt(pieces, &mut received).await {
                Ok(end) => return Ok(end),
                Err(error) if error.is_transient() => error,
                Err(error) => return Err(error),
            };
            failures = if received - before >= PROGRESS { 1 } else { failures + 1 };
            let Some(delay) = http.wait_time(failures, error.retry_after()) else { return Err(error) };
            tracing::debug!(layer = %self.layer.digest, received, %error, ?delay, "a download broke");
            self.state.send_replace(State::Retrying { delay });
            tokio::time::sleep(delay).await;
            self.state.send_replace(State::Downloading { current: received });
        }
    }

    async fn attempt(
        &self,
        pieces: &mpsc::Sender<Option<Bytes>>,
        received: &mut u64,
    ) -> Result<Fetched, RegistryError> {
        let (digest, size) = (self.layer.digest, self.layer.size);
        let http = &self.repository.session.http;
        let url = self.repository.blob_url(&digest)?;
        if *received == size && size > 0 {
            return Ok(Fetched::Whole);
        }
        let response = self.repository.blob(&digest, *received).await?;
        let mut position = start(&http.host(), response.status(), response.headers(), *received)?;
        if let Some(length) = length(response.headers())
            && position.checked_add(length) != Some(size)
        {
            let found = format!("the registry sends {}", position.saturating_add(length));
            return Err(wrong_size(digest, size, found));
        }
        let mut body = response.into_body();
        while let Some(mut piece) = http.next_piece(&url, &mut body).await? {
            let end = position + piece.len() as u64;
            if end > size {
                return Err(wrong_size(digest, size, "the registry sends more".to_owned()));
            }
            // A registry that cannot resume begins anew: what is there already is passed over.
            let known = received.saturating_sub(position).min(piece.len() as u64);
            piece.advance(usize::try_from(known).unwrap_or(usize::MAX));
            position = end;
            if piece.is_empty() {
                continue;
            }
            if pieces.send(Some(piece)).await.is_err() {
                return Ok(Fetched::Unwanted);
            }
            *received = position;
            self.state.send_replace(State::Downloading { current: position });
        }
        if position == size {
            return Ok(Fetched::Whole);
        }
        let source: super::error::Source = format!("it ended after {position} of {size} bytes").into();
        Err(RegistryError::Transport { url: super::http_client::shown(&url), source })
    }
}

/// How a transfer ended well.
enum Fetched {
    Whole,
    /// The converter wants no more of it.
    Unwanted,
}

fn wrong_size(digest: Digest, expected: u64, found: String) -> RegistryError {
    RegistryError::SizeMismatch { what: "layer", digest, expected, found }
}

/// Where in the blob an answer begins.
fn start(host: &str, status: StatusCode, headers: &HeaderMap, wanted: u64) -> Result<u64, RegistryError> {
    if status != StatusCode::PARTIAL_CONTENT {
        return Ok(0);
    }
    let range = headers.get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let first = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok());
    match first {
        Some(first) if first == wanted => Ok(first),
        _ => Err(RegistryError::protocol(host, "it resumes a download at another place than asked for")),
    }
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The pieces as a blocking reader. Only an explicit end is one: a channel that closes without it was cut.
struct PieceReader {
    pieces: mpsc::Receiver<Option<Bytes>>,
    current: Bytes,
    has_ended: bool,
}

impl Read for PieceReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.has_ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => self.current = piece,
                Some(None) => self.has_ended = true,
                None => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the transfer broke")),
            }
        }
        let length = self.current.len().min(out.len());
        self.current.copy_to_slice(&mut out[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_answer_must_begin_where_it_was_cut() {
        let begins = |status: u16, range: Option<&str>| {
            let mut headers = HeaderMap::new();
            range.map(|range| headers.insert(header::CONTENT_RANGE, range.parse().unwrap()));
            start("r", StatusCode::from_u16(status).unwrap(), &headers, 100).ok()
        };
        assert_eq!(begins(206, Some("bytes 100-199/200")), Some(100));
        assert_eq!(begins(200, None), Some(0));
        for bad in [Some("bytes 0-199/200"), Some("bytes */200"), Some("x"), None] {
            assert_eq!(begins(206, bad), None, "{bad:?}");
        }
    }
}
