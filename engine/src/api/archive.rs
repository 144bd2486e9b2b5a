//! `/containers/{id}/archive`, `/export` and `/changes`: a container's files as tar streams and lists.
//!
//! What a client sends goes to the container's sandbox piece by piece, decompressed here if need be: nothing is kept whole,
//! and a client that is slow or gone costs its own work only.

use std::{
    io::{self, Read},
    sync::Arc,
};

use base64::Engine as _;
use bytes::Bytes;
use coracle_agent_api::{
    ErrorKind,
    files::{ChangeKind, FilesOperation, PathStat},
};
use futures_util::TryStreamExt;
use http::{HeaderValue, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::{
    agent::{AgentError, FilesFrame, FilesInput},
    container::{
        Container,
        files::{self, Work},
        mounts,
        state::Status,
    },
    error::{Error, Result, chain},
    http::{Request, Response, body, incoming::RequestBody},
    time::UnixNanos,
};

const TAR: &str = "application/x-tar";
/// Header with what is at a path.
const PATH_STAT: &str = "x-docker-container-path-stat";
/// How much is decompressed at once.
const BLOCK: usize = 64 * 1024;
/// How many such blocks wait for the sandbox.
const QUEUE: usize = 4;

fn path(request: &Request) -> Result<String> {
    let path =
        request.query.get("path").ok_or_else(|| Error::invalid("bad parameter: 'path' cannot be empty"))?;
    if path.contains('\0') {
        return Err(Error::invalid("bad parameter: 'path' has a zero byte in it"));
    }
    Ok(path.to_owned())
}

/// Docker's words for what the agent found at a path, or did not.
fn failed(error: AgentError, path: &str, container: &Container) -> Error {
    match error.refusal() {
        Some(ErrorKind::NotFound) => {
            let path: String = path.chars().take(300).collect();
            Error::not_found(format!(
                "Could not find the file {path} in container {}",
                container.record().name
            ))
        }
        _ => error.into(),
    }
}

fn usable(container: &Container) -> Result<()> {
    match container.record().state.status {
        Status::Removing | Status::Dead => Err(Error::conflict(format!(
            "You cannot use the files of container {}, which is {}",
            container.id(),
            container.record().state.status.name()
        ))),
        _ => Ok(()),
    }
}

fn within_reach(container: &Container, path: &str) -> Result<()> {
    if container.is_running() { Ok(()) } else { mounts::check_stopped(&container.record(), path) }
}

pub(crate) async fn stat(request: &Request, id: &str) -> Result<Response> {
    let (container, path) = (request.core.containers.find(id)?, path(request)?);
    usable(&container)?;
    within_reach(&container, &path)?;
    let mut work =
        files::open(&request.core, &container, FilesOperation::Stat { path: path.clone() }).await?;
    match work.answer.next().await.map_err(|error| failed(error, &path, &container))? {
        FilesFrame::Stat(stat) => Ok(with_stat(body::empty(StatusCode::OK), &stat)),
        _ => Err(files::unexpected()),
    }
}

pub(crate) async fn get(request: &Request, id: &str) -> Result<Response> {
    let (container, path) = (request.core.containers.find(id)?, path(request)?);
    usable(&container)?;
    within_reach(&container, &path)?;
    let mut work =
        files::open(&request.core, &container, FilesOperation::Read { path: path.clone() }).await?;
    let stat = match work.answer.next().await.map_err(|error| failed(error, &path, &container))? {
        FilesFrame::Stat(stat) => stat,
        _ => return Err(files::unexpected()),
    };
    tell(request, &container, "archive-path");
    Ok(with_stat(stream(request, work), &stat))
}

pub(crate) async fn export(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    usable(&container)?;
    let work = files::open(&request.core, &container, FilesOperation::Export).await?;
    tell(request, &container, "export");
    Ok(stream(request, work))
}

/// What a container changed, as a layer of an image would hold it.
pub(crate) async fn layer(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    usable(&container)?;
    let operation = files::diff(&container.record());
    Ok(stream(request, files::open(&request.core, &container, operation).await?))
}

pub(crate) async fn changes(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    usable(&container)?;
    let changes = files::changes(&request.core, &container).await?;
    let number = |kind| match kind {
        ChangeKind::Modified => 0,
        ChangeKind::Added => 1,
        ChangeKind::Deleted => 2,
    };
    let all: Vec<Value> =
        changes.iter().map(|change| json!({ "Path": change.path, "Kind": number(change.kind) })).collect();
    // As Docker says that there are none.
    Ok(body::ok(&if all.is_empty() { Value::Null } else { Value::Array(all) }))
}

fn tell(request: &Request, container: &Container, action: &str) {
    let record = container.record();
    let attributes = record.event_attributes();
    request.core.events.container(action, record.id.as_str(), &record.config.image, attributes);
}

/// The rest of an answer as a body; what fails in it breaks the connection off, so that no one takes a part for the whole.
fn stream(request: &Request, work: Work) -> Response {
    let (feed, response) = body::fallible_stream(TAR);
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(async move {
        // All of it: an input that is dropped says that no one listens.
        let mut work = work;
        loop {
            let frame = tokio::select! {
                () = feed.closed() => return,
                frame = work.answer.next() => frame,
            };
            let piece = match frame {
                Ok(FilesFrame::Data(bytes)) => Ok(bytes),
                Ok(FilesFrame::Done) => return,
                Ok(_) => Err(io::Error::other("the agent sent something else than was asked for")),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "a stream of a container's files ends early");
                    Err(io::Error::other(error))
                }
            };
            let ends = piece.is_err();
            if feed.send(piece).await.is_err() || ends {
                return;
            }
        }
    }));
    response
}

