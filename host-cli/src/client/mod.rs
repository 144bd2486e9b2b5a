//! The CLI's side of the Docker API: one HTTP/1.1 connection over the daemon's unix socket for each call.
//!
//! The daemon is the same person's, so its answers are believed; what images and containers put into them is not, and is
//! made printable where it is shown.

mod autostart;
pub(crate) mod stream;

use std::{
    io,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::docker_config::Login;

pub(crate) use autostart::{connect, connect_running};

/// The version of the Docker API that the CLI speaks.
pub(crate) const API_VERSION: &str = "1.44";

/// What a path segment or a query value may hold unescaped.
const UNESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A body to send.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody listens.
    #[error("cannot reach the daemon at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke or what came was no HTTP.
    #[error("lost the connection to the daemon")]
    Transport(#[from] hyper::Error),
    /// The daemon refused; this is its own sentence.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// The daemon's sentence.
        message: String,
    },
    /// The answer is not what it should be.
    #[error("cannot understand the daemon's answer")]
    Answer(#[source] serde_json::Error),
    /// The request cannot be made from what was given.
    #[error("cannot make a request of what was given")]
    Request(#[from] http::Error),
}

impl ClientError {
    /// Whether the daemon says that there is no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == StatusCode::NOT_FOUND)
    }
}

/// A result of a call.
pub(crate) type Result<T, E = ClientError> = std::result::Result<T, E>;

/// Makes calls to a daemon.
#[derive(Debug, Clone)]
pub(crate) struct Docker {
    socket: PathBuf,
}

impl Docker {
    /// For the daemon behind this socket; nothing is connected yet.
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Asks for JSON.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let response = self.call(Method::GET, path, empty()).await?;
        json(response).await
    }

    /// Posts without a body; what is answered does not matter.
    pub(crate) async fn post(&self, path: &str) -> Result<StatusCode> {
        let response = self.call(Method::POST, path, empty()).await?;
        let status = response.status();
        response.into_body().collect().await?;
        Ok(status)
    }

    /// Posts JSON and reads JSON.
    pub(crate) async fn post_json<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        let response = self.call(Method::POST, path, json_body(body)?).await?;
        json(response).await
    }

    /// Deletes, and reads what was answered.
    pub(crate) async fn delete(&self, path: &str) -> Result<Bytes> {
        let response = self.call(Method::DELETE, path, empty()).await?;
        Ok(response.into_body().collect().await?.to_bytes())
    }

    /// Makes a call; an answer other than 1xx, 2xx or 304 is an error.
    pub(crate) async fn call(&self, method: Method, path: &str, body: Body) -> Result<Response<Incoming>> {
        let request = self.request(method, path).body(body)?;
        accepted(self.send(request).await?).await
    }

    /// Makes a call as someone whom a registry knows.
    pub(crate) async fn call_as(
        &self,
        method: Method,
        path: &str,
        login: Option<&Login>,
        body: Body,
    ) -> Result<Response<Incoming>> {
        let mut request = self.request(method, path);
        if let Some(login) = login {
            let json = serde_json::to_vec(login).map_err(ClientError::Answer)?;
            request = request.header("X-Registry-Auth", URL_SAFE.encode(json));
        }
        accepted(self.send(request.body(body)?).await?).await
    }

    /// Makes a call that turns the connection into a stream.
    pub(crate) async fn hijack(&self, path: &str, body: Body) -> Result<stream::Hijacked> {
        let request = self
            .request(Method::POST, path)
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "tcp")
            .body(body)?;
        let response = accepted(self.send(request).await?).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let message = "it did not turn the connection into a stream".to_owned();
            return Err(ClientError::Refused { status: response.status(), message });
        }
        let multiplexed = is_multiplexed(&response);
        Ok(stream::Hijacked { io: TokioIo::new(hyper::upgrade::on(response).await?), multiplexed })
    }

    fn request(&self, method: Method, path: &str) -> http::request::Builder {
        let versioned =
            if path.starts_with("/coracle/") { path.to_owned() } else { format!("/v{API_VERSION}{path}") };
        Request::builder()
            .method(method)
            .uri(versioned)
            .header(header::HOST, "coracle")
            .header(header::USER_AGENT, concat!("coracle/", env!("CARGO_PKG_VERSION")))
            .header(header::CONTENT_TYPE, "application/json")
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect { path: self.socket.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender.send_request(request).await?)
    }
}

/// Whether a stream of output carries standard output and error apart.
pub(crate) fn is_multiplexed<B>(response: &Response<B>) -> bool {
    response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes() == b"application/vnd.docker.multiplexed-stream")
}

/// A body without bytes.
pub(crate) fn empty() -> Body {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync()
}

/// A value as a JSON body.
pub(crate) fn json_body<T: Serialize>(value: &T) -> Result<Body> {
    let bytes = serde_json::to_vec(value).map_err(ClientError::Answer)?;
    Ok(Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync())
}

/// A name as a path segment or query value.
pub(crate) fn escape(text: &str) -> String {
    utf8_percent_encode(text, UNESCAPED).to_string()
}

async fn accepted(response: Response<Incoming>) -> Result<Response<Incoming>> {
    let status = response.status();
    if status.is_success() || status.is_informational() || status == StatusCode::NOT_MODIFIED {
        return Ok(response);
    }
    let body = response.into_body().collect().await?.to_bytes();
    Err(ClientError::Refused { status, message: refusal(&body, status) })
}

/// The sentence in an error's body.
fn refusal(body: &[u8], status: StatusCode) -> String {
    #[derive(serde::Deserialize)]
    struct Refusal {
        message: String,
    }
    match serde_json::from_slice::<Refusal>(body) {
        Ok(refusal) => refusal.message,
        Err(_) if body.is_empty() => format!("the daemon answered {status}"),
        Err(_) => String::from_utf8_lossy(body).trim().to_owned(),
    }
}

async fn json<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T> {
    let body = response.into_body().collect().await?.to_bytes();
    serde_json::from_slice(&body).map_err(ClientError::Answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_the_daemons_own_sentence() {
        let status = StatusCode::NOT_FOUND;
        assert_eq!(refusal(br#"{"message":"No such container: x"}"#, status), "No such container: x");
        assert_eq!(refusal(b"plain\n", status), "plain");
        assert_eq!(refusal(b"", status), "the daemon answered 404 Not Found");
    }

    #[test]
    fn a_name_cannot_become_another_path() {
        assert_eq!(escape("../a?b=c&d"), "..%2Fa%3Fb%3Dc%26d");
    }
}
