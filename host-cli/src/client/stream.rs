//! A container's streams on the person's own: standard input to it, its output and errors from it, as they come.
//!
//! Output is either raw (a terminal's) or in frames of Docker's: `[stream, 0, 0, 0, length as u32 BE]`, then the bytes.

use std::{io, sync::OnceLock};

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::BodyExt;
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    clock::monotonic_micros,
    terminal::{DetachKeys, DetachScanner},
};

/// A connection that became a stream.
#[derive(Debug)]
pub(crate) struct Hijacked {
    pub(crate) io: TokioIo<Upgraded>,
    pub(crate) multiplexed: bool,
}

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The container's output ended.
    Output,
    /// The detach keys were typed.
    Detached,
}

/// When the first byte of output came, in microseconds of CLOCK_MONOTONIC.
#[derive(Debug, Default)]
pub(crate) struct FirstByte(OnceLock<u64>);

impl FirstByte {
    fn note(&self) {
        self.0.get_or_init(monotonic_micros);
    }

    /// The moment, if there was output.
    pub(crate) fn micros(&self) -> Option<u64> {
        self.0.get().copied()
    }
}

/// Why copying failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// The connection broke.
    #[error("lost the connection to the container's output")]
    Read(#[source] io::Error),
    /// Standard output or error cannot be written.
    #[error("cannot write the container's output")]
    Write(#[source] io::Error),
    /// What came are no frames.
    #[error("the daemon sent a frame of the unknown kind {0}")]
    Frame(u8),
    /// The daemon says that something went wrong.
    #[error("{0}")]
    Daemon(String),
}

impl StreamError {
    /// Whether whoever read our standard output has gone.
    pub(crate) fn is_reader_gone(&self) -> bool {
        matches!(self, Self::Write(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Connects the person's streams with a container's until its output ends or the detach keys are typed. `input` says
/// whether standard input is passed on; its end becomes the container's.
pub(crate) async fn pump(
    hijacked: Hijacked,
    input: bool,
    detach: Option<DetachKeys>,
    first_byte: &FirstByte,
) -> Result<End, StreamError> {
    let (reader, mut writer) = tokio::io::split(hijacked.io);
    let scanner = detach.map(DetachKeys::scanner);
    let (detached, detach_typed) = tokio::sync::oneshot::channel::<()>();
    let feeding = input.then(|| {
        tokio::spawn(async move {
            // An error means that the container no longer reads: its output says how it went.
            if let Ok(true) = send_input(&mut writer, scanner).await {
                let _ = detached.send(());
            }
        })
    });
    let end = tokio::select! {
        biased;
        result = copy_output(reader, hijacked.multiplexed, first_byte) => result.map(|()| End::Output),
        Ok(()) = detach_typed => Ok(End::Detached),
    };
    if let Some(feeding) = feeding {
        feeding.abort();
    }
    end
}

/// True: the detach keys were typed; otherwise standard input ended.
async fn send_input(
    writer: &mut (impl AsyncWrite + Unpin),
    mut scanner: Option<DetachScanner>,
) -> io::Result<bool> {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 64 * 1024];
    let mut passed = Vec::new();
    loop {
        let read = stdin.read(&mut buffer).await?;
        if read == 0 {
            writer.shutdown().await?;
            return Ok(false);
        }
        match &mut scanner {
            None => writer.write_all(&buffer[..read]).await?,
            Some(scanner) => {
                passed.clear();
                let detach = scanner.feed(&buffer[..read], &mut passed);
                writer.write_all(&passed).await?;
                if detach {
                    return Ok(true);
                }
            }
        }
        writer.flush().await?;
    }
}

/// Copies a stream of output to standard output and error.
pub(crate) async fn copy_output(
    mut reader: impl AsyncRead + Unpin,
    multiplexed: bool,
    first_byte: &FirstByte,
) -> Result<(), StreamError> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    if !multiplexed {
        return copy(&mut reader, &mut stdout, u64::MAX, first_byte).await.map(|_| ());
    }
    let mut header = [0; 8];
    while read_header(&mut reader, &mut header).await? {
        let [kind, _, _, _, length @ ..] = header;
        let length = u64::from(u32::from_be_bytes(length));
        let copied = match kind {
            0 | 1 => copy(&mut reader, &mut stdout, length, first_byte).await?,
            2 => copy(&mut reader, &mut stderr, length, first_byte).await?,
            3 => return Err(daemon_error(&mut reader, length).await),
            other => return Err(StreamError::Frame(other)),
        };
        if copied < length {
            return Err(StreamError::Read(io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(())
}

/// Reads some bytes; none at the stream's end. A daemon that closes a stream whose input it did not want to the end resets it,
/// after all the output: that is an end like another, and how the process ended is told elsewhere.
async fn read_some(reader: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> io::Result<usize> {
    match reader.read(buffer).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(0),
        result => result,
    }
}

/// False: the stream ended between two frames.
async fn read_header(
    reader: &mut (impl AsyncRead + Unpin),
    header: &mut [u8; 8],
) -> Result<bool, StreamError> {
    let first = read_some(reader, &mut header[..1]).await.map_err(StreamError::Read)?;
    if first == 0 {
        return Ok(false);
    }
    reader.read_exact(&mut header[1..]).await.map_err(StreamError::Read)?;
    Ok(true)
}

/// Copies at most `limit` bytes and shows them at once; fewer mean that the stream ended.
async fn copy(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    limit: u64,
    first_byte: &FirstByte,
) -> Result<u64, StreamError> {
    let mut buffer = vec![0; usize::try_from(limit.min(64 * 1024)).unwrap_or(64 * 1024)];
    let mut copied = 0;
    while copied < limit {
        let wanted = usize::try_from(limit - copied).unwrap_or(usize::MAX).min(buffer.len());
        let read = read_some(reader, &mut buffer[..wanted]).await.map_err(StreamError::Read)?;
        if read == 0 {
            break;
        }
        first_byte.note();
        writer.write_all(&buffer[..read]).await.map_err(StreamError::Write)?;
        writer.flush().await.map_err(StreamError::Write)?;
        copied += read as u64;
    }
    Ok(copied)
}

async fn daemon_error(reader: &mut (impl AsyncRead + Unpin), length: u64) -> StreamError {
    let mut message = Vec::new();
    match reader.take(length.min(64 * 1024)).read_to_end(&mut message).await {
        Ok(_) => StreamError::Daemon(String::from_utf8_lossy(&message).trim().to_owned()),
        Err(error) => StreamError::Read(error),
    }
}

/// An answer's body as something to read from.
pub(crate) fn body_reader(body: Incoming) -> impl AsyncRead + Unpin {
    let chunks = body.into_data_stream().map(|chunk| chunk.map_err(io::Error::other));
    Reader { chunks: Box::pin(chunks), rest: Bytes::new() }
}

struct Reader<S> {
    chunks: std::pin::Pin<Box<S>>,
    rest: Bytes,
}

impl<S: futures_util::Stream<Item = io::Result<Bytes>>> AsyncRead for Reader<S> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match std::task::ready!(self.chunks.as_mut().poll_next(context)) {
                Some(chunk) => self.rest = chunk?,
                None => return std::task::Poll::Ready(Ok(())),
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest.split_to(length));
        std::task::Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frame_that_is_cut_short_is_an_error() {
        let cut = [1, 0, 0, 0, 0, 0, 0, 9, b'x'];
        let result = copy_output(&cut[..], true, &FirstByte::default()).await;
        assert!(matches!(result, Err(StreamError::Read(_))));
        let header = [1, 0, 0];
        assert!(matches!(
            copy_output(&header[..], true, &FirstByte::default()).await,
            Err(StreamError::Read(_))
        ));
    }

    #[tokio::test]
    async fn a_daemons_error_in_the_stream_is_told() {
        let frame = [3, 0, 0, 0, 0, 0, 0, 4, b'o', b'o', b'p', b's'];
        let result = copy_output(&frame[..], true, &FirstByte::default()).await;
        assert!(matches!(result, Err(StreamError::Daemon(message)) if message == "oops"));
        assert!(matches!(
            copy_output(&[9, 0, 0, 0, 0, 0, 0, 0][..], true, &FirstByte::default()).await,
            Err(StreamError::Frame(9))
        ));
    }
}