fn with_stat(mut response: Response, stat: &PathStat) -> Response {
    let value = json!({
        "name": stat.name,
        "size": stat.size,
        "mode": go_mode(stat.mode),
        "mtime": UnixNanos(stat.modified_unix_nanos).rfc3339(),
        "linkTarget": stat.link_target,
    });
    let text = base64::engine::general_purpose::STANDARD.encode(value.to_string());
    if let Ok(value) = HeaderValue::from_str(&text) {
        response.headers_mut().insert(PATH_STAT, value);
    }
    response
}

/// `st_mode` as Go's `os.FileMode`.
fn go_mode(mode: u32) -> u32 {
    let kind = match mode & 0o170_000 {
        0o040_000 => 1 << 31,
        0o120_000 => 1 << 27,
        0o060_000 => 1 << 26,
        0o020_000 => 1 << 26 | 1 << 21,
        0o010_000 => 1 << 25,
        0o140_000 => 1 << 24,
        _ => 0,
    };
    let bit = |from: u32, to: u32| if mode & from == 0 { 0 } else { to };
    kind | bit(0o4000, 1 << 23) | bit(0o2000, 1 << 22) | bit(0o1000, 1 << 20) | mode & 0o777
}

fn writable(container: &Container, path: &str) -> Result<()> {
    usable(container)?;
    within_reach(container, path)?;
    match container.record().host_config.readonly_rootfs {
        true => Err(Error::invalid("container rootfs is marked read-only")),
        false => Ok(()),
    }
}

pub(crate) async fn put(request: Request, id: &str) -> Result<Response> {
    let (container, path) = (request.core.containers.find(id)?, path(&request)?);
    writable(&container, &path)?;
    let record = container.record();
    let owner = request.query.flag("copyUIDGID").then(|| record.config.user.clone());
    let operation = FilesOperation::Write {
        path: path.clone(),
        keep_kinds: request.query.flag("noOverwriteDirNonDir"),
        owner: owner.filter(|user| !user.is_empty()),
    };
    let core = Arc::clone(&request.core);
    let mut work = files::open(&core, &container, operation).await?;
    let Work { answer, input, .. } = &mut work;
    let sending = async {
        match send(request.body, input).await {
            // What the sandbox has to say is the better reason.
            Ok(()) | Err(SendError::Sandbox) => std::future::pending().await,
            Err(SendError::Client(error)) => error,
        }
    };
    let result = tokio::select! {
        biased;
        frame = answer.next() => frame.map_err(|error| failed(error, &path, &container)),
        error = sending => Err(error),
    };
    match result? {
        FilesFrame::Done => {
            let attributes = record.event_attributes();
            core.events.container("extract-to-dir", record.id.as_str(), &record.config.image, attributes);
            Ok(body::empty(StatusCode::OK))
        }
        _ => Err(files::unexpected()),
    }
}

