//! Packets that wait in the kernel for a word from the agent (linux/netfilter/nfnetlink_queue.h).

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::RecvFlags;
use tokio::io::unix::AsyncFd;

use super::ruleset::{CONNECT_QUEUE, ECHO_QUEUE, Mark};
use crate::network::netlink::{Message, Socket, attributes, messages};
use crate::sys;

/// Packets that wait in one queue; the kernel drops what comes beyond.
const MOST_WAITING: u32 = 2048;
/// What is copied of a packet: an echo request as long as they get where nothing is fragmented.
const MOST_COPIED: u32 = 9216;

const SUBSYSTEM: u16 = 3;
const PACKET: u16 = SUBSYSTEM << 8;
const VERDICT: u16 = SUBSYSTEM << 8 | 1;
const CONFIG: u16 = SUBSYSTEM << 8 | 2;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// A packet that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waiting {
    queue: u16,
    id: u32,
}

/// Both queues.
#[derive(Debug)]
pub(super) struct Queues {
    socket: AsyncFd<OwnedFd>,
}

impl Queues {
    /// Has the queues' packets sent here from now on.
    pub(super) fn open() -> io::Result<Socket> {
        let mut socket = Socket::netfilter()?;
        for queue in [CONNECT_QUEUE, ECHO_QUEUE] {
            const BIND: u8 = 1;
            const COPY_PACKET: u8 = 2;
            let config = || message(CONFIG, queue);
            let [r0, r1, r2, r3] = MOST_COPIED.to_be_bytes();
            socket.request(config().with(1, [BIND, 0, 0, 0]))?;
            socket.request(config().with(2, [r0, r1, r2, r3, COPY_PACKET]))?;
            socket.request(config().with(3, MOST_WAITING.to_be_bytes()))?;
        }
        Ok(socket)
    }

    /// Ties the queues to the current event loop.
    pub(super) fn watch(socket: Socket) -> io::Result<Self> {
        Ok(Self { socket: sys::watch(socket.into_fd())? })
    }

    /// The packets that came since the last call.
    pub(super) async fn next(&self, buffer: &mut [u8]) -> io::Result<Vec<(Waiting, Vec<u8>)>> {
        loop {
            let mut ready = self.socket.readable().await?;
            let received = ready.try_io(|socket| {
                let (len, _) = rustix::net::recv(socket.get_ref(), &mut *buffer, RecvFlags::DONTWAIT)?;
                Ok(len)
            });
            match received {
                Ok(Ok(len)) => return Ok(packets_in(&buffer[..len])),
                // The kernel had more for us than fits; what was lost is sent again by who sent it.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }

    /// Lets a packet go on with a mark, or drops it.
    pub(super) fn decide(&self, waiting: Waiting, mark: Option<Mark>) {
        let verdict = if mark.is_some() { ACCEPT } else { DROP };
        let header = [verdict.to_be_bytes(), waiting.id.to_be_bytes()].concat();
        let mut decision = message(VERDICT, waiting.queue).with(2, header);
        if let Some(mark) = mark {
            decision = decision.with(3, (mark as u32).to_be_bytes());
        }
        let bytes = decision.unacknowledged();
        // It fails if the packet is gone, with the interface that it came from.
        if let Err(error) = rustix::net::send(self.socket.get_ref(), &bytes, rustix::net::SendFlags::DONTWAIT)
        {
            tracing::debug!("a held packet could not be let go: {error}");
        }
    }
}

fn message(kind: u16, queue: u16) -> Message {
    let [high, low] = queue.to_be_bytes();
    Message::new(kind, 0, &[0, 0, high, low])
}

fn packets_in(bytes: &[u8]) -> Vec<(Waiting, Vec<u8>)> {
    messages(bytes).filter(|(kind, _)| *kind == PACKET).filter_map(|(_, body)| packet(body)).collect()
}

fn packet(body: &[u8]) -> Option<(Waiting, Vec<u8>)> {
    let ([_, _, high, low], rest) = body.split_first_chunk::<4>()?;
    let queue = u16::from_be_bytes([*high, *low]);
    let (mut id, mut payload) = (None, Vec::new());
    for (kind, data) in attributes(rest) {
        match kind {
            1 => id = data.first_chunk::<4>().map(|id| u32::from_be_bytes(*id)),
            10 => payload = data.to_vec(),
            _ => {}
        }
    }
    Some((Waiting { queue, id: id? }, payload))
}
