//! The conversation with one sandbox's agent about datagrams to published ports, begun anew with each life of the sandbox.
//!
//! A flow is a client and the port of the host that it sends to. There are so many at most; when there are more, the one goes that
//! has been silent the longest, those first that the container has never answered: clients can be invented, and the others
//! are the ones that matter. What the agent says can at worst send clients of its own containers something.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, Weak},
};

use coracle_agent_api::{
    datagrams::{Inward, Outward},
    egress::{FIRST_ID, LAST_ID},
    ports::ContainerPort,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::mpsc,
};

use super::udp::{BoundUdp, Peer};
use crate::{
    agent::frames, container::record::ContainerId, core::Core, error::chain, sandbox::lives::Lives,
    sandboxes::Host,
};

/// Flows of one sandbox, and of one published port.
const MOST_FLOWS: usize = 1024;
const MOST_FLOWS_EACH: usize = 512;
/// Frames that wait for being sent to the agent; more are dropped, as a network does.
const WAITING: usize = 512;

/// See the module.
#[derive(Clone)]
pub(super) struct Session(Arc<Shared>);

struct Shared {
    host: Arc<Host>,
    flows: Mutex<Flows>,
}

#[derive(Default)]
struct Flows {
    /// The way to the agent, while there is one.
    lane: Option<mpsc::Sender<Vec<u8>>>,
    by_id: HashMap<u32, Flow>,
    /// By the socket (its address in memory, which it has for as long as there is a flow) and the client.
    ids: HashMap<(usize, Peer), u32>,
    last_id: u32,
    /// Rises with each datagram.
    now: u64,
}

struct Flow {
    bound: Arc<BoundUdp>,
    to: ContainerPort,
    peer: Peer,
    answered: bool,
    used: u64,
}

impl Flow {
    fn key(&self) -> (usize, Peer) {
        (key(&self.bound), self.peer)
    }
}

fn key(bound: &Arc<BoundUdp>) -> usize {
    Arc::as_ptr(bound).addr()
}

impl Session {
    /// Begins it, in the background.
    pub(super) fn start(core: &Arc<Core>, host: Arc<Host>) -> Self {
        let session = Self(Arc::new(Shared { host, flows: Mutex::default() }));
        let running = Self::run(Arc::downgrade(&session.0), Arc::clone(&session.0.host));
        core.tasks.spawn(core.closing.clone().run_until_cancelled_owned(running));
        session
    }

    async fn run(shared: Weak<Shared>, host: Arc<Host>) {
        let mut lives = Lives::new(host.state());
        while lives.begin().await {
            let Some(shared) = shared.upgrade() else { return };
            let reason = tokio::select! {
                reason = shared.talk() => reason,
                () = lives.over() => "the sandbox has ended".to_owned(),
            };
            tracing::debug!(sandbox = %host.id(), error = reason, "datagrams are lost for now");
            let mut flows = shared.flows();
            *flows = Flows { last_id: flows.last_id, ..Flows::default() };
        }
    }

    /// A datagram has come to a port of the host.
    pub(super) fn arrived(&self, bound: &Arc<BoundUdp>, to: &ContainerPort, peer: Peer, data: &[u8]) {
        self.0.flows().arrived(bound, to, peer, data);
    }

    /// A container has no ports any more.
    pub(super) fn forget(&self, container: &ContainerId) {
        let mut flows = self.0.flows();
        let of_it = |(id, flow): (&u32, &Flow)| (flow.to.container == *container).then_some(*id);
        let over: Vec<u32> = flows.by_id.iter().filter_map(of_it).collect();
        for id in over {
            flows.forget(id);
        }
    }
}

impl Shared {
    fn flows(&self) -> MutexGuard<'_, Flows> {
        self.flows.lock().expect("no holder panics")
    }

    /// One conversation to its end; the reason.
    async fn talk(&self) -> String {
        let (stream, early) = match self.host.agent().datagrams().await {
            Ok(connection) => connection,
            Err(error) => return chain(&error),
        };
        let (reader, writer) = stream.into_split();
        let (lane, waiting) = mpsc::channel::<Vec<u8>>(WAITING);
        self.flows().lane = Some(lane);
        frames::converse(writer, waiting, self.hear((&early[..]).chain(reader))).await
    }

    async fn hear(&self, mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut payload = Vec::new();
        loop {
            let header = frames::next(&mut reader, &mut payload).await?;
            let Outward(data) = Outward::decode(header.kind, &payload).map_err(io::Error::other)?;
            let known = self.flows().answered(header.id);
            if let Some((bound, peer)) = known {
                bound.answer(&peer, &data);
            }
        }
    }
}

