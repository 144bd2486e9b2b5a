//! Accepts connections and serves them until the engine ends.
//!
//! Every client of the socket may do everything, as with Docker's; the socket's permissions are the caller's matter. A container that was
//! given the socket may do what a client may, but for what is said of [`Request::asker`]. A client that is slow, or gone, costs its own
//! connection and nothing else.

use std::{
    convert::Infallible,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderValue, Method, header::HeaderName};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use percent_encoding::percent_decode_str;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use super::{Request, Response, body, incoming::RequestBody, query::Query, router, version};
use crate::{
    container::Container,
    core::Core,
    error::{Error, Result},
};

/// How long requests may go on after the end was asked for.
const GRACE: Duration = Duration::from_millis(500);
/// A connection must send its request's head within this.
const HEAD_TIME: Duration = Duration::from_secs(300);

/// Serves until `end` is cancelled, then lets running requests end.
pub(crate) async fn serve(core: &Arc<Core>, listener: UnixListener, end: &CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = end.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (core_of_it, end) = (Arc::clone(core), end.clone());
                core.tasks.spawn(async move {
                    let descriptors = Arc::clone(&core_of_it.descriptors);
                    serve_connection(core_of_it, stream, end, None).await;
                    descriptors.were_freed();
                });
            }
            Err(error) => tokio::select! {
                () = end.cancelled() => break,
                () = core.descriptors.after(&error, "the API's socket") => {}
            },
        }
    }
}

/// Serves a connection; `asker` is the container that it comes from.
pub(crate) async fn serve_connection(
    core: Arc<Core>,
    stream: UnixStream,
    end: CancellationToken,
    asker: Option<Arc<Container>>,
) {
    let service = service_fn(|request| {
        let (core, asker) = (Arc::clone(&core), asker.clone());
        async move { Ok::<_, Infallible>(answer(core, request, asker).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME);
    let connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = end.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(GRACE, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = result {
        tracing::trace!(%error, "a connection ended early");
    }
}

async fn answer(
    core: Arc<Core>,
    request: http::Request<Incoming>,
    asker: Option<Arc<Container>>,
) -> Response {
    let head = request.method() == Method::HEAD;
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let server = format!("Coracle/{} (linux)", core.config.version);
    let (request, rest) = {
        let (parts, incoming) = request.into_parts();
        let (body, rest) = RequestBody::new(incoming);
        (http::Request::from_parts(parts, body), rest)
    };
    // Whoever waits to be asked for the body needs no one to read it.
    let waits = request.headers().contains_key(http::header::EXPECT);
    let mut response = match dispatch(core, request, asker).await {
        Ok(response) => response,
        Err(error) => {
            if !waits {
                rest.skip().await;
            }
            tracing::debug!(%method, path, status = error.status().as_u16(), %error, "refused");
            body::error(error.status(), &error)
        }
    };
    if head {
        *response.body_mut() = body::empty(response.status()).into_body();
    }
    for (name, value) in [
        ("api-version", version::NEWEST.to_string()),
        ("docker-experimental", "false".to_owned()),
        ("ostype", "linux".to_owned()),
        ("server", server),
    ] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
    response
}

async fn dispatch(
    core: Arc<Core>,
    mut request: http::Request<RequestBody>,
    asker: Option<Arc<Container>>,
) -> Result<Response> {
    let received = Instant::now();
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, incoming) = request.into_parts();
    let decode = |segment: &str| {
        let text = percent_decode_str(segment).decode_utf8();
        text.map(String::from).map_err(|_| Error::invalid("the path is not UTF-8"))
    };
    let path = parts.uri.path().trim_start_matches('/');
    let mut segments = path.split('/').map(decode).collect::<Result<Vec<_>>>()?;
    let version = match segments.first().and_then(|first| version::parse(first)) {
        Some(version) => {
            segments.remove(0);
            version::check(version)?
        }
        None => version::NEWEST,
    };
    let query = Query::parse(parts.uri.query().unwrap_or_default())?;
    let request = Request {
        core,
        method: parts.method,
        segments,
        query,
        version,
        headers: parts.headers,
        body: incoming,
        upgrade: Some(upgrade),
        received,
        asker,
    };
    router::route(request).await
}
