//! `/images/load`: an archive streams in from the client and through the image store, which is synchronous; a channel
//! connects the two.
//!
//! A client that vanishes is an error to the store's reader, and the store then leaves nothing behind.

use std::{
    io::{self, Read},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use coracle_image_store::{LoadProgress, Loaded};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::{
    core::Core,
    error::{Error, Result, chain},
    http::{Request, Response, body, incoming::RequestBody},
};

/// How many pieces of the body wait for the store.
pub(super) const QUEUE: usize = 16;
/// Progress of one layer is told this often.
const INTERVAL: Duration = Duration::from_millis(100);

/// The body as a blocking reader.
pub(super) struct BodyReader {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl BodyReader {
    pub(super) fn new(pieces: mpsc::Receiver<io::Result<Bytes>>) -> Self {
        Self { pieces, current: Bytes::new() }
    }
}

impl Read for BodyReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece?,
                None => return Ok(0),
            }
        }
        let len = self.current.len().min(out.len());
        self.current.copy_to_slice(&mut out[..len]);
        Ok(len)
    }
}

/// What the loading thread tells.
enum Report {
    Progress(Value),
    Done(Result<Vec<Loaded>>),
}

pub(crate) async fn load(request: Request) -> Result<Response> {
    if let Some(platform) = request.query.get("platform") {
        let shown: String = platform.chars().take(80).collect();
        return Err(Error::unsupported(format!(
            "--platform ({shown}) is not supported by Coracle for `docker load` yet: leave it out"
        )));
    }
    let quiet = request.query.flag("quiet");
    let (pieces, reader) = mpsc::channel(QUEUE);
    let (reports, mut inbox) = mpsc::channel(QUEUE);
    let feeder = request.core.tasks.spawn(feed(request.body, pieces));
    let images = Arc::clone(&request.core.images);
    tokio::task::spawn_blocking(move || {
        let reader = BodyReader::new(reader);
        let mut throttle = Throttle::default();
        let mut progress = |progress: LoadProgress| {
            if !quiet && let Some(line) = throttle.line(&progress) {
                // Progress that no one takes in time is not worth waiting for.
                let _ = reports.try_send(Report::Progress(line));
            }
        };
        let result = images
            .load(reader, &mut progress)
            .map_err(|error| Error::from(error).context("cannot load the image archive"));
        let _ = reports.blocking_send(Report::Done(result));
    });
    let first = inbox.recv().await;
    if let Some(Report::Done(Err(error))) = first {
        // The client reads the answer only when it has sent everything.
        let _ = feeder.await;
        return Err(error);
    }
    let (feed, response) = body::stream("application/json");
    let core = Arc::clone(&request.core);
    request.core.tasks.spawn(async move {
        let mut next = first;
        while let Some(report) = next {
            for line in lines(&core, report) {
                // A client that is gone: the load ends by the end of its body.
                let _ = feed.send(body::json_line(&line)).await;
            }
            next = inbox.recv().await;
        }
    });
    Ok(response)
}

fn lines(core: &Core, report: Report) -> Vec<Value> {
    match report {
        Report::Progress(line) => vec![line],
        Report::Done(Ok(loaded)) => {
            let mut lines = Vec::new();
            for image in &loaded {
                core.events.image("load", &image.id.to_string(), &image.id.to_string());
                lines.extend(
                    image.messages().into_iter().map(|message| json!({ "stream": format!("{message}\n") })),
                );
            }
            lines
        }
        Report::Done(Err(error)) => {
            let message = error.to_string();
            vec![json!({ "errorDetail": { "message": message }, "error": message })]
        }
    }
}

/// Moves the body to the reader; when the reader has had enough, to nowhere.
pub(super) async fn feed(mut body: RequestBody, pieces: mpsc::Sender<io::Result<Bytes>>) {
    let mut wanted = true;
    while let Some(frame) = body.frame().await {
        let piece = match frame {
            Ok(frame) => match frame.into_data() {
                Ok(data) => Ok(data),
                Err(_) => continue,
            },
            Err(error) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the client went away: {}", chain(&error)),
            )),
        };
        let last = piece.is_err();
        if wanted {
            wanted = pieces.send(piece).await.is_ok();
        }
        if last {
            return;
        }
    }
}

/// Tells a layer's progress now and then, and its end.
#[derive(Default)]
struct Throttle {
    last: Option<(String, Instant)>,
}

impl Throttle {
    fn line(&mut self, progress: &LoadProgress) -> Option<Value> {
        let LoadProgress { layer, current, total } = progress;
        let recent = self.last.as_ref().is_some_and(|(last, at)| last == layer && at.elapsed() < INTERVAL);
        if recent && current < total {
            return None;
        }
        self.last = Some((layer.clone(), Instant::now()));
        Some(json!({
            "status": "Loading layer",
            "progressDetail": { "current": current, "total": total },
            "id": layer,
        }))
    }
}
