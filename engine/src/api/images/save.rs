//! `/images/get` and `/images/{name}/get`: images as an archive, written while the client reads it.

use std::{
    io::{self, Write},
    sync::Arc,
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::super::refuse;
use crate::{
    error::{Error, Result, chain},
    http::{Request, Response, body},
};

/// The client, as something that can be written to.
struct ToClient(mpsc::Sender<io::Result<Bytes>>);

impl Write for ToClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the client went away"))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) async fn save(request: &Request, names: Vec<String>) -> Result<Response> {
    refuse(request, "platform", "--platform")?;
    if names.is_empty() {
        return Err(Error::invalid("no images are named"));
    }
    let (feed, response) = body::fallible_stream("application/x-tar");
    let (found, is_found) = oneshot::channel();
    let core = Arc::clone(&request.core);
    tokio::task::spawn_blocking(move || {
        let archive = match core.images.save(&names) {
            Ok(archive) => archive,
            Err(error) => return drop(found.send(Err(Error::from(error)))),
        };
        let ids: Vec<_> = archive.ids().map(|id| id.to_string()).collect();
        if found.send(Ok(())).is_err() {
            return;
        }
        let out = io::BufWriter::with_capacity(256 * 1024, ToClient(feed.clone()));
        match archive.write_to(out) {
            Ok(()) => ids.iter().for_each(|id| core.events.image("save", id, id)),
            Err(error) => {
                let message = chain(&error);
                tracing::warn!(message, "saving images was broken off");
                let _ = feed.blocking_send(Err(io::Error::other(message)));
            }
        }
    });
    let nobody = |_| Error::internal("saving ended without an answer");
    is_found.await.map_err(nobody)??;
    Ok(response)
}
