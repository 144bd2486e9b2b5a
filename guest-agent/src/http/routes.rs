//! Which call does what.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use coracle_agent_api::datagrams::DATAGRAMS_PROTOCOL;
use coracle_agent_api::egress::EGRESS_PROTOCOL;
use coracle_agent_api::files::FILES_PROTOCOL;
use coracle_agent_api::ports::PORTS_PROTOCOL;
use coracle_agent_api::{ApiError, ErrorKind, OUTPUT_PROTOCOL, ProcessId, STDIN_PROTOCOL};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;

use super::{Body, failure, json, kmsg, nothing, streams};
use crate::agent::Agent;
use crate::clock;
use crate::error::{Result, conflict, invalid, not_found};

const MAX_BODY: usize = 1024 * 1024;

/// Answers any request.
pub(super) async fn answer(
    agent: Arc<Agent>,
    request: Request<Incoming>,
    shutdown: &AtomicBool,
) -> Response<Body> {
    match route(agent, request, shutdown).await {
        Ok(response) => response,
        Err(error) => failure(&error),
    }
}

async fn route(
    agent: Arc<Agent>,
    request: Request<Incoming>,
    shutdown: &AtomicBool,
) -> Result<Response<Body>> {
    let since = clock::monotonic_nanos();
    let path = request.uri().path().to_owned();
    let Some(path) = path.strip_prefix("/v1/") else { return Err(no_route(&request)) };
    let segments: Vec<&str> = path.split('/').collect();
    let done = || nothing(StatusCode::NO_CONTENT);
    match (request.method(), segments.as_slice()) {
        (&Method::GET, ["state"]) => Ok(json(&agent.state())),
        (&Method::POST, ["containers", "retain"]) => {
            agent.retain(&body(request).await?).await?;
            Ok(done())
        }
        (&Method::POST, ["containers", id, "start"]) => {
            let (id, spec) = (parse(id)?, body(request).await?);
            detached(async move { agent.start_container(id, spec, since).await })
                .await
                .map(|started| json(&started))
        }
        (&Method::POST, ["containers", id, what @ ("pause" | "unpause")]) => {
            let (id, pause) = (parse(id)?, *what == "pause");
            detached(async move { agent.pause(&id, pause).await }).await?;
            Ok(done())
        }
        (&Method::POST, ["containers", id, "resources"]) => {
            let (id, resources) = (parse(id)?, body(request).await?);
            detached(async move { agent.change_limits(&id, resources).await }).await?;
            Ok(done())
        }
        (&Method::GET, ["containers", id, "stats"]) => Ok(json(&agent.stats(&parse(id)?).await?)),
        (&Method::GET, ["containers", id, "processes"]) => Ok(json(&agent.processes_of(&parse(id)?).await?)),
        (&Method::POST, ["containers", id, "files"]) => {
            let id = parse(id)?;
            work_on_files(agent, id, request).await
        }
        (&Method::POST, ["containers", id, "endpoints"]) => {
            let (id, endpoint) = (parse(id)?, body(request).await?);
            detached(async move { agent.connect(&id, endpoint).await }).await?;
            Ok(done())
        }
        (&Method::POST, ["containers", id, "endpoints", network, "names"]) => {
            let (id, network) = (parse(id)?, parse(network)?);
            let names: Vec<String> = body(request).await?;
            agent.rename_on(&id, &network, &names)?;
            Ok(done())
        }
        (&Method::DELETE, ["containers", id, "endpoints", network]) => {
            let (id, network) = (parse(id)?, parse(network)?);
            detached(async move { agent.disconnect(&id, network).await }).await?;
            Ok(done())
        }
        (&Method::POST, ["containers", id, "ways-out"]) => {
            let (id, ways) = (parse(id)?, body(request).await?);
            detached(async move { agent.lead_out(&id, ways).await }).await?;
            Ok(done())
        }
        (&Method::DELETE, ["networks", id]) => {
            agent.remove_network(parse(id)?).await?;
            Ok(done())
        }
        (&Method::DELETE, ["containers", id]) => {
            let id = parse(id)?;
            detached(async move { agent.remove_container(&id).await }).await?;
            Ok(done())
        }
        (&Method::GET, ["volumes"]) => agent.volumes().await.map(|volumes| json(&volumes)),
        (&Method::DELETE, ["volumes", id]) => {
            let id = parse(id)?;
            detached(async move { agent.remove_volume(&id).await }).await?;
            Ok(done())
        }
        (&Method::DELETE, ["layers", id]) => {
            agent.release_layer(parse(id)?).await?;
            Ok(done())
        }
        (&Method::POST, ["execs", id]) => {
            let (id, spec) = (parse(id)?, body(request).await?);
            detached(async move { agent.start_exec(id, spec, since).await })
                .await
                .map(|started| json(&started))
        }
        (&Method::GET, ["processes", id, "output"]) => {
            let process = agent.process(&parse(id)?)?;
            let after = after(request.uri().query())?;
            if after > process.spool.newest() {
                return Err(invalid(format!("the process has no frame {after} yet")));
            }
            upgrade(agent, request, OUTPUT_PROTOCOL, move |io| streams::output(process, after, io))
        }
        (&Method::GET, ["processes", id, "stdin"]) => {
            let process = agent.process(&parse(id)?)?;
            if process.stdin.is_none() {
                return Err(conflict("the process was started without standard input"));
            }
            upgrade(agent, request, STDIN_PROTOCOL, move |io| streams::stdin(process, io))
        }
        (&Method::DELETE, ["processes", id, "stdin"]) => {
            let process = agent.process(&parse(id)?)?;
            let Some(stdin) = &process.stdin else {
                return Err(conflict("the process was started without standard input"));
            };
            stdin.end().await;
            Ok(done())
        }
        (&Method::POST, ["processes", id, "signal"]) => {
            let signal: coracle_agent_api::Signal = body(request).await?;
            agent.process(&parse(id)?)?.signal(signal.signal)?;
            Ok(done())
        }
        (&Method::POST, ["processes", id, "resize"]) => {
            let size = body(request).await?;
            agent.process(&parse(id)?)?.resize(size)?;
            Ok(done())
        }
        (&Method::DELETE, ["processes", id]) => {
            agent.forget(&parse(id)?)?;
            Ok(done())
        }
        (&Method::GET, ["ports"]) => {
            let served = agent.clone();
            upgrade(agent, request, PORTS_PROTOCOL, |io| served.serve_ports(io))
        }
        (&Method::GET, ["datagrams"]) => {
            let served = agent.clone();
            upgrade(agent, request, DATAGRAMS_PROTOCOL, |io| served.serve_datagrams(io))
        }
        (&Method::GET, ["egress"]) => {
            let egress = agent.egress();
            upgrade(agent, request, EGRESS_PROTOCOL, |io| async move { egress.serve(io).await })
        }
        (&Method::GET, ["kmsg"]) => kmsg::read(request.uri().query() != Some("follow=0")),
        (&Method::POST, ["shutdown"]) => {
            shutdown.store(true, Ordering::Relaxed);
            let mut response = done();
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            Ok(response)
        }
        _ => Err(no_route(&request)),
    }
}

