//! `/containers/{id}/attach`, and the session on a hijacked connection that attach and exec share.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::logs::Shown;
use crate::{
    container::state::Status,
    error::{Error, Result, chain},
    http::{
        Request, Response, body,
        detach::DetachKeys,
        hijack::{self, Framing, Incoming, Outgoing, Presence, content_type},
    },
    io::{Chunk, Input},
    logs::{self, Log, Position, ReadOptions},
};

/// How long a client may take to notice that the output has ended.
const LINGER: Duration = Duration::from_secs(10);
/// How many blocks of log entries wait for the client.
const QUEUE: usize = 2;

/// One client's share in a process's streams.
pub(super) struct Session {
    /// The log so far, before everything else.
    pub(super) replay: Option<(Arc<Log>, Position, Shown)>,
    pub(super) output: Option<mpsc::Receiver<Chunk>>,
    pub(super) input: Option<mpsc::Sender<Input>>,
    pub(super) framing: Framing,
    /// The end of the client's input is the end of the process's.
    pub(super) closes_stdin: bool,
    /// What lets go of a terminal.
    pub(super) detach: Option<DetachKeys>,
}

impl Session {
    /// Runs until the process's output ends or the client leaves.
    pub(super) async fn run(self, mut incoming: Incoming, mut outgoing: Outgoing, presence: Presence) {
        let Self { replay, output, input, framing, closes_stdin, detach } = self;
        {
            let mut writing = std::pin::pin!(write(replay, output, framing, &mut outgoing));
            let mut reading = std::pin::pin!(read(&mut incoming, input, closes_stdin, detach));
            let mut lost = std::pin::pin!(presence.lost());
            tokio::select! {
                () = &mut writing => {}
                // What it sent before it went still counts.
                () = &mut lost => drop(reading.await),
                leaves = &mut reading => if !leaves {
                    tokio::select! {
                        () = &mut writing => {}
                        () = &mut lost => {}
                    }
                },
            }
        }
        outgoing.close().await;
        // A connection that is closed with bytes unread is reset, and some clients take that for a failure: read what the
        // client still sends until it has seen the end.
        let rest = async { while incoming.next().await.is_some() {} };
        let _ = tokio::time::timeout(LINGER, rest).await;
    }
}

async fn write(
    replay: Option<(Arc<Log>, Position, Shown)>,
    output: Option<mpsc::Receiver<Chunk>>,
    framing: Framing,
    outgoing: &mut Outgoing,
) {
    if let Some((log, position, shown)) = replay
        && write_log(log, position, shown, outgoing).await.is_err()
    {
        return;
    }
    let Some(mut output) = output else { return };
    while let Some(Chunk { stream, bytes }) = output.recv().await {
        if outgoing.send(&framing.frame(stream, &bytes)).await.is_err() {
            return;
        }
    }
}

async fn write_log(
    log: Arc<Log>,
    up_to: Position,
    shown: Shown,
    outgoing: &mut Outgoing,
) -> std::io::Result<()> {
    let (entries, mut inbox) = mpsc::channel(QUEUE);
    let options = ReadOptions { up_to: Some(up_to), ..ReadOptions::default() };
    let reading = tokio::spawn(logs::read(log, options, entries));
    while let Some(entries) = inbox.recv().await {
        outgoing.send(&shown.encode(&entries)).await?;
    }
    if let Ok(Err(error)) = reading.await {
        outgoing.send(&shown.framing.error(&format!("error reading the log: {}", chain(&error)))).await?;
    }
    Ok(())
}

/// Passes input on; returns whether the client's end of input means that it leaves.
async fn read(
    incoming: &mut Incoming,
    input: Option<mpsc::Sender<Input>>,
    closes_stdin: bool,
    detach: Option<DetachKeys>,
) -> bool {
    let Some(input) = input else {
        // Bytes that no one asked for are dropped; a client without input closes its side at once and stays.
        while incoming.next().await.is_some() {}
        return false;
    };
    let mut detach = detach;
    while let Some(bytes) = incoming.next().await {
        let (bytes, leaves) = match &mut detach {
            Some(keys) => keys.filter(bytes),
            None => (bytes, false),
        };
        if !bytes.is_empty() && !pass(&input, bytes).await {
            // The process takes no more; its output may go on.
            while incoming.next().await.is_some() {}
            return false;
        }
        if leaves {
            return true;
        }
    }
    if closes_stdin {
        let _ = input.send(Input::Close).await;
    }
    !closes_stdin
}

async fn pass(input: &mpsc::Sender<Input>, bytes: Bytes) -> bool {
    input.send(Input::Bytes(bytes)).await.is_ok()
}

pub(crate) fn attach(mut request: Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let record = container.record();
    if record.state.status == Status::Paused {
        return Err(Error::conflict(format!(
            "container {} is paused, unpause the container before attach",
            record.id
        )));
    }
    let tty = record.config.tty;
    let framing = Framing::of(tty);
    let query = &request.query;
    let (stream, logs) = (query.flag("stream"), query.flag("logs"));
    let (stdin, stdout, stderr) = (query.flag("stdin"), query.flag("stdout"), query.flag("stderr"));
    let detach = if tty && stdin { Some(DetachKeys::parse(query.get("detachKeys"))?) } else { None };
    if let Some(trace) = container.trace() {
        trace.mark("attached");
    }
    let log = container.log().filter(|_| logs).cloned();
    let (output, position) = container.fanout.subscribe(stdout, stderr, log.as_deref());
    let shown = Shown { stdout, stderr, timestamps: false, details: false, framing };
    let session = Session {
        replay: log.zip(position).map(|(log, position)| (log, position, shown)),
        output: stream.then_some(output),
        input: (stdin && stream && record.config.open_stdin).then(|| container.stdin.sender()),
        framing,
        closes_stdin: record.config.stdin_once && !tty,
        detach,
    };
    let content_type = content_type(tty, request.version);
    if hijack::wants_upgrade(&request) {
        let keep = Arc::clone(&container);
        return hijack::hijack(&mut request, content_type, move |incoming, outgoing, presence| async move {
            session.run(incoming, outgoing, presence).await;
            drop(keep);
        });
    }
    if stdin {
        return Err(Error::invalid(
            "attaching to standard input needs a connection that can be upgraded: send `Connection: Upgrade` and `Upgrade: tcp`",
        ));
    }
    Ok(plain(&request, session, content_type))
}

/// Output as an ordinary body, for clients that only listen.
fn plain(request: &Request, session: Session, content_type: &'static str) -> Response {
    let (feed, response) = body::stream(content_type);
    let Session { replay, output, framing, .. } = session;
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(async move {
        if let Some((log, up_to, shown)) = replay {
            let (entries, mut inbox) = mpsc::channel(QUEUE);
            let options = ReadOptions { up_to: Some(up_to), ..ReadOptions::default() };
            let reading = tokio::spawn(logs::read(log, options, entries));
            while let Some(entries) = inbox.recv().await {
                if feed.send(shown.encode(&entries)).await.is_err() {
                    return;
                }
            }
            let _ = reading.await;
        }
        let Some(mut output) = output else { return };
        loop {
            let chunk = tokio::select! {
                () = feed.closed() => return,
                chunk = output.recv() => chunk,
            };
            let Some(Chunk { stream, bytes }) = chunk else { return };
            if feed.send(framing.frame(stream, &bytes)).await.is_err() {
                return;
            }
        }
    }));
    response
}
