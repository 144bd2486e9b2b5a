//! Moves the bytes of a connection between a container and the stream from the host, through pipes, so that they never come to
//! this process. Half-closes pass through; a reset of either side becomes one of the other.
//!
//! A stream from a VMM tells a reset by ending both directions at once: what is read ends, and what is written is refused. One
//! that comes after the container has half-closed cannot be told from an orderly end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// The most that is moved at once: what a pipe holds unless it is told otherwise.
const CHUNK: usize = 64 * 1024;
/// A container that has vanished without a word is noticed within two minutes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// One end of a connection.
struct End {
    socket: AsyncFd<OwnedFd>,
    /// We have said that there is nothing more to send to it.
    finished: AtomicBool,
}

/// Moves bytes until both directions have ended.
pub(crate) async fn relay(container: OwnedFd, host: OwnedFd) {
    if let Err(error) = prepare(&container) {
        tracing::debug!("a connection's options cannot be set: {error}");
    }
    let (Ok(container), Ok(host)) = (End::new(container), End::new(host)) else {
        return tracing::warn!("a connection cannot be watched: too many are open");
    };
    let ended = tokio::try_join!(pump(&container, &host), pump(&host, &container));
    if let Err(error) = ended {
        tracing::debug!("a connection was reset: {error}");
        abort(&container.socket);
        abort(&host.socket);
    }
}

fn prepare(container: &OwnedFd) -> rustix::io::Result<()> {
    if sockopt::socket_domain(container)? == AddressFamily::UNIX {
        return Ok(());
    }
    sockopt::set_tcp_nodelay(container, true)?;
    sockopt::set_socket_keepalive(container, true)?;
    sockopt::set_tcp_keepidle(container, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(container, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(container, KEEPALIVE_PROBES)
}

/// Has a TCP connection reset when it is closed.
pub(crate) fn abort(socket: impl AsFd) {
    let family = sockopt::socket_domain(socket.as_fd());
    if matches!(family, Ok(AddressFamily::INET | AddressFamily::INET6)) {
        // One that is over is over.
        let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
    }
}

impl End {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: sys::watch(socket)?, finished: AtomicBool::new(false) })
    }

    /// Whether what looks like the end of a direction is the end of the whole.
    fn is_reset(&self) -> bool {
        !self.finished.load(Ordering::Relaxed)
            && rustix::net::send(self.socket.get_ref(), &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
                == Err(Errno::PIPE)
    }

    fn finish(&self) {
        self.finished.store(true, Ordering::Relaxed);
        // Fails only when the other side is gone already, which the other direction notices.
        let _ = rustix::net::shutdown(self.socket.get_ref(), Shutdown::Write);
    }
}

/// Moves bytes in one direction until it ends.
async fn pump(from: &End, to: &End) -> io::Result<()> {
    // Nothing is taken before there is something: most of many connections are idle.
    let mut byte = [0];
    loop {
        let mut ready = from.socket.readable().await?;
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match ready.try_io(|socket| Ok(rustix::net::recv(socket.get_ref(), &mut byte, flags)?)) {
            Ok(Ok((0, _))) => return end(from, to),
            Ok(Ok(_)) => break,
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    loop {
        let mut left = take(from, &write_end).await?;
        if left == 0 {
            return end(from, to);
        }
        while left > 0 {
            left -= give(&read_end, to, left).await?;
        }
    }
}

fn end(from: &End, to: &End) -> io::Result<()> {
    if from.is_reset() {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    to.finish();
    Ok(())
}

/// Fills the empty pipe; 0 at the end.
async fn take(from: &End, pipe: &OwnedFd) -> io::Result<usize> {
    loop {
        let mut ready = from.socket.readable().await?;
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        match ready.try_io(|socket| Ok(splice(socket.get_ref(), None, pipe, None, CHUNK, flags)?)) {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

async fn give(pipe: &OwnedFd, to: &End, len: usize) -> io::Result<usize> {
    loop {
        let mut ready = to.socket.writable().await?;
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        match ready.try_io(|socket| Ok(splice(pipe, None, socket.get_ref(), None, len, flags)?)) {
            Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}
