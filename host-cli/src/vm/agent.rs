//! The two calls that the daemon makes to the agent outside of the engine: whether it answers, and that it shall end.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// How long the agent may take for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the agent answers on this connection.
pub(crate) async fn answers(stream: UnixStream) -> Result<()> {
    call(stream, Method::GET, "/v1/state").await
}

/// Tells the agent to shut the guest down.
pub(crate) async fn shut_down(stream: UnixStream) -> Result<()> {
    call(stream, Method::POST, "/v1/shutdown").await
}

async fn call(stream: UnixStream, method: Method, path: &str) -> Result<()> {
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "agent")
            .body(Empty::<Bytes>::new())
            .context("cannot make a request")?;
        let response = sender.send_request(request).await;
        connection.abort();
        Ok::<_, anyhow::Error>(response?.status())
    };
    let status = tokio::time::timeout(TIMEOUT, exchange)
        .await
        .with_context(|| format!("the agent did not answer within {} seconds", TIMEOUT.as_secs()))?
        .context("cannot talk to the agent")?;
    if !status.is_success() {
        bail!("the agent answered {status}");
    }
    Ok(())
}
