//! Connections to registries: directly, or through a proxy, by a tunnel for TLS and by whole URLs without.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

use super::error::Source;
use super::settings::is_loopback;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Connects by what the proxies' settings say.
#[derive(Debug, Clone)]
pub(super) struct Connector {
    direct: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Connector {
    pub(super) fn new(proxies: Arc<Matcher>) -> Self {
        let mut direct = HttpConnector::new();
        direct.enforce_http(false);
        direct.set_nodelay(true);
        direct.set_connect_timeout(Some(CONNECT_TIMEOUT));
        direct.set_keepalive(Some(CONNECT_TIMEOUT));
        Self { direct, proxies }
    }

    /// What a request in plain HTTP must say to the proxy that it goes through.
    pub(super) fn plain_proxy_authorization(&self, to: &Uri) -> Option<HeaderValue> {
        let is_plain = to.scheme_str() == Some("http");
        is_plain.then(|| proxy_for(&self.proxies, to)).flatten()?.basic_auth().cloned()
    }
}

fn proxy_for(proxies: &Matcher, to: &Uri) -> Option<Intercept> {
    if to.host().is_none_or(is_loopback) {
        return None;
    }
    proxies.intercept(to)
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = Source;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, Source>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Source>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let mut direct = self.direct.clone();
        let proxy = proxy_for(&self.proxies, &to);
        Box::pin(async move {
            let Some(proxy) = proxy else {
                return Ok(Stream { io: direct.call(to).await?, takes_whole_urls: false });
            };
            let scheme = proxy.uri().scheme_str().unwrap_or("http");
            if scheme != "http" {
                let host = proxy.uri().host().unwrap_or_default();
                return Err(format!(
                    "the proxy {host} is of the kind `{scheme}`, which is not supported: only `http` proxies are"
                )
                .into());
            }
            if to.scheme_str() == Some("http") {
                return Ok(Stream { io: direct.call(proxy.uri().clone()).await?, takes_whole_urls: true });
            }
            let mut tunnel = Tunnel::new(proxy.uri().clone(), direct);
            if let Some(authorization) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(authorization.clone());
            }
            Ok(Stream { io: tunnel.call(to).await?, takes_whole_urls: false })
        })
    }
}

/// A connection to a registry or to a proxy.
#[derive(Debug)]
pub(super) struct Stream {
    io: TokioIo<TcpStream>,
    /// It is a proxy that wants to be told the whole URL.
    takes_whole_urls: bool,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new().proxy(self.takes_whole_urls)
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, bytes)
    }
}
