//! The socket of the daemon's API in a container, for what drives the engine from inside. The agent listens; each connection is a stream that
//! the daemon hands in for this container, and what is asked over it is between the two of them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_agent_api::ProcessId;
use rustix::fs::{CWD, Mode};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::egress::Egress;
use crate::egress::relay::relay;

/// Connections of one container at a time; others wait to be accepted.
const MAX_CONNECTIONS: usize = 128;

/// A socket that is listened on. It is gone when this is dropped, with the connections over it.
pub(crate) struct EngineSocket {
    path: PathBuf,
    task: Option<JoinHandle<()>>,
}

impl EngineSocket {
    /// Makes it below `directory`, and serves the container. Blocks.
    pub(crate) fn open(directory: &Path, container: &ProcessId, egress: &Arc<Egress>) -> io::Result<Self> {
        let (mut socket, listener) = Self::make(directory, container)?;
        let _entered = egress.runtime().enter();
        let listener = UnixListener::from_std(listener)?;
        socket.task = Some(tokio::spawn(connections(listener, egress.clone(), container.clone())));
        Ok(socket)
    }

    fn make(directory: &Path, container: &ProcessId) -> io::Result<(Self, StdUnixListener)> {
        std::fs::create_dir_all(directory)?;
        // A name of all digits would be longer than an address may be.
        let path = directory.join(&container.as_str()[..32]);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = StdUnixListener::bind(&path)?;
        let socket = Self { path, task: None };
        // As Docker's own; the umask may have said otherwise.
        rustix::fs::chmodat(CWD, &socket.path, Mode::from_raw_mode(0o660), rustix::fs::AtFlags::empty())?;
        listener.set_nonblocking(true)?;
        Ok((socket, listener))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for EngineSocket {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn connections(listener: UnixListener, egress: Arc<Egress>, container: ProcessId) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut tasks = JoinSet::new();
    while let Ok(permit) = room.clone().acquire_owned().await {
        while tasks.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => match egress.descriptors().survive(error).await {
                Ok(()) => continue,
                Err(error) => {
                    return tracing::error!(
                        container = container.short(),
                        "its engine's socket failed: {error}"
                    );
                }
            },
        };
        let Ok(stream) = stream.into_std() else { continue };
        let (egress, container) = (egress.clone(), container.clone());
        tasks.spawn(async move {
            // Without a daemon, it is as if nobody listened.
            if let Some(host) = egress.engine(&container).await {
                relay(OwnedFd::from(stream), host).await;
            }
            drop(permit);
            egress.descriptors().were_freed();
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socket_is_there_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let id = "a".repeat(64).parse().unwrap();
        // One that an earlier run left makes no difference.
        std::fs::write(dir.path().join("a".repeat(32)), "").unwrap();
        let (socket, _listener) = EngineSocket::make(dir.path(), &id).unwrap();
        assert_eq!(std::fs::metadata(socket.path()).unwrap().permissions().mode() & 0o7777, 0o660);
        UnixStream::connect(socket.path()).unwrap();
        drop(socket);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
