//! Waits until a client has read what it was sent. Some clients read the head of an answer through a buffer and then go past it
//! to the connection: what reaches them together with the head is lost to them. (docker-py is one.)
#![allow(unsafe_code)]

use std::{io, time::Duration};

use rustix::ioctl;
use tokio::{io::Interest, net::UnixStream};

/// A client that has not read the head by then never will.
const LIMIT: Duration = Duration::from_secs(2);
/// `SIOCOUTQ`: bytes that the other end has not read yet.
const UNREAD: ioctl::Opcode = 0x5411;

/// Returns when nothing that was sent is unread.
pub(super) async fn read_by_peer(stream: &UnixStream) {
    // A second descriptor of the connection: forgetting readiness here must not take it away from those who write.
    let twin = rustix::io::dup(stream).map_err(io::Error::from);
    let Ok(stream) = twin.and_then(|twin| UnixStream::from_std(twin.into())) else { return };
    let waiting = async {
        loop {
            // Forget what was known of readiness; every read of the peer is told as a new one.
            let forget: io::Result<()> =
                stream.try_io(Interest::WRITABLE, || Err(io::ErrorKind::WouldBlock.into()));
            drop(forget);
            if unread(&stream).is_none_or(|bytes| bytes == 0) || stream.writable().await.is_err() {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LIMIT, waiting).await;
}

fn unread(stream: &UnixStream) -> Option<i32> {
    // SAFETY: SIOCOUTQ writes one int, and changes nothing.
    unsafe { ioctl::ioctl(stream, ioctl::Getter::<UNREAD, i32>::new()) }.ok()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn it_returns_with_the_read_and_not_before() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        read_by_peer(&ours).await;
        ours.write_all(b"head").await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), read_by_peer(&ours)).await;
        assert!(early.is_err());
        let reading = async {
            tokio::task::yield_now().await;
            theirs.read_exact(&mut [0; 4]).await.unwrap();
        };
        let begun = std::time::Instant::now();
        tokio::join!(read_by_peer(&ours), reading);
        assert!(begun.elapsed() < LIMIT / 2);
        // Who writes next is not held up.
        let writing = tokio::time::timeout(LIMIT, ours.write_all(b"body")).await;
        assert!(writing.is_ok_and(|written| written.is_ok()));
    }
}
