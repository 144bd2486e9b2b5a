//! The engine from outside: made, served, ended.

use std::sync::Arc;

use coracle_image_store::ImageStore;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::{
    core::{Core, EngineConfig},
    error::Error,
    http::server,
    sandbox::SandboxFactory,
};

/// Why [`Engine::serve`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServeEnd {
    /// The caller asked for it; containers and sandboxes go on, for a later engine over the same home.
    Shutdown,
    /// A client asked for it (`POST /coracle/down`); containers are stopped and sandboxes shut down.
    Down,
}

/// The engine behind the API socket.
pub struct Engine {
    core: Arc<Core>,
}

impl Engine {
    /// Opens the state, takes over sandboxes that still run, and goes on with their containers. Starts a
    /// sandbox only where a container's restart policy wants it, in the background.
    ///
    /// # Errors
    /// If the state cannot be read or written, or another engine has it open.
    pub async fn new(
        config: EngineConfig,
        images: Arc<ImageStore>,
        sandboxes: Arc<dyn SandboxFactory>,
    ) -> Result<Self, Error> {
        Ok(Self { core: Core::open(config, images, sandboxes).await? })
    }

    /// Serves clients until `shutdown` is ready or a client wants the whole to go down. Everything that belongs to the engine
    /// has ended when this returns: connections, tasks, the open state.
    pub async fn serve(self, listener: UnixListener, shutdown: impl Future<Output = ()> + Send) -> ServeEnd {
        let end = CancellationToken::new();
        if let Ok(address) = listener.local_addr()
            && let Some(path) = address.as_pathname()
        {
            self.core.listens_at(path);
        }
        let serving = server::serve(&self.core, listener, &end);
        let reason = async {
            let reason = tokio::select! {
                () = shutdown => ServeEnd::Shutdown,
                () = self.core.down.notified() => ServeEnd::Down,
            };
            end.cancel();
            reason
        };
        let ((), reason) = tokio::join!(serving, reason);
        self.core.close().await;
        reason
    }
}
