//! The API over HTTP/1.1: one task per connection, over whatever the connection is made of. Requests are hostile: bodies are
//! bounded, unknown fields and routes are refused, and every failure answers an `ApiError`.

mod kmsg;
mod routes;
mod streams;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use coracle_agent_api::ApiError;
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio_vsock::VsockListener;

use crate::agent::Agent;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Accepts connections on a unix socket, for ever.
pub(crate) async fn serve_unix(agent: Arc<Agent>, listener: UnixListener) -> io::Result<()> {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(serve(agent.clone(), stream))),
            Err(error) => agent.descriptors().survive(error).await?,
        }
    }
}

/// Accepts connections on a vsock port, for ever.
pub(crate) async fn serve_vsock(agent: Arc<Agent>, listener: VsockListener) -> io::Result<()> {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == tokio_vsock::VMADDR_CID_HOST => {
                tokio::spawn(serve(agent.clone(), stream));
            }
            // A container can open vsock sockets, too; the API is for the host alone.
            Ok((_, peer)) => tracing::warn!("refused a connection from CID {}", peer.cid()),
            Err(error) => agent.descriptors().survive(error).await?,
        }
    }
}

async fn serve(agent: Arc<Agent>, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
    // Shutting down begins when the answer is out.
    let shutdown = Arc::new(AtomicBool::new(false));
    let service = service_fn(|request: Request<Incoming>| {
        let (agent, shutdown) = (agent.clone(), shutdown.clone());
        async move { Ok::<_, Infallible>(routes::answer(agent, request, &shutdown).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!("a connection failed: {error}");
    }
    agent.descriptors().were_freed();
    if shutdown.load(Ordering::Relaxed) {
        agent.request_shutdown();
    }
}

fn json(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => json_bytes(StatusCode::OK, bytes),
        Err(error) => failure(&ApiError::new(coracle_agent_api::ErrorKind::Internal, error.to_string())),
    }
}

fn failure(error: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(error.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_bytes(status, serde_json::to_vec(error).unwrap_or_default())
}

fn json_bytes(status: StatusCode, bytes: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(bytes)).boxed_unsync());
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn nothing(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Empty::new().boxed_unsync());
    *response.status_mut() = status;
    response
}
