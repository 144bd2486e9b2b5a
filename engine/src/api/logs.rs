//! `/containers/{id}/logs`.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    error::{Error, Result, chain},
    http::{
        Request, Response, body,
        hijack::{Framing, content_type},
    },
    logs::{self, Entry, Log, ReadOptions, Stream},
    time::UnixNanos,
};

/// How many blocks of entries wait for the client.
const QUEUE: usize = 2;

/// What a client wants of the entries.
pub(super) struct Shown {
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) timestamps: bool,
    /// The attributes before each line.
    pub(super) details: bool,
    pub(super) framing: Framing,
}

impl Shown {
    /// Entries on the wire, those that are wanted.
    pub(super) fn encode(&self, entries: &[Entry]) -> Bytes {
        let mut out = Vec::new();
        for entry in entries {
            let wanted = match entry.stream {
                Stream::Stdout => self.stdout,
                Stream::Stderr => self.stderr,
            };
            let text = entry.text.as_bytes();
            if !wanted {
                continue;
            }
            let time = if self.timestamps { entry.time.rfc3339_fixed() + " " } else { String::new() };
            let details = if self.details { details(entry) + " " } else { String::new() };
            self.framing.append(&mut out, entry.stream, &[time.as_bytes(), details.as_bytes(), text]);
        }
        out.into()
    }
}

/// Attributes as in a query string, with commas between them.
fn details(entry: &Entry) -> String {
    let encoded = |(name, value): (&String, &String)| {
        let pair = serde_urlencoded::to_string([(name, value)]);
        pair.unwrap_or_default()
    };
    entry.attributes.iter().map(encoded).collect::<Vec<_>>().join(",")
}

pub(crate) fn logs(request: &Request, id: &str) -> Result<Response> {
    let query = &request.query;
    let container = request.core.containers.find(id)?;
    let tty = container.record().config.tty;
    let shown = Shown {
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
        timestamps: query.flag("timestamps"),
        details: query.flag("details"),
        framing: Framing::of(tty),
    };
    if !shown.stdout && !shown.stderr {
        return Err(Error::invalid("Bad parameters: you must choose at least one stream"));
    }
    let log = container
        .log()
        .ok_or_else(|| Error::unsupported("configured logging driver does not support reading"))?;
    let time = |name: &str| -> Result<Option<UnixNanos>> {
        let parsed = query.get(name).map(UnixNanos::parse_query).transpose();
        Ok(parsed
            .map_err(|error| Error::invalid(format!("invalid value for \"{name}\": {error}")))?
            .filter(|time| time.0 != 0))
    };
    let options = ReadOptions {
        since: time("since")?,
        until: time("until")?,
        // What is no number is everything.
        tail: query.get("tail").and_then(|tail| tail.parse().ok()),
        follow: query.flag("follow") && container.is_running(),
        up_to: None,
    };
    let (feed, response) = body::stream(content_type(tty, request.version));
    let send = send(Arc::clone(log), options, shown, feed);
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(send));
    Ok(response)
}

async fn send(log: Arc<Log>, options: ReadOptions, shown: Shown, feed: mpsc::Sender<Bytes>) {
    let (entries, mut inbox) = mpsc::channel(QUEUE);
    let reading = logs::read(log, options, entries);
    let sending = async {
        while let Some(entries) = inbox.recv().await {
            let bytes = shown.encode(&entries);
            if !bytes.is_empty() && feed.send(bytes).await.is_err() {
                break;
            }
        }
        drop(inbox);
    };
    let both = async { tokio::join!(reading, sending).0 };
    let result = tokio::select! {
        // A client that is gone while nothing is written.
        () = feed.closed() => return,
        result = both => result,
    };
    if let Err(error) = result {
        let _ = feed.send(shown.framing.error(&format!("error reading the log: {}", chain(&error)))).await;
    }
}
