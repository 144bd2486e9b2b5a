//! HTTP, as far as it is Docker's and not a matter of one endpoint: connections, versions, routes, bodies, hijacked streams.

pub(crate) mod body;
pub(crate) mod detach;
pub(crate) mod filters;
pub(crate) mod hijack;
pub(crate) mod incoming;
pub(crate) mod query;
mod router;
pub(crate) mod server;
mod unread;
pub(crate) mod version;

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Limited};
use hyper::upgrade::OnUpgrade;

use crate::{
    container::Container,
    core::Core,
    error::{Error, Result},
};
use incoming::RequestBody;
use query::Query;
use version::ApiVersion;

/// The largest JSON body that is read.
const MAX_JSON: usize = 4 * 1024 * 1024;

/// An answer.
pub(crate) type Response = http::Response<body::Body>;

/// A request, taken apart.
pub(crate) struct Request {
    pub(crate) core: Arc<Core>,
    pub(crate) method: Method,
    /// The path behind the version, decoded piece by piece.
    pub(crate) segments: Vec<String>,
    pub(crate) query: Query,
    pub(crate) version: ApiVersion,
    pub(crate) headers: HeaderMap,
    pub(crate) body: RequestBody,
    pub(crate) upgrade: Option<OnUpgrade>,
    pub(crate) received: Instant,
    /// The container that asks, by the socket that it was given; none if it is a client of the host's.
    pub(crate) asker: Option<Arc<Container>>,
}

impl Request {
    /// The whole body, if it is not too large.
    pub(crate) async fn read_body(&mut self) -> Result<Bytes> {
        let collected = Limited::new(&mut self.body, MAX_JSON).collect().await;
        let collected = collected.map_err(|error| {
            Error::invalid(format!("cannot read the body (at most {MAX_JSON} bytes): {error}"))
        })?;
        Ok(collected.to_bytes())
    }
}