impl Flows {
    fn arrived(&mut self, bound: &Arc<BoundUdp>, to: &ContainerPort, peer: Peer, data: &[u8]) {
        let Some(room) = self.lane.as_ref().and_then(|lane| lane.clone().try_reserve_owned().ok()) else {
            return;
        };
        self.now += 1;
        let id = match self.ids.get(&(key(bound), peer)) {
            Some(id) => *id,
            None => match self.begin(bound, to, peer) {
                Some(id) => id,
                None => return,
            },
        };
        if let Some(flow) = self.by_id.get_mut(&id) {
            flow.used = self.now;
        }
        room.send(Inward::datagram(id, to, peer.client, data));
    }

    fn begin(&mut self, bound: &Arc<BoundUdp>, to: &ContainerPort, peer: Peer) -> Option<u32> {
        let own = self.by_id.values().filter(|flow| Arc::ptr_eq(&flow.bound, bound)).count();
        let oldest = match () {
            () if own >= MOST_FLOWS_EACH => self.oldest(|flow| Arc::ptr_eq(&flow.bound, bound)),
            () if self.by_id.len() >= MOST_FLOWS => self.oldest(|_| true),
            () => None,
        };
        if let Some(oldest) = oldest
            && !self.forget(oldest)
        {
            // The agent could not be told, and has it still.
            return None;
        }
        let mut id = self.last_id;
        loop {
            id = if (FIRST_ID..LAST_ID).contains(&id) { id + 1 } else { FIRST_ID };
            if !self.by_id.contains_key(&id) {
                break;
            }
        }
        self.last_id = id;
        let flow = Flow { bound: Arc::clone(bound), to: to.clone(), peer, answered: false, used: self.now };
        self.ids.insert(flow.key(), id);
        self.by_id.insert(id, flow);
        Some(id)
    }

    fn oldest(&self, fits: impl Fn(&Flow) -> bool) -> Option<u32> {
        let fitting = self.by_id.iter().filter(|(_, flow)| fits(flow));
        fitting.min_by_key(|(_, flow)| (flow.answered, flow.used)).map(|(id, _)| *id)
    }

    /// Ends a flow; whether the agent is told.
    fn forget(&mut self, id: u32) -> bool {
        let told = self.lane.as_ref().is_some_and(|lane| lane.try_send(Inward::Forget.encode(id)).is_ok());
        if let Some(flow) = self.by_id.remove(&id) {
            self.ids.remove(&flow.key());
        }
        told
    }

    /// The container has sent something: by which socket it goes to whom.
    fn answered(&mut self, id: u32) -> Option<(Arc<BoundUdp>, Peer)> {
        let flow = self.by_id.get_mut(&id)?;
        flow.answered = true;
        Some((Arc::clone(&flow.bound), flow.peer))
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[tokio::test]
    async fn invented_clients_take_no_room_from_those_that_are_answered() {
        let (lane, mut frames) = mpsc::channel(4 * MOST_FLOWS);
        let mut flows = Flows { lane: Some(lane), ..Flows::default() };
        let bound = || Arc::new(BoundUdp::new("127.0.0.1:0".parse().unwrap()).unwrap());
        let (one, other) = (bound(), bound());
        let to = ContainerPort { container: "a".repeat(64).parse().unwrap(), port: 53 };
        let peer = |number: u32| Peer::new(SocketAddr::new(number.to_be_bytes().into(), 9));
        flows.arrived(&one, &to, peer(0), b"x");
        let real = flows.ids[&(key(&one), peer(0))];
        assert_eq!(flows.answered(real).unwrap().1, peer(0));
        for number in 1..2000 {
            flows.arrived(&one, &to, peer(number), b"x");
            while frames.try_recv().is_ok() {}
        }
        assert_eq!(flows.by_id.len(), MOST_FLOWS_EACH);
        for number in 0..2000 {
            flows.arrived(&other, &to, peer(number), b"x");
            while frames.try_recv().is_ok() {}
        }
        assert_eq!((flows.by_id.len(), flows.ids.len()), (MOST_FLOWS, MOST_FLOWS));
        assert_eq!(flows.ids[&(key(&one), peer(0))], real);
        assert!(flows.answered(real + 1).is_none(), "the first invented one has gone");
        // An agent that is not heard from begins nothing.
        flows.lane = None;
        flows.arrived(&one, &to, peer(9999), b"x");
        assert_eq!(flows.by_id.len(), MOST_FLOWS);
    }
}