enum SendError {
    /// The client, or what it sent.
    Client(Error),
    /// The sandbox takes no more.
    Sandbox,
}

fn client(reason: impl std::fmt::Display) -> SendError {
    SendError::Client(Error::invalid(format!("cannot read the archive: {reason}")))
}

/// Sends a body on, decompressed.
async fn send(body: RequestBody, input: &mut FilesInput) -> Result<(), SendError> {
    let mut pieces = Box::pin(body.into_data_stream());
    let mut head = Vec::new();
    while head.len() < 6
        && let Some(piece) = pieces.try_next().await.map_err(client)?
    {
        head.extend_from_slice(&piece);
    }
    let compression = Compression::of(&head)?;
    let head = futures_util::stream::once(std::future::ready(Ok(Bytes::from(head))));
    let mut all = Box::pin(futures_util::StreamExt::chain(head, pieces));
    if compression == Compression::None {
        while let Some(piece) = all.try_next().await.map_err(client)? {
            input.send(&piece).await.map_err(|_| SendError::Sandbox)?;
        }
        return input.finish().await.map_err(|_| SendError::Sandbox);
    }
    let reader = StreamReader::new(all.map_err(io::Error::other));
    let (out, mut blocks) = mpsc::channel(QUEUE);
    let reader = SyncIoBridge::new(reader);
    let decompressing = tokio::task::spawn_blocking(move || compression.decompress(reader, &out));
    while let Some(block) = blocks.recv().await {
        input.send(&block).await.map_err(|_| SendError::Sandbox)?;
    }
    match decompressing.await {
        Ok(Ok(())) => input.finish().await.map_err(|_| SendError::Sandbox),
        Ok(Err(error)) => Err(client(error)),
        Err(error) => Err(SendError::Client(error.into())),
    }
}

/// How an archive comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn of(head: &[u8]) -> Result<Self, SendError> {
        let refused = |name: &str| {
            SendError::Client(Error::unsupported(format!(
                "archives that are compressed by {name} are not supported by Coracle: send it as it is, or with gzip or zstd"
            )))
        };
        match head {
            [0x1f, 0x8b, 0x08, ..] => Ok(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Self::Zstd),
            [b'B', b'Z', b'h', ..] => Err(refused("bzip2")),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err(refused("xz")),
            _ => Ok(Self::None),
        }
    }

    /// Blocks for as long as the other side does.
    fn decompress(self, reader: impl Read, out: &mpsc::Sender<Bytes>) -> io::Result<()> {
        let mut reader: Box<dyn Read> = match self {
            Self::None => Box::new(reader),
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(reader)),
            Self::Zstd => Box::new(zstd::Decoder::new(reader)?),
        };
        loop {
            let mut block = vec![0; BLOCK];
            let len = reader.read(&mut block)?;
            block.truncate(len);
            // No one wants more: that has its reason elsewhere.
            if len == 0 || out.blocking_send(block.into()).is_err() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_written_as_go_writes_them() {
        for (mode, go) in [
            (0o100_644, 0o644),
            (0o040_755, (1 << 31) | 0o755),
            (0o120_777, (1 << 27) | 0o777),
            (0o104_755, (1 << 23) | 0o755),
            (0o041_777, (1 << 31) | (1 << 20) | 0o777),
            (0o020_666, (1 << 26) | (1 << 21) | 0o666),
        ] {
            assert_eq!(go_mode(mode), go, "{mode:o}");
        }
    }
}
