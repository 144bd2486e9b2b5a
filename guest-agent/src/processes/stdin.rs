//! A process's standard input: one connection at a time feeds it, a new one replaces the old.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::sync::{Mutex, watch};

/// Where the bytes go.
pub(crate) struct Stdin {
    sink: Mutex<Option<Sink>>,
    /// Counts the connections; who is not the newest stops.
    newest: watch::Sender<u64>,
}

enum Sink {
    Pipe(AsyncFd<OwnedFd>),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl Stdin {
    /// Feeds a pipe.
    pub(crate) fn pipe(fd: AsyncFd<OwnedFd>) -> Self {
        Self::new(Sink::Pipe(fd))
    }

    /// Feeds a terminal, which has no end of input.
    pub(crate) fn terminal(fd: Arc<AsyncFd<OwnedFd>>) -> Self {
        Self::new(Sink::Terminal(fd))
    }

    fn new(sink: Sink) -> Self {
        Self { sink: Mutex::new(Some(sink)), newest: watch::Sender::new(0) }
    }

    /// Copies a connection's bytes until it ends, fails or is replaced, or until the process reads no more. The end of a
    /// connection is not the end of the input: the daemon may have been killed, and comes back.
    pub(crate) async fn feed(&self, source: &mut (impl AsyncRead + Unpin)) {
        let mut mine = 0;
        self.newest.send_modify(|newest| {
            *newest += 1;
            mine = *newest;
        });
        let mut newest = self.newest.subscribe();
        tokio::select! {
            () = self.copy(source) => {}
            _ = newest.wait_for(|newest| *newest != mine) => {}
        }
    }

    /// Ends the input of a process that has a pipe: it reads the end of its file when it has read what came before.
    pub(crate) async fn end(&self) {
        self.newest.send_modify(|newest| *newest += 1);
        let mut sink = self.sink.lock().await;
        if matches!(*sink, Some(Sink::Pipe(_))) {
            *sink = None;
        }
    }

    /// Closes the input: the process has ended.
    pub(crate) async fn close(&self) {
        self.newest.send_modify(|newest| *newest += 1);
        *self.sink.lock().await = None;
    }

    async fn copy(&self, source: &mut (impl AsyncRead + Unpin)) {
        let mut sink = self.sink.lock().await;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let Some(open) = sink.as_ref() else { return };
            match source.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(len) => {
                    if open.write_all(&buffer[..len]).await.is_err() {
                        // The process has closed its end: whatever else comes has no reader.
                        *sink = None;
                        return;
                    }
                }
            }
        }
    }
}

impl Sink {
    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let fd: &AsyncFd<OwnedFd> = match self {
            Self::Pipe(fd) => fd,
            Self::Terminal(fd) => fd,
        };
        while !bytes.is_empty() {
            let write = |fd: &OwnedFd| rustix::io::write(fd, bytes).map_err(io::Error::from);
            match fd.async_io(Interest::WRITABLE, write).await {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
