//! Streams that the host hands into the guest. In a virtual machine they come over vsock, and their port on the host's side
//! tells which is which; without one, the descriptor itself comes over a unix socket.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use coracle_agent_api::egress::STREAM_PORT;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

/// How long a connection that there is no descriptor for waits for the end of another one, before it is tried again: not only
/// connections give descriptors back.
const PATIENCE: Duration = Duration::from_secs(1);

/// The agent's file descriptors, as those wait for them who accept connections.
#[derive(Debug, Default)]
pub(crate) struct Descriptors(Notify);

impl Descriptors {
    /// A connection or a process has ended: its descriptors can be had.
    pub(crate) fn were_freed(&self) {
        self.0.notify_one();
    }

    /// A connection that is over before it was accepted is its other end's loss; one that there is no descriptor for waits until there
    /// may be one. Anything else is the end of the listener.
    pub(crate) async fn survive(&self, error: io::Error) -> io::Result<()> {
        match error.raw_os_error() {
            Some(libc::ECONNABORTED | libc::ECONNRESET | libc::EINTR | libc::EPROTO) => Ok(()),
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                tracing::warn!("a connection waits: {error}");
                let _ = tokio::time::timeout(PATIENCE, self.0.notified()).await;
                Ok(())
            }
            _ => Err(error),
        }
    }
}

/// Where they come in.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// A virtual machine's host.
    Vsock,
    /// A unix socket that is listened on. Each connection brings one message: the port that the stream is for and the one that it
    /// comes from, as two u32 in network order, with the stream's descriptor.
    Unix(std::os::unix::net::UnixListener),
    /// Nowhere.
    Nowhere,
}

impl Incoming {
    /// Listens on a unix socket, which is made.
    pub(crate) fn unix(path: Option<&Path>) -> io::Result<Self> {
        let Some(path) = path else { return Ok(Self::Nowhere) };
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(listener))
    }

    /// Takes streams for [`STREAM_PORT`], each with the port that it comes from, for ever.
    pub(crate) async fn serve(
        self,
        take: impl Fn(u32, OwnedFd),
        descriptors: &Descriptors,
    ) -> io::Result<()> {
        match self {
            Self::Vsock => {
                let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))?;
                loop {
                    let (stream, peer) = match listener.accept().await {
                        Ok(accepted) => accepted,
                        Err(error) => {
                            descriptors.survive(error).await?;
                            continue;
                        }
                    };
                    // Containers can open vsock sockets, too; streams come from the host alone.
                    if peer.cid() == VMADDR_CID_HOST {
                        take(peer.port(), OwnedFd::from(stream));
                    }
                }
            }
            Self::Unix(listener) => {
                let listener = UnixListener::from_std(listener)?;
                loop {
                    let (connection, _) = match listener.accept().await {
                        Ok(accepted) => accepted,
                        Err(error) => {
                            descriptors.survive(error).await?;
                            continue;
                        }
                    };
                    match receive(&connection).await {
                        Ok(Some((STREAM_PORT, from, stream))) => take(from, stream),
                        Ok(_) => tracing::warn!("a stream came that is for nobody"),
                        Err(error) => tracing::warn!("a stream could not be taken: {error}"),
                    }
                }
            }
            Self::Nowhere => std::future::pending().await,
        }
    }
}

/// The message of a connection.
async fn receive(connection: &UnixStream) -> io::Result<Option<(u32, u32, OwnedFd)>> {
    connection
        .async_io(Interest::READABLE, || {
            let mut bytes = [0; 8];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let len =
                recvmsg(connection, &mut [io::IoSliceMut::new(&mut bytes)], &mut ancillary, flags)?.bytes;
            let stream = ancillary.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            let [p0, p1, p2, p3, f0, f1, f2, f3] = bytes;
            let ports = (u32::from_be_bytes([p0, p1, p2, p3]), u32::from_be_bytes([f0, f1, f2, f3]));
            Ok(stream.filter(|_| len == bytes.len()).map(|stream| (ports.0, ports.1, stream)))
        })
        .await
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_connection_waits_for_descriptors_only_and_not_for_ever() {
        let (descriptors, begun) = (Descriptors::default(), Instant::now());
        let error = io::Error::from_raw_os_error;
        descriptors.survive(error(libc::ECONNABORTED)).await.unwrap();
        descriptors.were_freed();
        descriptors.survive(error(libc::EMFILE)).await.unwrap();
        assert!(begun.elapsed() < PATIENCE);
        descriptors.survive(error(libc::EMFILE)).await.unwrap();
        assert!(begun.elapsed() >= PATIENCE);
        assert!(descriptors.survive(error(libc::EINVAL)).await.is_err());
    }
}
