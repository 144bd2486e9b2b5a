//! `coracle import`: sends a file system's tar stream to the daemon while it is read, with a bar on a terminal.

use std::path::Path;

use anyhow::Context;
use futures_util::StreamExt;
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde::Deserialize;

use super::load;
use crate::{
    args::ImportArgs,
    client::{self, Body, escape},
    failure::{Failure, Outcome},
    paths::Home,
    progress, terminal,
};

/// The daemon's answer.
#[derive(Debug, Deserialize)]
struct Message {
    status: Option<String>,
    error: Option<String>,
}

/// Imports a tar stream.
pub(super) async fn run(home: &Home, args: &ImportArgs) -> Outcome {
    let (chunks, total) = match args.file.as_str() {
        "-" if terminal::stdin_is_terminal() => {
            return Err(Failure::new("cannot import: there is no tar stream on standard input")
                .hint("name a file, or use a pipe"));
        }
        "-" => (load::chunks(tokio::io::stdin()), None),
        file => load::open(Path::new(file), "import").await?,
    };
    let docker = client::connect(home).await?;
    let bar = progress::bytes_bar(total, "importing");
    let counted = {
        let bar = bar.clone();
        chunks.inspect(move |chunk| bar.inc(chunk.as_ref().map_or(0, |bytes| bytes.len() as u64)))
    };
    let body: Body = StreamBody::new(counted.map(|chunk| chunk.map(Frame::data))).boxed_unsync();
    let answer = docker.call(Method::POST, &path(args), body).await.context("cannot import")?;
    let answer = answer.into_body().collect().await.context("lost the connection to the daemon")?.to_bytes();
    bar.finish_and_clear();
    let text = std::str::from_utf8(&answer).context("cannot understand the daemon's answer")?;
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let message: Message = serde_json::from_str(line).context("cannot understand the daemon's answer")?;
        if let Some(error) = message.error {
            return Err(Failure::new(error));
        }
        if let Some(status) = message.status {
            terminal::print(&format!("{status}\n"))?;
        }
    }
    Ok(0)
}

fn path(args: &ImportArgs) -> String {
    let mut path = "/images/create?fromSrc=-".to_owned();
    let mut add = |name: &str, value: &str| path += &format!("&{name}={}", escape(value));
    if let Some(name) = &args.name {
        let (repository, tag) = super::images::repository_and_tag(name);
        add("repo", repository);
        add("tag", tag);
    }
    let from =
        if args.file == "-" { "Imported from -".to_owned() } else { format!("Imported from {}", args.file) };
    add("message", args.message.as_deref().unwrap_or(&from));
    if let Some(platform) = &args.platform {
        add("platform", platform);
    }
    args.change.iter().for_each(|change| add("changes", change));
    path
}
