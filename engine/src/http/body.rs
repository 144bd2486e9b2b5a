//! Bodies of answers: JSON, text, and streams that go on for as long as something feeds them.

use std::{fmt::Display, io};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde::Serialize;
use tokio::sync::mpsc;

use super::Response;

/// Any body. One that fails breaks the connection off, so that its client does not take what came for the whole.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// How many pieces of a stream wait for the client.
const QUEUE: usize = 16;

pub(crate) fn empty(status: StatusCode) -> Response {
    respond(status, None, Empty::new().map_err(|never| match never {}).boxed_unsync())
}

pub(crate) fn json(status: StatusCode, value: &impl Serialize) -> Response {
    let text = serde_json::to_vec(value).expect("answers have no map with odd keys");
    respond(status, Some("application/json"), whole(text.into()))
}

pub(crate) fn ok(value: &impl Serialize) -> Response {
    json(StatusCode::OK, value)
}

pub(crate) fn text(text: &str) -> Response {
    respond(StatusCode::OK, Some("text/plain; charset=utf-8"), whole(text.to_owned().into()))
}

/// Docker's form of an error.
pub(crate) fn error(status: StatusCode, message: &impl Display) -> Response {
    if status == StatusCode::NOT_MODIFIED {
        return empty(status);
    }
    json(status, &serde_json::json!({ "message": message.to_string() }))
}

/// A stream, and what feeds it. The head goes out at once.
pub(crate) fn stream(content_type: &'static str) -> (mpsc::Sender<Bytes>, Response) {
    let (feed, mut pieces) = mpsc::channel::<Bytes>(QUEUE);
    let pieces = futures_util::stream::poll_fn(move |context| pieces.poll_recv(context));
    let body = StreamBody::new(pieces.map(|bytes| Ok(Frame::data(bytes))));
    (feed, respond(StatusCode::OK, Some(content_type), body.boxed_unsync()))
}

/// A stream that may fail before its end, and what feeds it.
pub(crate) fn fallible_stream(content_type: &'static str) -> (mpsc::Sender<io::Result<Bytes>>, Response) {
    let (feed, mut pieces) = mpsc::channel(QUEUE);
    let pieces = futures_util::stream::poll_fn(move |context| pieces.poll_recv(context));
    let body = StreamBody::new(pieces.map(|piece: io::Result<Bytes>| piece.map(Frame::data)));
    (feed, respond(StatusCode::OK, Some(content_type), body.boxed_unsync()))
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// One JSON value on a line of its own.
pub(crate) fn json_line(value: &impl Serialize) -> Bytes {
    let mut line = serde_json::to_vec(value).expect("answers have no map with odd keys");
    line.extend_from_slice(b"\r\n");
    line.into()
}

fn respond(status: StatusCode, content_type: Option<&'static str>, body: Body) -> Response {
    let mut response = http::Response::new(body);
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    response
}
