//! Hands a process's output to those who are attached.

use std::sync::Mutex;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    logs::{Log, Position, Stream},
    time::UnixNanos,
};

/// How many pieces of output wait for one client before the process has to wait.
const QUEUE: usize = 16;

/// A piece of output.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    pub(crate) stream: Stream,
    pub(crate) bytes: Bytes,
}

struct Subscriber {
    stdout: bool,
    stderr: bool,
    queue: mpsc::Sender<Chunk>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Fanout {
    subscribers: Mutex<Vec<Subscriber>>,
}

impl Fanout {
    /// Everything from now on to the end of the run, and the place in the log where that begins.
    pub(crate) fn subscribe(
        &self,
        stdout: bool,
        stderr: bool,
        log: Option<&Log>,
    ) -> (mpsc::Receiver<Chunk>, Option<Position>) {
        let (queue, output) = mpsc::channel(QUEUE);
        let mut subscribers = self.subscribers.lock().expect("no holder panics");
        subscribers.push(Subscriber { stdout, stderr, queue });
        (output, log.map(Log::position))
    }

    /// Ends everyone's stream.
    pub(crate) fn close(&self) {
        self.subscribers.lock().expect("no holder panics").clear();
    }

    /// Writes to the log; says whether everything so far is safe there, and who is to get the same bytes.
    pub(super) fn record(
        &self,
        log: Option<&Log>,
        stream: Stream,
        time: UnixNanos,
        bytes: &[u8],
    ) -> (bool, Vec<mpsc::Sender<Chunk>>) {
        let mut subscribers = self.subscribers.lock().expect("no holder panics");
        let safe = log.is_none_or(|log| log.write(stream, time, bytes));
        subscribers.retain(|subscriber| !subscriber.queue.is_closed());
        let wants = |subscriber: &&Subscriber| match stream {
            Stream::Stdout => subscriber.stdout,
            Stream::Stderr => subscriber.stderr,
        };
        (safe, subscribers.iter().filter(wants).map(|subscriber| subscriber.queue.clone()).collect())
    }
}
