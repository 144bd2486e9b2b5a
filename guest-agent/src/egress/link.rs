//! The agent's end of the connection over which it asks the daemon (see [`coracle_agent_api::egress`]). There may be none for a
//! while, when a daemon has ended and the next has not come yet: what is asked then waits a moment, and fails.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coracle_agent_api::egress::{FIRST_ID, Failure, Flow, HEADER_LEN, Header, LAST_ID, Reply, Request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};

/// How long something that is asked waits for a daemon. Programs ask for names again before long, and want to know that.
const PATIENCE: Duration = Duration::from_secs(3);
const QUESTION_PATIENCE: Duration = Duration::from_secs(1);
/// Frames that wait for being sent. Those of datagrams have a lane of their own, which may overflow.
const ASKED: usize = 1024;
const DATAGRAMS: usize = 512;
/// Replies that wait for one flow of datagrams; more are dropped, as a network does.
const BACK: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Link {
    lanes: watch::Sender<Option<Lanes>>,
    waiting: Mutex<Waiting>,
}

/// The ways to one daemon.
#[derive(Debug, Clone)]
struct Lanes {
    /// Which one.
    daemon: u64,
    asked: mpsc::Sender<Vec<u8>>,
    datagrams: mpsc::Sender<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Waiting {
    last_id: u32,
    /// Daemons that there have been.
    daemons: u64,
    answers: HashMap<u32, Waiter>,
}

#[derive(Debug)]
enum Waiter {
    /// With the daemon that was asked, once one was.
    Once(oneshot::Sender<Outcome>, Option<u64>),
    Flow(mpsc::Sender<Reply>),
}

/// What became of something that was asked.
#[derive(Debug)]
enum Outcome {
    Stream(OwnedFd),
    Reply(Reply),
}

/// Forgets what waits under an id.
struct Pending<'a>(&'a Link, u32);

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.waiting().answers.remove(&self.1);
    }
}

/// A flow of datagrams; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Datagrams {
    link: std::sync::Arc<Link>,
    id: u32,
    /// What comes back.
    pub(super) replies: mpsc::Receiver<Reply>,
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.link.waiting().answers.remove(&self.id);
    }
}

impl Link {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a daemon until it goes, or another one comes.
    pub(super) async fn serve(&self, io: impl AsyncRead + AsyncWrite + Send) {
        let (mut reader, mut writer) = tokio::io::split(io);
        let (asked, mut to_ask) = mpsc::channel::<Vec<u8>>(ASKED);
        let (datagrams, mut to_send) = mpsc::channel::<Vec<u8>>(DATAGRAMS);
        let daemon = {
            let mut waiting = self.waiting();
            waiting.daemons += 1;
            waiting.daemons
        };
        self.lanes.send_replace(Some(Lanes { daemon, asked, datagrams }));
        let mut newest = self.lanes.subscribe();
        let is_ours = |lanes: &Option<Lanes>| lanes.as_ref().is_some_and(|lanes| lanes.daemon == daemon);
        // Owned, so that nothing more can be asked of this daemon when it ends.
        let write = async move {
            loop {
                let frame = tokio::select! {
                    biased;
                    Some(frame) = to_ask.recv() => frame,
                    Some(frame) = to_send.recv() => frame,
                    else => return Ok(()),
                };
                writer.write_all(&frame).await?;
                if to_ask.is_empty() && to_send.is_empty() {
                    writer.flush().await?;
                }
            }
        };
        let read = async {
            loop {
                self.take_reply(&mut reader).await?;
            }
        };
        let ended: io::Result<()> = tokio::select! {
            ended = write => ended,
            ended = read => ended,
            _ = newest.wait_for(|lanes| !is_ours(lanes)) => Err(io::Error::other("another daemon has come")),
        };
        if let Err(error) = ended {
            tracing::debug!("the daemon's connection for the outside has ended: {error}");
        }
        self.lanes.send_if_modified(|lanes| {
            let current = is_ours(lanes);
            if current {
                *lanes = None;
            }
            current
        });
        // Whoever has asked this one will get no answer. Flows of datagrams go on with the next.
        self.waiting()
            .answers
            .retain(|_, waiter| !matches!(waiter, Waiter::Once(_, Some(asked)) if *asked == daemon));
    }

    async fn take_reply(&self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        let mut payload = Vec::new();
        let header = next_frame(reader, &mut payload).await?;
        let reply = Reply::decode(header.kind, &payload).map_err(io::Error::other)?;
        let mut waiting = self.waiting();
        match waiting.answers.get(&header.id) {
            Some(Waiter::Flow(flow)) => drop(flow.try_send(reply)),
            Some(Waiter::Once(..)) => {
                if let Some(Waiter::Once(waiter, _)) = waiting.answers.remove(&header.id) {
                    // Who asked may have given up.
                    let _ = waiter.send(Outcome::Reply(reply));
                }
            }
            None => {}
        }
        Ok(())
    }

    /// A connected stream has come from the host.
    pub(super) fn stream_arrived(&self, id: u32, stream: OwnedFd) {
        let mut waiting = self.waiting();
        if matches!(waiting.answers.get(&id), Some(Waiter::Once(..)))
            && let Some(Waiter::Once(waiter, _)) = waiting.answers.remove(&id)
        {
            let _ = waiter.send(Outcome::Stream(stream));
        }
    }

    /// Connects; without an error's reason where there is nobody to ask.
    pub(super) async fn connect(&self, flow: Flow) -> Result<OwnedFd, Option<Failure>> {
        match self.ask(&Request::Connect(flow), PATIENCE).await {
            Some(Outcome::Stream(stream)) => Ok(stream),
            Some(Outcome::Reply(Reply::Failed(failure))) => Err(Some(failure)),
            _ => Err(None),
        }
    }

