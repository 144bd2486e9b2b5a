//! Connections that stop being HTTP: `Connection: Upgrade, Upgrade: tcp`, then bytes in both directions.

use std::io::ErrorKind;

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{Request, Response, body, version::ApiVersion};
use crate::{
    error::{Error, Result},
    logs::Stream,
};

/// Content type of streams in which stdout and stderr are told apart.
pub(crate) const MULTIPLEXED: &str = "application/vnd.docker.multiplexed-stream";
/// Content type of all other streams.
pub(crate) const RAW: &str = "application/vnd.docker.raw-stream";
/// Since this version, clients want to be told that a stream is multiplexed.
const TELLS_MULTIPLEXED: ApiVersion = ApiVersion(1, 42);

/// How much a client's input is read at once.
const BLOCK: usize = 64 * 1024;

/// The content type of a process's output.
pub(crate) fn content_type(tty: bool, version: ApiVersion) -> &'static str {
    if !tty && version >= TELLS_MULTIPLEXED { MULTIPLEXED } else { RAW }
}

/// What a client sends.
pub(crate) struct Incoming {
    buffered: Bytes,
    half: OwnedReadHalf,
}

impl Incoming {
    /// The next bytes; `None` when the client has closed its side, or is gone.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        if !self.buffered.is_empty() {
            return Some(std::mem::take(&mut self.buffered));
        }
        let mut block = bytes::BytesMut::with_capacity(BLOCK);
        match self.half.read_buf(&mut block).await {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(block.freeze()),
        }
    }
}

/// What a client is sent.
pub(crate) struct Outgoing {
    half: OwnedWriteHalf,
}

impl Outgoing {
    /// Sends bytes; an error means that the client is gone.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.half.write_all(bytes).await
    }

    /// Says that nothing follows.
    pub(crate) async fn close(&mut self) {
        let _ = self.half.shutdown().await;
    }
}

/// Tells when the client has closed its end altogether, which a half-close is not.
pub(crate) struct Presence {
    stream: UnixStream,
}

impl Presence {
    /// A second descriptor of the connection, so that waiting here does not take readiness away from those who write.
    fn of(stream: &UnixStream) -> std::io::Result<Self> {
        let twin = rustix::io::dup(stream)?;
        Ok(Self { stream: UnixStream::from_std(twin.into())? })
    }

    /// Returns when the client is gone.
    pub(crate) async fn lost(self) {
        loop {
            match self.stream.ready(Interest::WRITABLE).await {
                Ok(ready) if !ready.is_write_closed() => {}
                _ => return,
            }
            // Not yet: wait for the next change.
            let _ = self.stream.try_io(Interest::WRITABLE, || Err::<(), _>(ErrorKind::WouldBlock.into()));
        }
    }
}

/// Whether the client can be given the connection.
pub(crate) fn wants_upgrade(request: &Request) -> bool {
    let is = |name: header::HeaderName, wanted: &str| {
        let values = request.headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    is(header::CONNECTION, "upgrade") && is(header::UPGRADE, "tcp")
}

/// Answers 101 and gives the connection to `session` when the answer is out.
pub(crate) fn hijack<S, F>(request: &mut Request, content_type: &'static str, session: S) -> Result<Response>
where
    S: FnOnce(Incoming, Outgoing, Presence) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let upgrade =
        request.upgrade.take().ok_or_else(|| Error::invalid("this connection cannot be upgraded"))?;
    let closing = request.core.closing.clone();
    request.core.tasks.spawn(closing.run_until_cancelled_owned(async move {
        let Ok(upgraded) = upgrade.await else { return };
        // The server serves nothing but Unix sockets.
        let Ok(parts) = upgraded.downcast::<TokioIo<UnixStream>>() else { return };
        let stream = parts.io.into_inner();
        super::unread::read_by_peer(&stream).await;
        let Ok(presence) = Presence::of(&stream) else { return };
        let (half, write_half) = stream.into_split();
        session(Incoming { buffered: parts.read_buf, half }, Outgoing { half: write_half }, presence).await;
    }));
    let mut response = body::empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("tcp"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    Ok(response)
}

/// How output is put on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// As it is.
    Raw,
    /// With a header of eight bytes before each piece: `[stream, 0, 0, 0, length as u32 BE]`.
    Multiplexed,
}

impl Framing {
    pub(crate) fn of(tty: bool) -> Self {
        if tty { Self::Raw } else { Self::Multiplexed }
    }

    /// Bytes of a process.
    pub(crate) fn frame(self, stream: Stream, bytes: &[u8]) -> Bytes {
        let mut frame = Vec::with_capacity(8 + bytes.len());
        self.append(&mut frame, stream, &[bytes]);
        frame.into()
    }

    /// Appends bytes of a process, given in parts, as one frame.
    pub(crate) fn append(self, out: &mut Vec<u8>, stream: Stream, parts: &[&[u8]]) {
        let kind = match stream {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        };
        self.append_kind(out, kind, parts);
    }

    /// An error of ours in the middle of a stream.
    pub(crate) fn error(self, message: &str) -> Bytes {
        match self {
            Self::Raw => format!("{message}\r\n").into(),
            Self::Multiplexed => {
                let mut frame = Vec::new();
                self.append_kind(&mut frame, 3, &[message.as_bytes()]);
                frame.into()
            }
        }
    }

    fn append_kind(self, out: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
        if self == Self::Multiplexed {
            let len: usize = parts.iter().map(|part| part.len()).sum();
            out.extend_from_slice(&[kind, 0, 0, 0]);
            // Pieces are far shorter than 4 GiB.
            out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        }
        for part in parts {
            out.extend_from_slice(part);
        }
    }
}
