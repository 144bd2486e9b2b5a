//! `coracle load`: sends an image archive to the daemon while it is read, with a bar on a terminal.

use std::{fs, io, path::Path};

use anyhow::Context;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio_util::io::ReaderStream;

use crate::{
    args::LoadArgs,
    client::{self, Body, stream::body_reader},
    failure::{Failure, Outcome},
    paths::Home,
    progress, terminal,
};

/// A line of the daemon's answer.
#[derive(Debug, Deserialize)]
struct Message {
    stream: Option<String>,
    error: Option<String>,
}

/// Loads an archive.
pub(super) async fn run(home: &Home, args: &LoadArgs) -> Outcome {
    let (chunks, total) = match &args.input {
        Some(path) => open(path, "load").await?,
        None if terminal::stdin_is_terminal() => {
            return Err(Failure::new("cannot load images: there is no archive on standard input")
                .hint("name a file with -i, or use a pipe"));
        }
        None => (chunks(tokio::io::stdin()), None),
    };
    let docker = client::connect(home).await?;
    let bar = progress::bytes_bar(total, "loading");
    let counted = {
        let bar = bar.clone();
        chunks.inspect(move |chunk| bar.inc(chunk.as_ref().map_or(0, |bytes| bytes.len() as u64)))
    };
    let body: Body = StreamBody::new(counted.map(|chunk| chunk.map(Frame::data))).boxed_unsync();
    let path = format!("/images/load?quiet={}", u8::from(args.quiet || !terminal::shows_progress()));
    let response = docker.call(Method::POST, &path, body).await?;
    let mut lines = BufReader::new(body_reader(response.into_body())).lines();
    while let Some(line) =
        lines.next_line().await.context("lost the connection to the daemon while it loaded")?
    {
        let message: Message =
            serde_json::from_str(&line).context("cannot understand the daemon's answer")?;
        if let Some(error) = message.error {
            bar.finish_and_clear();
            return Err(Failure::new(error));
        }
        if let Some(text) = message.stream {
            bar.suspend(|| terminal::print(&text))?;
        }
    }
    bar.finish_and_clear();
    Ok(0)
}

/// A stream of bytes to send.
pub(super) type Chunks = std::pin::Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// A file's bytes, and how many there are; `what` is to be done with them.
pub(super) async fn open(path: &Path, what: &str) -> Result<(Chunks, Option<u64>), Failure> {
    let cannot = || format!("cannot open {}", path.display());
    let file = tokio::fs::File::open(path).await.with_context(cannot)?;
    let metadata = file.metadata().await.with_context(cannot)?;
    if metadata.is_dir() {
        return Err(Failure::new(format_args!("cannot {what} {}: it is a directory", path.display())));
    }
    let total = fs::Metadata::is_file(&metadata).then_some(metadata.len());
    Ok((chunks(file), total))
}

pub(super) fn chunks(reader: impl tokio::io::AsyncRead + Send + 'static) -> Chunks {
    Box::pin(ReaderStream::with_capacity(reader, 256 * 1024))
}
