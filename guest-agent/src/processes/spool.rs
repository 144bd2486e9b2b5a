//! What a process wrote and the daemon has not acknowledged yet. The spool is bounded: when it is full the readers stop
//! reading, the pipe fills up and the process waits, so that nothing is lost and memory does not grow.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use coracle_agent_api::ExitStatus;
use coracle_agent_api::frame::{self, HEADER_LEN, Header, Kind};
use tokio::sync::Notify;

use crate::clock;

/// Unacknowledged bytes, headers included, above which reading stops.
const LIMIT: usize = 1024 * 1024;

/// The frames of one process.
pub(crate) struct Spool {
    inner: Mutex<Inner>,
    /// Told when there is a new frame or a new subscriber.
    news: Notify,
    /// Told when frames were acknowledged.
    room: Notify,
}

struct Inner {
    frames: VecDeque<Frame>,
    bytes: usize,
    next_sequence: u64,
    acknowledged: u64,
    last_nanos: u64,
    /// Streams that can still bring output, and the exit that is still to come.
    open: u32,
    subscriber: u64,
}

struct Frame {
    header: Header,
    payload: Bytes,
}

/// The right to read a spool, until another one takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subscription(u64);

/// What a subscriber gets.
pub(crate) enum Next {
    /// Encoded frames and the sequence number of the last one.
    Frames(Bytes, u64),
    /// The end frame was delivered before; nothing will follow.
    Ended,
    /// Another subscriber came.
    Replaced,
}

impl Spool {
    /// A spool that ends after `streams` streams and one exit.
    pub(crate) fn new(streams: u32) -> Self {
        let inner = Inner {
            frames: VecDeque::new(),
            bytes: 0,
            next_sequence: 1,
            acknowledged: 0,
            last_nanos: 0,
            open: streams + 1,
            subscriber: 0,
        };
        Self { inner: Mutex::new(inner), news: Notify::new(), room: Notify::new() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds output; the caller has awaited [`Spool::has_room`].
    pub(crate) fn push_output(&self, kind: Kind, payload: Bytes) {
        self.inner().push(kind, payload);
        self.news.notify_waiters();
    }

    /// One of the streams has ended.
    pub(crate) fn stream_ended(&self) {
        self.inner().close_one();
        self.news.notify_waiters();
    }

    /// The process has ended.
    pub(crate) fn push_exit(&self, status: &ExitStatus) {
        let mut inner = self.inner();
        inner.push(Kind::Exit, frame::encode_exit(status).into());
        inner.close_one();
        drop(inner);
        self.news.notify_waiters();
    }

    /// Waits until the spool is not full.
    pub(crate) async fn has_room(&self) {
        loop {
            let notified = self.room.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.inner().bytes < LIMIT {
                return;
            }
            notified.await;
        }
    }

    /// Lets go of everything up to `sequence`. A number that was never given out is ignored.
    pub(crate) fn acknowledge(&self, sequence: u64) {
        let mut inner = self.inner();
        if sequence >= inner.next_sequence {
            return;
        }
        while inner.frames.front().is_some_and(|frame| frame.header.sequence <= sequence) {
            if let Some(frame) = inner.frames.pop_front() {
                inner.bytes -= frame.cost();
            }
        }
        inner.acknowledged = inner.acknowledged.max(sequence);
        drop(inner);
        self.room.notify_waiters();
    }

    /// The newest number that was acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.inner().acknowledged
    }

    /// The newest number that was given out.
    pub(crate) fn newest(&self) -> u64 {
        self.inner().next_sequence - 1
    }

    /// Becomes the only subscriber.
    pub(crate) fn subscribe(&self) -> Subscription {
        let mut inner = self.inner();
        inner.subscriber += 1;
        let subscription = Subscription(inner.subscriber);
        drop(inner);
        self.news.notify_waiters();
        subscription
    }

    /// Waits for frames with numbers above `after`, and returns as many of them as a write is good for.
    pub(crate) async fn next(&self, subscription: Subscription, after: u64) -> Next {
        loop {
            let notified = self.news.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            {
                let inner = self.inner();
                if Subscription(inner.subscriber) != subscription {
                    return Next::Replaced;
                }
                if let Some((bytes, last)) = inner.encode_after(after) {
                    return Next::Frames(bytes, last);
                }
                if inner.open == 0 {
                    return Next::Ended;
                }
            }
            notified.await;
        }
    }
}

impl Frame {
    fn cost(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }
}

impl Inner {
    fn push(&mut self, kind: Kind, payload: Bytes) {
        self.last_nanos = clock::unix_nanos().max(self.last_nanos + 1);
        let header = Header {
            kind,
            len: payload.len() as u32,
            sequence: self.next_sequence,
            unix_nanos: self.last_nanos,
        };
        self.next_sequence += 1;
        let frame = Frame { header, payload };
        self.bytes += frame.cost();
        self.frames.push_back(frame);
    }

