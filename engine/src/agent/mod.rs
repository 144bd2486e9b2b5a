//! Client of the agent's API (HTTP/1.1 with JSON over a connection into a sandbox).
//!
//! The guest is hostile: answers are limited in size and in time, unknown fields are refused, frames are checked for
//! their length and their order. What is wrong ends the one call that saw it.

mod files;
pub(crate) mod frames;
mod output;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use coracle_agent_api::{
    self as api, AgentState, ContainerSpec, DiffId, Endpoint, ExecSpec, NetworkId, OUTPUT_PROTOCOL,
    ProcessId, Processes, Resources, Retain, STDIN_PROTOCOL, Signal, Started, Stats, TerminalSize, VolumeId,
    VolumeUsage, WayOut,
    datagrams::DATAGRAMS_PROTOCOL,
    egress::EGRESS_PROTOCOL,
    files::{FILES_PROTOCOL, FilesRequest},
    ports::PORTS_PROTOCOL,
};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

pub(crate) use files::{FilesAnswer, FilesFrame, FilesInput};
pub(crate) use output::{Frame, OutputStream};

use crate::sandbox::{Sandbox, SandboxError};

/// The largest answer that is read.
const MAX_ANSWER: usize = 16 * 1024 * 1024;
/// How long a call may take that has nothing to wait for.
const CALL_TIME: Duration = Duration::from_secs(30);
/// How long it may take until work on files begins: a container that is just ending is waited for.
const FILES_TIME: Duration = Duration::from_secs(60);
/// How long a start may take: it mounts, and looks users up in files of the image.
const START_TIME: Duration = Duration::from_secs(120);

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// There is no way to the agent.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The agent said no.
    #[error("{0}")]
    Refused(api::ApiError),
    /// The connection broke.
    #[error("the agent ended the conversation")]
    Http(#[from] hyper::Error),
    /// The answer came too late.
    #[error("the agent did not answer `{0}` in time")]
    Timeout(String),
    /// The answer is not what the API says.
    #[error("the agent's answer to `{path}` makes no sense: {reason}")]
    Nonsense {
        /// What was asked.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A stream broke.
    #[error("the stream from the agent broke")]
    Stream(#[source] io::Error),
}

impl AgentError {
    /// The class of a refusal.
    pub(crate) fn refusal(&self) -> Option<api::ErrorKind> {
        match self {
            Self::Refused(error) => Some(error.kind),
            _ => None,
        }
    }
}

/// The agent of one sandbox. Every call has its own connection.
#[derive(Clone)]
pub(crate) struct Agent {
    sandbox: Arc<dyn Sandbox>,
}

impl Agent {
    pub(crate) fn new(sandbox: Arc<dyn Sandbox>) -> Self {
        Self { sandbox }
    }

    pub(crate) async fn state(&self) -> Result<AgentState, AgentError> {
        self.get("/v1/state").await
    }

    pub(crate) async fn start(&self, id: &ProcessId, spec: &ContainerSpec) -> Result<Started, AgentError> {
        self.post(&format!("/v1/containers/{id}/start"), spec, START_TIME).await
    }

    /// Freezes a container's processes, or lets them run on.
    pub(crate) async fn pause(&self, id: &ProcessId, pause: bool) -> Result<(), AgentError> {
        let what = if pause { "pause" } else { "unpause" };
        let path = format!("/v1/containers/{id}/{what}");
        self.call(Method::POST, &path, Bytes::new(), CALL_TIME).await.map(drop)
    }

    /// Changes those limits of a running container that are set.
    pub(crate) async fn change_limits(&self, id: &ProcessId, limits: &Resources) -> Result<(), AgentError> {
        self.post_only(&format!("/v1/containers/{id}/resources"), limits).await
    }

    /// What a running container has used so far.
    pub(crate) async fn stats(&self, id: &ProcessId) -> Result<Stats, AgentError> {
        self.get(&format!("/v1/containers/{id}/stats")).await
    }

    /// The processes of a running container.
    pub(crate) async fn processes(&self, id: &ProcessId) -> Result<Processes, AgentError> {
        self.get(&format!("/v1/containers/{id}/processes")).await
    }

    pub(crate) async fn remove_container(&self, id: &ProcessId) -> Result<(), AgentError> {
        self.delete(&format!("/v1/containers/{id}")).await
    }

    /// Removes the writable layers and the volumes that are not named.
    pub(crate) async fn retain(&self, retain: &Retain) -> Result<(), AgentError> {
        self.post_only("/v1/containers/retain", retain).await
    }

    /// The volumes that there are, with the space that each takes. Measuring walks over all files.
    pub(crate) async fn volumes(&self) -> Result<Vec<VolumeUsage>, AgentError> {
        let path = "/v1/volumes";
        let answer = self.call(Method::GET, path, Bytes::new(), START_TIME).await?;
        parse(path, &answer)
    }

    pub(crate) async fn remove_volume(&self, id: &VolumeId) -> Result<(), AgentError> {
        self.delete(&format!("/v1/volumes/{id}")).await
    }

    /// Connects a running container to a network.
    pub(crate) async fn connect(&self, id: &ProcessId, endpoint: &Endpoint) -> Result<(), AgentError> {
        self.post_only(&format!("/v1/containers/{id}/endpoints"), endpoint).await
    }

    /// Changes what a running container is called on a network.
    pub(crate) async fn rename_on(
        &self,
        id: &ProcessId,
        network: &NetworkId,
        names: &[String],
    ) -> Result<(), AgentError> {
        self.post_only(&format!("/v1/containers/{id}/endpoints/{network}/names"), &names).await
    }

    /// Takes a running container off a network.
    pub(crate) async fn disconnect(&self, id: &ProcessId, network: &NetworkId) -> Result<(), AgentError> {
        self.delete(&format!("/v1/containers/{id}/endpoints/{network}")).await
    }

    /// Changes which networks lead out of a running container.
    pub(crate) async fn lead_out(&self, id: &ProcessId, ways: &[WayOut]) -> Result<(), AgentError> {
        self.post_only(&format!("/v1/containers/{id}/ways-out"), &ways).await
    }

    /// Removes a network's bridge.
    pub(crate) async fn remove_network(&self, network: &NetworkId) -> Result<(), AgentError> {
        self.delete(&format!("/v1/networks/{network}")).await
    }

    pub(crate) async fn remove_layer(&self, diff_id: &DiffId) -> Result<(), AgentError> {
        self.delete(&format!("/v1/layers/{diff_id}")).await
    }

    pub(crate) async fn exec(&self, id: &ProcessId, spec: &ExecSpec) -> Result<Started, AgentError> {
        self.post(&format!("/v1/execs/{id}"), spec, START_TIME).await
    }

    pub(crate) async fn signal(&self, id: &ProcessId, signal: u8) -> Result<(), AgentError> {
        self.post_only(&format!("/v1/processes/{id}/signal"), &Signal { signal }).await
    }

    pub(crate) async fn resize(&self, id: &ProcessId, size: TerminalSize) -> Result<(), AgentError> {
        self.post_only(&format!("/v1/processes/{id}/resize"), &size).await
    }

    pub(crate) async fn forget(&self, id: &ProcessId) -> Result<(), AgentError> {
        self.delete(&format!("/v1/processes/{id}")).await
    }

    /// The frames of a process after a sequence number.
    pub(crate) async fn output(&self, id: &ProcessId, after: u64) -> Result<OutputStream, AgentError> {
        let (stream, buffered) =
            self.upgrade(&format!("/v1/processes/{id}/output?after={after}"), OUTPUT_PROTOCOL).await?;
        Ok(OutputStream::new(stream, buffered, after))
    }

    /// Begins work on a container's files.
    pub(crate) async fn files(
        &self,
        id: &ProcessId,
        request: &FilesRequest,
    ) -> Result<(FilesAnswer, FilesInput), AgentError> {
        let path = format!("/v1/containers/{id}/files");
        let (stream, buffered) =
            self.upgrade_with(Method::POST, &path, encode(request), FILES_PROTOCOL, FILES_TIME).await?;
        Ok(files::split(stream, buffered))
    }

    /// The connection over which the agent asks for what is outside, and what came over it already.
    pub(crate) async fn egress(&self) -> Result<(UnixStream, Bytes), AgentError> {
        self.upgrade("/v1/egress", EGRESS_PROTOCOL).await
    }

    /// The conversation about published ports, and what came over it already.
    pub(crate) async fn ports(&self) -> Result<(UnixStream, Bytes), AgentError> {
        self.upgrade("/v1/ports", PORTS_PROTOCOL).await
    }

    /// The conversation about datagrams to published ports, and what came over it already.
    pub(crate) async fn datagrams(&self) -> Result<(UnixStream, Bytes), AgentError> {
        self.upgrade("/v1/datagrams", DATAGRAMS_PROTOCOL).await
    }

    /// A way to a process's standard input.
    pub(crate) async fn stdin(&self, id: &ProcessId) -> Result<UnixStream, AgentError> {
        let (stream, _) = self.upgrade(&format!("/v1/processes/{id}/stdin"), STDIN_PROTOCOL).await?;
        Ok(stream)
    }

    /// Ends a process's standard input.
    pub(crate) async fn close_stdin(&self, id: &ProcessId) -> Result<(), AgentError> {
        self.delete(&format!("/v1/processes/{id}/stdin")).await
    }

    /// The guest kernel's log; endless if it is followed.
    pub(crate) async fn kmsg(&self, follow: bool) -> Result<Incoming, AgentError> {
        let path = if follow { "/v1/kmsg" } else { "/v1/kmsg?follow=0" };
        let answer = self.within(CALL_TIME, path, self.send(Method::GET, path, Bytes::new(), None)).await?;
        if answer.status().is_success() { Ok(answer.into_body()) } else { Err(refused(path, answer).await) }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, AgentError> {
        let answer = self.call(Method::GET, path, Bytes::new(), CALL_TIME).await?;
        parse(path, &answer)
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        time: Duration,
    ) -> Result<T, AgentError> {
        let answer = self.call(Method::POST, path, encode(body), time).await?;
        parse(path, &answer)
    }

    async fn post_only(&self, path: &str, body: &impl Serialize) -> Result<(), AgentError> {
        self.call(Method::POST, path, encode(body), CALL_TIME).await.map(drop)
    }

    async fn delete(&self, path: &str) -> Result<(), AgentError> {
        self.call(Method::DELETE, path, Bytes::new(), CALL_TIME).await.map(drop)
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        time: Duration,
    ) -> Result<Bytes, AgentError> {
        let exchange = async {
            let answer = self.send(method, path, body, None).await?;
            if answer.status().is_success() {
                collect(path, answer.into_body()).await
            } else {
                Err(refused(path, answer).await)
            }
        };
        self.within(time, path, exchange).await
    }

    /// The connection after the switch, and what came with the answer already.
    async fn upgrade(&self, path: &str, protocol: &'static str) -> Result<(UnixStream, Bytes), AgentError> {
        self.upgrade_with(Method::GET, path, Bytes::new(), protocol, CALL_TIME).await
    }

    async fn upgrade_with(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        protocol: &'static str,
        time: Duration,
    ) -> Result<(UnixStream, Bytes), AgentError> {
        let exchange = async {
            let answer = self.send(method, path, body, Some(protocol)).await?;
            if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                return Err(refused(path, answer).await);
            }
            let upgraded = hyper::upgrade::on(answer).await?;
            let parts = upgraded.downcast::<TokioIo<UnixStream>>();
            let parts = parts.map_err(|_| nonsense(path, "it did not come over the sandbox's connection"))?;
            Ok((parts.io.into_inner(), parts.read_buf))
        };
        self.within(time, path, exchange).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        protocol: Option<&'static str>,
    ) -> Result<Response<Incoming>, AgentError> {
        let stream = self.sandbox.connect().await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the last use of the answer.
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "agent");
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(protocol) = protocol {
            request = request.header(header::CONNECTION, "Upgrade").header(header::UPGRADE, protocol);
        }
        let request = request.body(Full::new(body)).map_err(|error| nonsense(path, error))?;
        Ok(sender.send_request(request).await?)
    }

    async fn within<T>(
        &self,
        time: Duration,
        path: &str,
        exchange: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, AgentError> {
        match tokio::time::timeout(time, exchange).await {
            Ok(result) => result,
            Err(_) => Err(AgentError::Timeout(path.to_owned())),
        }
    }
}

fn encode(body: &impl Serialize) -> Bytes {
    serde_json::to_vec(body).expect("the API's types have no map with odd keys").into()
}

fn nonsense(path: &str, reason: impl std::fmt::Display) -> AgentError {
    AgentError::Nonsense { path: path.to_owned(), reason: reason.to_string() }
}

fn parse<T: DeserializeOwned>(path: &str, answer: &[u8]) -> Result<T, AgentError> {
    serde_json::from_slice(answer).map_err(|error| nonsense(path, error))
}

async fn collect(path: &str, body: Incoming) -> Result<Bytes, AgentError> {
    let collected = Limited::new(body, MAX_ANSWER).collect().await.map_err(|error| nonsense(path, error))?;
    Ok(collected.to_bytes())
}

async fn refused(path: &str, answer: Response<Incoming>) -> AgentError {
    let status = answer.status();
    match collect(path, answer.into_body()).await {
        Ok(body) => match serde_json::from_slice(&body) {
            Ok(error) => AgentError::Refused(error),
            Err(error) => nonsense(path, format!("status {status}, {error}")),
        },
        Err(error) => error,
    }
}
