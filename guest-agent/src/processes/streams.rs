//! Reads what a process writes, as fast as the spool has room, until no one can write any more.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use coracle_agent_api::frame::{Kind, MAX_PAYLOAD};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Process;

/// Reads one of the two pipes to its end.
pub(crate) async fn read_pipe(process: Arc<Process>, pipe: AsyncFd<OwnedFd>, kind: Kind) {
    read(&process, &pipe, kind).await;
    process.spool.stream_ended();
}

/// Reads the terminal until all its inner ends are closed. `inner` is the agent's own one: held until the process has ended,
/// so that a terminal that is closed and opened again in between does not look like the end.
pub(crate) async fn read_terminal(process: Arc<Process>, inner: OwnedFd) {
    if let Some(terminal) = &process.terminal {
        let mut exit = process.exit.subscribe();
        let let_go = async {
            let _ = exit.wait_for(Option::is_some).await;
            drop(inner);
        };
        tokio::join!(read(&process, terminal, Kind::Stdout), let_go);
    }
    process.spool.stream_ended();
}

async fn read(process: &Process, source: &AsyncFd<OwnedFd>, kind: Kind) {
    let mut buffer = vec![0; MAX_PAYLOAD];
    loop {
        process.spool.has_room().await;
        let read = |fd: &OwnedFd| rustix::io::read(fd, &mut buffer).map_err(io::Error::from);
        match source.async_io(Interest::READABLE, read).await {
            Ok(0) => return,
            Ok(len) => process.spool.push_output(kind, Bytes::copy_from_slice(&buffer[..len])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal says EIO when its last inner end was closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return,
            Err(error) => {
                tracing::warn!(process = process.id.short(), "reading its output failed: {error}");
                return;
            }
        }
    }
}