    fn close_one(&mut self) {
        self.open = self.open.saturating_sub(1);
        if self.open == 0 {
            self.push(Kind::End, Bytes::new());
        }
    }

    fn encode_after(&self, after: u64) -> Option<(Bytes, u64)> {
        const BATCH: usize = 256 * 1024;
        let first = self.frames.front()?.header.sequence;
        let skip = usize::try_from((after + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        let mut buffer = BytesMut::new();
        let mut last = None;
        for frame in self.frames.iter().skip(skip) {
            if !buffer.is_empty() && buffer.len() + frame.cost() > BATCH {
                break;
            }
            buffer.put_slice(&frame.header.encode());
            buffer.put_slice(&frame.payload);
            last = Some(frame.header.sequence);
        }
        last.map(|last| (buffer.freeze(), last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> ExitStatus {
        ExitStatus { code: 0, oom_killed: false, finished_unix_nanos: 1 }
    }

    fn headers(mut bytes: &[u8]) -> Vec<Header> {
        let mut headers = Vec::new();
        while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
            let header = Header::decode(header).unwrap();
            bytes = &rest[header.len as usize..];
            headers.push(header);
        }
        headers
    }

    async fn frames(spool: &Spool, after: u64) -> Vec<Header> {
        let subscription = spool.subscribe();
        match spool.next(subscription, after).await {
            Next::Frames(bytes, _) => headers(&bytes),
            Next::Ended | Next::Replaced => Vec::new(),
        }
    }

    #[tokio::test]
    async fn the_end_follows_the_exit_and_all_streams() {
        let spool = Spool::new(2);
        spool.stream_ended();
        spool.push_exit(&status());
        spool.push_output(Kind::Stderr, Bytes::from_static(b"late"));
        spool.stream_ended();
        let found = frames(&spool, 0).await;
        assert_eq!(found.iter().map(|h| h.kind).collect::<Vec<_>>(), [Kind::Exit, Kind::Stderr, Kind::End]);
        assert_eq!(found.iter().map(|h| h.sequence).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(found.is_sorted_by(|a, b| a.unix_nanos < b.unix_nanos));
        let subscription = spool.subscribe();
        assert!(matches!(spool.next(subscription, 3).await, Next::Ended));
    }

    #[tokio::test]
    async fn a_reader_goes_on_after_what_it_names() {
        let spool = Spool::new(1);
        for _ in 0..5 {
            spool.push_output(Kind::Stdout, Bytes::from_static(b"x"));
        }
        spool.acknowledge(2);
        spool.acknowledge(99);
        assert_eq!(spool.acknowledged(), 2);
        assert_eq!(frames(&spool, 0).await.first().unwrap().sequence, 3);
        assert_eq!(frames(&spool, 4).await.first().unwrap().sequence, 5);
    }

    #[tokio::test]
    async fn a_full_spool_has_room_again_after_an_acknowledgement() {
        let spool = Spool::new(1);
        while spool.inner().bytes < LIMIT {
            spool.push_output(Kind::Stdout, Bytes::from(vec![0; frame::MAX_PAYLOAD]));
        }
        let waiting = spool.has_room();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        spool.acknowledge(1);
        waiting.await;
    }

    #[tokio::test]
    async fn a_new_subscriber_replaces_the_old_one() {
        let spool = Spool::new(1);
        let old = spool.subscribe();
        let _new = spool.subscribe();
        assert!(matches!(spool.next(old, 0).await, Next::Replaced));
    }
}