fn no_route<T>(request: &Request<T>) -> ApiError {
    not_found(format!("there is no {} {}", request.method(), request.uri().path()))
}

/// Runs to its end also when the client goes away: half a start is no state.
async fn detached<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::new(ErrorKind::Internal, format!("the request failed: {error}"))),
    }
}

fn parse<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T> {
    text.parse().map_err(|error| invalid(format!("{error}")))
}

async fn body<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T> {
    let bytes = match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            return Err(invalid(format!("the body is longer than {MAX_BODY} bytes")));
        }
        Err(error) => return Err(invalid(format!("the body cannot be read: {error}"))),
    };
    serde_json::from_slice(&bytes).map_err(|error| invalid(format!("the body is malformed: {error}")))
}

fn after(query: Option<&str>) -> Result<u64> {
    let mut after = 0;
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("after", number)) => after = parse(number)?,
            _ => return Err(invalid(format!("unknown query parameter `{pair}`"))),
        }
    }
    Ok(after)
}

async fn work_on_files(
    agent: Arc<Agent>,
    id: ProcessId,
    mut request: Request<Incoming>,
) -> Result<Response<Body>> {
    check_upgrade(&request, FILES_PROTOCOL)?;
    let upgraded = hyper::upgrade::on(&mut request);
    let work = body(request).await?;
    // A helper that was started is also ended.
    let starter = agent.clone();
    let session = detached(async move { starter.work_on_files(id, work).await }).await?;
    Ok(switch(agent, upgraded, FILES_PROTOCOL, move |io| session.carry(io)))
}

fn check_upgrade(request: &Request<Incoming>, protocol: &str) -> Result<()> {
    match request.headers().get(header::UPGRADE).is_some_and(|value| value == protocol) {
        true => Ok(()),
        false => Err(invalid(format!("the request must ask for an upgrade to {protocol}"))),
    }
}

/// Answers 101 and hands the connection over.
fn upgrade<F: Future<Output = ()> + Send + 'static>(
    agent: Arc<Agent>,
    request: Request<Incoming>,
    protocol: &'static str,
    handle: impl FnOnce(hyper_util::rt::TokioIo<hyper::upgrade::Upgraded>) -> F + Send + 'static,
) -> Result<Response<Body>> {
    check_upgrade(&request, protocol)?;
    Ok(switch(agent, hyper::upgrade::on(request), protocol, handle))
}

fn switch<F: Future<Output = ()> + Send + 'static>(
    agent: Arc<Agent>,
    upgraded: hyper::upgrade::OnUpgrade,
    protocol: &'static str,
    handle: impl FnOnce(hyper_util::rt::TokioIo<hyper::upgrade::Upgraded>) -> F + Send + 'static,
) -> Response<Body> {
    tokio::spawn(async move {
        match upgraded.await {
            Ok(upgraded) => handle(hyper_util::rt::TokioIo::new(upgraded)).await,
            Err(error) => tracing::debug!("an upgrade failed: {error}"),
        }
        agent.descriptors().were_freed();
    });
    let mut response = nothing(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(protocol));
    response
}