    /// A connection that is not told from where it comes.
    pub(super) async fn engine(&self, request: Request) -> Option<OwnedFd> {
        match self.ask(&request, PATIENCE).await {
            Some(Outcome::Stream(stream)) => Some(stream),
            _ => None,
        }
    }

    /// Sends an echo request; what came back.
    pub(super) async fn echo(&self, flow: Flow, data: Vec<u8>) -> Result<Vec<u8>, Option<Failure>> {
        match self.ask(&Request::Echo(flow, data), PATIENCE).await {
            Some(Outcome::Reply(Reply::Echo(data))) => Ok(data),
            Some(Outcome::Reply(Reply::Failed(failure))) => Err(Some(failure)),
            _ => Err(None),
        }
    }

    /// Has a question answered by the host's name servers.
    pub(super) async fn question(&self, request: Request) -> Option<Vec<u8>> {
        match self.ask(&request, QUESTION_PATIENCE).await {
            Some(Outcome::Reply(Reply::Answer(message))) => Some(message),
            _ => None,
        }
    }

    async fn ask(&self, request: &Request, patience: Duration) -> Option<Outcome> {
        let (sender, answer) = oneshot::channel();
        let id = self.insert(Waiter::Once(sender, None));
        let _pending = Pending(self, id);
        let mut lanes = self.lanes.subscribe();
        let Lanes { daemon, asked, .. } = {
            let lanes = tokio::time::timeout(patience, lanes.wait_for(Option::is_some)).await.ok()?.ok()?;
            lanes.as_ref()?.clone()
        };
        if let Some(Waiter::Once(_, whom)) = self.waiting().answers.get_mut(&id) {
            *whom = Some(daemon);
        }
        // A daemon that has ended meanwhile takes nothing any more.
        asked.try_send(request.encode(id)).ok()?;
        answer.await.ok()
    }

    fn insert(&self, waiter: Waiter) -> u32 {
        let mut waiting = self.waiting();
        loop {
            let next = waiting.last_id.wrapping_add(1);
            waiting.last_id = if (FIRST_ID..=LAST_ID).contains(&next) { next } else { FIRST_ID };
            let id = waiting.last_id;
            if let std::collections::hash_map::Entry::Vacant(place) = waiting.answers.entry(id) {
                place.insert(waiter);
                return id;
            }
        }
    }

    /// Begins a flow of datagrams.
    pub(super) fn datagrams(self: &std::sync::Arc<Self>) -> Datagrams {
        let (sender, replies) = mpsc::channel(BACK);
        let id = self.insert(Waiter::Flow(sender));
        Datagrams { link: self.clone(), id, replies }
    }

    fn send_datagram(&self, id: u32, flow: Flow, data: Vec<u8>) {
        let lanes = self.lanes.borrow();
        if let Some(lanes) = lanes.as_ref() {
            // A lane that is full drops it, as a network does.
            let _ = lanes.datagrams.try_send(Request::Datagram(flow, data).encode(id));
        }
    }
}

impl Datagrams {
    /// What sends datagrams of this flow.
    pub(super) fn sender(&self, flow: Flow) -> impl Fn(Vec<u8>) + Send + Sync + use<> {
        let (link, id) = (self.link.clone(), self.id);
        move |data| link.send_datagram(id, flow, data)
    }
}

/// Reads one frame from the daemon; its payload replaces what was in `payload`.
pub(crate) async fn next_frame(
    reader: &mut (impl AsyncRead + Unpin),
    payload: &mut Vec<u8>,
) -> io::Result<Header> {
    let mut header = [0; HEADER_LEN];
    reader.read_exact(&mut header).await?;
    let header = Header::decode(&header).map_err(io::Error::other)?;
    payload.resize(header.len, 0);
    reader.read_exact(payload).await?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use coracle_agent_api::egress::Transport;

    use super::*;

    /// Asks, and returns when the request was read at the other end.
    async fn asked(
        link: &Arc<Link>,
        daemon: &mut tokio::io::DuplexStream,
    ) -> (u32, tokio::task::JoinHandle<Option<Vec<u8>>>) {
        let container = "a".repeat(64).parse().unwrap();
        let asking = link.clone();
        let answer = tokio::spawn(async move {
            asking.question(Request::Question(container, Transport::Udp, vec![7; 12])).await
        });
        let mut header = [0; HEADER_LEN];
        daemon.read_exact(&mut header).await.unwrap();
        let header = Header::decode(&header).unwrap();
        daemon.read_exact(&mut vec![0; header.len]).await.unwrap();
        (header.id, answer)
    }

    fn serve(link: &Arc<Link>) -> tokio::io::DuplexStream {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let served = link.clone();
        tokio::spawn(async move { served.serve(ours).await });
        theirs
    }

    #[tokio::test]
    async fn what_a_daemon_was_asked_ends_with_it_and_what_the_next_one_was_asked_does_not() {
        let link = Arc::new(Link::default());
        let mut first = serve(&link);
        let (_, unanswered) = asked(&link, &mut first).await;
        let mut second = serve(&link);
        assert_eq!(unanswered.await.unwrap(), None, "the daemon was replaced");
        let (id, answered) = asked(&link, &mut second).await;
        // The first one's end is noticed late.
        drop(first);
        second.write_all(&Reply::Answer(vec![1, 2]).encode(id)).await.unwrap();
        assert_eq!(answered.await.unwrap(), Some(vec![1, 2]));
        let (_, unanswered) = asked(&link, &mut second).await;
        drop(second);
        assert_eq!(unanswered.await.unwrap(), None, "the daemon has gone");
    }
}
