//! The engine itself as something that containers reach: those that were given its socket.

use coracle_agent_api::{ProcessId, egress::Failure};
use tokio::{net::UnixStream, sync::OwnedSemaphorePermit};

use super::{guard::Guard, hand_over};
use crate::{http::server, sandbox::Sandbox};

/// Gives the sandbox a connection to the engine for a container. It is served until it ends, or the container
/// does, and keeps `room` for as long.
pub(super) async fn connect(
    sandbox: &dyn Sandbox,
    guard: &Guard,
    id: u32,
    container: &ProcessId,
    room: OwnedSemaphorePermit,
) -> Result<(), Failure> {
    let (core, asker) = guard.admit_client(container)?;
    let pair = || -> std::io::Result<_> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs))
    };
    let (ours, theirs) = pair().map_err(|error| {
        tracing::warn!(%error, "a container cannot be connected to the engine");
        Failure::Exhausted
    })?;
    hand_over(sandbox, id, theirs.into()).await?;
    let (tasks, end) = (core.tasks.clone(), core.closing.clone());
    tasks.spawn(async move {
        let mut has_engine = asker.has_engine();
        tokio::select! {
            () = server::serve_connection(core, ours, end, Some(asker)) => {}
            // Whatever else in the sandbox still holds the other end.
            _ = has_engine.wait_for(|has| !has) => {}
        }
        drop(room);
    });
    Ok(())
}
