//! Datagrams to published ports. The daemon says from which client each is and for whom (see [`coracle_agent_api::datagrams`]); it goes to
//! the container from the client's own address, by a transparent socket as in [`super::forward`], and what the container sends back to that
//! address goes to the daemon. A flow that is idle ends, and one whose container has another address by now begins anew.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coracle_agent_api::datagrams::{Inward, Outward};
use coracle_agent_api::egress::Flow as Path;
use coracle_agent_api::ports::ContainerPort;
use rustix::net::SendFlags;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::forward::source;
use super::names::directory::Directory;
use crate::egress;

/// Flows at a time; the daemon has as many.
const MOST_FLOWS: usize = 1024;
/// Idle time of a flow that the container has not answered, and of one that it has, as connection tracking has it.
const IDLE: Duration = Duration::from_secs(30);
const IDLE_ANSWERED: Duration = Duration::from_secs(120);
/// Frames that wait for being sent to the daemon; more are dropped, as a network does.
const BACK: usize = 512;
const LONGEST: usize = 65_535;

/// All flows of one conversation with a daemon; they end with this.
struct Flows {
    directory: Arc<Directory>,
    runtime: Handle,
    back: mpsc::Sender<Vec<u8>>,
    table: Arc<Mutex<HashMap<u32, Flow>>>,
}

struct Flow {
    to: ContainerPort,
    client: SocketAddr,
    /// The container's address.
    target: SocketAddr,
    socket: Arc<UdpSocket>,
    /// Something came for it since this was looked at.
    used: Arc<AtomicBool>,
    task: AbortHandle,
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves a daemon that publishes UDP ports, until it goes; flows run on threads of `runtime`.
pub(crate) async fn serve(
    directory: Arc<Directory>,
    runtime: Handle,
    io: impl AsyncRead + AsyncWrite + Send,
) {
    let (mut reader, mut writer) = tokio::io::split(io);
    let (back, mut frames) = mpsc::channel::<Vec<u8>>(BACK);
    let flows = Flows { directory, runtime, back, table: Arc::default() };
    let write = async {
        while let Some(frame) = frames.recv().await {
            writer.write_all(&frame).await?;
            if frames.is_empty() {
                writer.flush().await?;
            }
        }
        Ok(())
    };
    let read = async {
        let mut payload = Vec::new();
        loop {
            let header = egress::next_frame(&mut reader, &mut payload).await?;
            match Inward::decode(header.kind, &payload).map_err(io::Error::other)? {
                Inward::Datagram { to, client, data } => flows.arrived(header.id, to, client, &data),
                Inward::Forget => drop(flows.table().remove(&header.id)),
            }
        }
    };
    let ended: io::Result<()> = tokio::select! {
        ended = write => ended,
        ended = read => ended,
    };
    if let Err(error) = ended {
        tracing::debug!("the daemon's connection for datagrams has ended: {error}");
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.table().clear();
    }
}

impl Flows {
    fn table(&self) -> MutexGuard<'_, HashMap<u32, Flow>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrived(&self, id: u32, to: ContainerPort, client: SocketAddr, data: &[u8]) {
        // One whose container is on no network now is lost, as it would be with a cable pulled.
        let Some((target, is_near)) = self.directory.target(&to.container, &client.ip()) else { return };
        let target = SocketAddr::new(target, to.port);
        let mut table = self.table();
        let is_same = |flow: &Flow| flow.to == to && flow.client == client && flow.target == target;
        if !table.get(&id).is_some_and(is_same) {
            table.remove(&id);
            if table.len() >= MOST_FLOWS {
                return;
            }
            match self.begin(id, to, client, target, is_near) {
                Ok(flow) => drop(table.insert(id, flow)),
                Err(error) => return tracing::debug!(%client, "a client's datagrams have no socket: {error}"),
            }
        }
        if let Some(flow) = table.get(&id) {
            flow.used.store(true, Ordering::Relaxed);
            send(&flow.socket, data);
        }
    }

    fn begin(
        &self,
        id: u32,
        to: ContainerPort,
        client: SocketAddr,
        target: SocketAddr,
        is_near: bool,
    ) -> io::Result<Flow> {
        let _entered = self.runtime.enter();
        let socket = match source(client, target, is_near) {
            // Where the address cannot be had, better another one than none.
            Some(from) => egress::answering(&Path { source: target, destination: from })
                .or_else(|_| from_gateway(target))?,
            None => from_gateway(target)?,
        };
        let (socket, used) = (Arc::new(socket), Arc::new(AtomicBool::new(false)));
        let carried = carry(id, socket.clone(), used.clone(), self.back.clone());
        let (table, own) = (self.table.clone(), socket.clone());
        let task = self.runtime.spawn(async move {
            carried.await;
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            if table.get(&id).is_some_and(|flow| Arc::ptr_eq(&flow.socket, &own)) {
                table.remove(&id);
            }
        });
        Ok(Flow { to, client, target, socket, used, task: task.abort_handle() })
    }
}

/// A socket that sends from this machine's address on the container's network.
fn from_gateway(target: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    socket.connect(target)?;
    UdpSocket::from_std(socket)
}

/// Sends, also if the kernel says first that an earlier one was refused. What there is no room for is lost.
fn send(socket: &UdpSocket, data: &[u8]) {
    // Not by the event loop, which does not know of a new socket yet that it has room.
    let send = || rustix::net::send(socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    if send() == Err(rustix::io::Errno::CONNREFUSED) {
        let _ = send();
    }
}

/// Brings back what the container sends to the client, until the flow is idle.
async fn carry(id: u32, socket: Arc<UdpSocket>, used: Arc<AtomicBool>, back: mpsc::Sender<Vec<u8>>) {
    let mut idle = IDLE;
    loop {
        match tokio::time::timeout(idle, socket.readable()).await {
            Ok(_) => {}
            Err(_) if used.swap(false, Ordering::Relaxed) => continue,
            Err(_) => return,
        }
        // Not kept: most of many flows are idle.
        let mut buffer = vec![0; LONGEST];
        match socket.try_recv(&mut buffer) {
            Ok(len) => {
                idle = IDLE_ANSWERED;
                let _ = back.try_send(Outward::encode(id, &buffer[..len]));
            }
            // Nothing in the container takes datagrams at that port now, or nothing has come after all.
            Err(error) => tracing::trace!("a datagram was refused: {error}"),
        }
    }
}
