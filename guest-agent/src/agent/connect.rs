//! Networks of running containers.

use std::sync::{Arc, PoisonError};

use coracle_agent_api::ports::MAX_ARRIVAL;
use coracle_agent_api::{Endpoint, NetworkId, ProcessId, WayOut};
use futures_util::StreamExt;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::codec::{FramedRead, LinesCodec};

use super::{Agent, blocking};
use crate::check;
use crate::containers::Container;
use crate::error::{Result, conflict};
use crate::network::namespace::Namespace;
use crate::network::{Ports, datagrams};

impl Agent {
    /// Connects a running container to a further network.
    pub(crate) async fn connect(self: &Arc<Self>, id: &ProcessId, endpoint: Endpoint) -> Result<()> {
        check::endpoint(&endpoint)?;
        let (container, networks) = (self.running(id)?, self.networks.clone());
        blocking(move || {
            with_ports(&container, |namespace, ports| {
                let network = &endpoint.bridge.network;
                if ports.is_on(network) {
                    let short = container.id.short();
                    return Err(conflict(format!(
                        "container {short} is on network {} already",
                        network.short()
                    )));
                }
                let connected = networks.connect(namespace, std::slice::from_ref(&endpoint), ports);
                if connected.is_err() {
                    let _ = networks.disconnect(network, ports);
                }
                connected
            })
        })
        .await
    }

    /// Takes a running container off a network.
    pub(crate) async fn disconnect(self: &Arc<Self>, id: &ProcessId, network: NetworkId) -> Result<()> {
        let (container, networks) = (self.running(id)?, self.networks.clone());
        blocking(move || with_ports(&container, |_, ports| networks.disconnect(&network, ports))).await
    }

    /// Changes which networks lead out of a running container.
    pub(crate) async fn lead_out(self: &Arc<Self>, id: &ProcessId, ways: Vec<WayOut>) -> Result<()> {
        ways.iter().try_for_each(check::way_out)?;
        let (container, networks) = (self.running(id)?, self.networks.clone());
        blocking(move || {
            with_ports(&container, |namespace, ports| networks.lead_out(namespace, &ways, ports))
        })
        .await
    }

    /// Changes what a running container is called on a network.
    pub(crate) fn rename_on(&self, id: &ProcessId, network: &NetworkId, names: &[String]) -> Result<()> {
        let container = self.running(id)?;
        match self.networks.directory().rename(&container.id, network, names) {
            true => Ok(()),
            false => Err(conflict(format!(
                "container {} is not on network {}",
                container.id.short(),
                network.short()
            ))),
        }
    }

    /// Removes a network's bridge.
    pub(crate) async fn remove_network(&self, network: NetworkId) -> Result<()> {
        // Containers that have ended are on it a moment longer.
        self.containers.wait_ended_gone().await;
        let networks = self.networks.clone();
        blocking(move || networks.remove(&network)).await
    }
}

fn with_ports<T>(container: &Container, work: impl FnOnce(&Namespace, &mut Ports) -> Result<T>) -> Result<T> {
    let short = container.id.short();
    let (Some(namespace), Some(ports)) = (&container.network, &container.ports) else {
        return Err(conflict(format!("container {short} has no networks of its own")));
    };
    match ports.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        Some(ports) => work(namespace, ports),
        None => Err(conflict(format!("container {short} is not running"))),
    }
}

impl Agent {
    /// Serves a daemon that publishes UDP ports.
    pub(crate) async fn serve_datagrams(self: Arc<Self>, io: impl AsyncRead + AsyncWrite + Send) {
        let (directory, runtime) = (self.networks.directory().clone(), self.egress.runtime().clone());
        datagrams::serve(directory, runtime, io).await;
    }

    /// Serves a daemon that publishes ports: tells it what is listened on, and hears of connections.
    pub(crate) async fn serve_ports(self: Arc<Self>, io: impl AsyncRead + AsyncWrite + Send) {
        let (reader, mut writer) = tokio::io::split(io);
        let mut lines = FramedRead::new(reader, LinesCodec::new_with_max_length(MAX_ARRIVAL));
        let mut changes = self.listeners.changes();
        let tell = async {
            loop {
                changes.borrow_and_update();
                let mut line = serde_json::to_vec(&self.listeners.listening()).unwrap_or_default();
                line.push(b'\n');
                if writer.write_all(&line).await.is_err() || writer.flush().await.is_err() {
                    return;
                }
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let hear = async {
            while let Some(Ok(line)) = lines.next().await {
                match serde_json::from_str(&line) {
                    Ok(arrival) => self.forwards.announced(arrival),
                    Err(error) => {
                        return tracing::warn!("the daemon speaks of a connection in a strange way: {error}");
                    }
                }
            }
        };
        tokio::select! {
            () = tell => {}
            () = hear => {}
        }
    }
}
