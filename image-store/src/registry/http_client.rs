//! Requests to one registry and to where it leads. Authorization goes to the host that it was made for and to no other;
//! nothing leads from TLS to plain HTTP unless the registry was marked insecure; no body is read without a bound, and none
//! is waited for without one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::de::DeserializeOwned;
use url::Url;

use super::connect::Connector;
use super::error::{Refusal, RegistryError};
use super::settings::{Endpoint, RegistrySettings, Retries};
use super::tls::{Certificates, TlsConfigs};

const MAX_REDIRECTS: usize = 10;
/// What is read of an answer that only says what went wrong.
const MAX_ERROR: usize = 64 << 10;
const MAX_HEADERS: usize = 64 << 10;

/// A body to send.
pub(super) type Body = UnsyncBoxBody<Bytes, std::io::Error>;
type Hyper = Client<HttpsConnector<Connector>, Body>;

/// What to ask for.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// Made anew each time that it is sent.
    pub(super) body: Option<&'a (dyn Fn() -> Body + Send + Sync)>,
}

impl Call<'_> {
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self { method, url, headers: HeaderMap::new(), body: None }
    }
}

/// Makes requests to one registry.
#[derive(Debug)]
pub(super) struct HttpClient {
    /// The registry's root.
    pub(super) base: Url,
    pub(super) is_insecure: bool,
    pub(super) retries: Retries,
    own: Hyper,
    others: Hyper,
    connector: Connector,
    user_agent: HeaderValue,
}

impl HttpClient {
    pub(super) fn new(settings: &RegistrySettings, endpoint: &Endpoint) -> Result<Self, RegistryError> {
        let domain = authority(&endpoint.base);
        let certificates = Certificates::read(&settings.certificate_folders, &domain)?;
        let tls = TlsConfigs::new(certificates, endpoint.is_insecure)?;
        let connector = Connector::new(Arc::new(settings.proxies.matcher()));
        let client = |tls| {
            let https = HttpsConnectorBuilder::new()
                .with_tls_config(tls)
                .https_or_http()
                .enable_http1()
                .wrap_connector(connector.clone());
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(Duration::from_secs(30))
                .http1_max_buf_size(MAX_HEADERS)
                .build(https)
        };
        let user_agent = HeaderValue::from_str(&settings.user_agent)
            .map_err(|_| RegistryError::Settings("the user agent is no header's value".to_owned()))?;
        Ok(Self {
            base: endpoint.base.clone(),
            is_insecure: endpoint.is_insecure,
            retries: settings.retries,
            own: client(tls.own),
            others: client(tls.others),
            connector,
            user_agent,
        })
    }

    pub(super) fn host(&self) -> String {
        authority(&self.base)
    }

    /// Sends a request and follows where it leads, if it only reads. `authorization` is for the request's own host.
    pub(super) async fn send(
        &self,
        call: &Call<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Incoming>, RegistryError> {
        let mut url = call.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let authorization = authorization.filter(|_| same_origin(&url, &call.url));
            let response = self.send_once(call, &url, authorization).await?;
            let may_follow = matches!(call.method, Method::GET | Method::HEAD);
            if !may_follow || !response.status().is_redirection() {
                return Ok(response);
            }
            let Some(location) = response.headers().get(header::LOCATION) else { return Ok(response) };
            url = self.resolve(&url, location)?;
        }
        Err(RegistryError::protocol(&self.host(), "it redirects without end"))
    }

    /// Where a `Location` leads from `url`.
    pub(super) fn resolve(&self, url: &Url, location: &HeaderValue) -> Result<Url, RegistryError> {
        let refused = |reason: &str| RegistryError::protocol(&self.host(), reason);
        let text = location.to_str().map_err(|_| refused("it redirects to what is no URL"))?;
        let mut next = url.join(text).map_err(|_| refused("it redirects to what is no URL"))?;
        next.set_fragment(None);
        self.check(&next)?;
        Ok(next)
    }

    /// Refuses URLs that must not be asked, given what is known of the registry.
    pub(super) fn check(&self, url: &Url) -> Result<(), RegistryError> {
        let refused = |reason: &str| Err(RegistryError::protocol(&self.host(), reason));
        match url.scheme() {
            "https" => {}
            "http" if self.is_insecure => {}
            "http" => return refused("it leads to plain HTTP"),
            _ => return refused("it leads to what is no web server"),
        }
        if !url.username().is_empty() || url.password().is_some() || url.host_str().is_none() {
            return refused("it leads to a URL with a user name or without a host");
        }
        Ok(())
    }

    async fn send_once(
        &self,
        call: &Call<'_>,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Incoming>, RegistryError> {
        let empty = || Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync();
        let mut request = Request::new(call.body.map_or_else(empty, |body| body()));
        *request.method_mut() = call.method.clone();
        *request.uri_mut() = url
            .as_str()
            .parse()
            .map_err(|_| RegistryError::protocol(&self.host(), "it leads to what is no URL"))?;
        *request.headers_mut() = call.headers.clone();
        request.headers_mut().insert(header::USER_AGENT, self.user_agent.clone());
        if let Some(value) = authorization {
            let mut value = value.clone();
            value.set_sensitive(true);
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        if let Some(value) = self.connector.plain_proxy_authorization(request.uri()) {
            request.headers_mut().insert(header::PROXY_AUTHORIZATION, value);
        }
        let client = if same_origin(url, &self.base) { &self.own } else { &self.others };
        // A body may take as long as it takes to send.
        let sending = client.request(request);
        let answered = match call.body {
            Some(_) => sending.await,
            None => tokio::time::timeout(self.retries.idle, sending).await.map_err(|_| self.stalled(url))?,
        };
        answered.map_err(|source| transport(url, source))
    }

    fn stalled(&self, url: &Url) -> RegistryError {
        RegistryError::Stalled { url: shown(url), seconds: self.retries.idle.as_secs() }
    }

    /// The next piece of a body; `None` at its end.
    pub(super) async fn next_piece(
        &self,
        url: &Url,
        body: &mut Incoming,
    ) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let next = tokio::time::timeout(self.retries.idle, body.frame());
            match next.await.map_err(|_| self.stalled(url))? {
                None => return Ok(None),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => return Ok(Some(data)),
                    Err(_trailers) => {}
                },
                Some(Err(source)) => return Err(transport(url, source)),
            }
        }
    }

    /// A whole body of at most `limit` bytes.
    pub(super) async fn read(
        &self,
        url: &Url,
        response: Response<Incoming>,
        what: &'static str,
        limit: usize,
    ) -> Result<Bytes, RegistryError> {
        let mut body = response.into_body();
        let mut bytes = BytesMut::new();
        while let Some(piece) = self.next_piece(url, &mut body).await? {
            if bytes.len() + piece.len() > limit {
                return Err(RegistryError::TooLarge { what, limit });
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    /// A whole body as JSON.
    pub(super) async fn read_json<T: DeserializeOwned>(
        &self,
        url: &Url,
        response: Response<Incoming>,
        what: &'static str,
        limit: usize,
    ) -> Result<T, RegistryError> {
        let bytes = self.read(url, response, what, limit).await?;
        serde_json::from_slice(&bytes).map_err(|source| RegistryError::Json { what, source })
    }

    /// What an answer says that is not the wanted one.
    pub(super) async fn refusal(&self, url: &Url, response: Response<Incoming>) -> Refusal {
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let body = self.read(url, response, "an error", MAX_ERROR).await.unwrap_or_default();
        Refusal { retry_after, ..Refusal::parse(status, &body) }
    }

    /// Waits as long as an answer or the number of failures demands; false: there is no use in waiting.
    pub(super) async fn wait(&self, failures: u32, retry_after: Option<Duration>) -> bool {
        match self.wait_time(failures, retry_after) {
            Some(delay) => {
                tokio::time::sleep(delay).await;
                true
            }
            None => false,
        }
    }

    /// How long to wait before the next attempt; `None`: not at all.
    pub(super) fn wait_time(&self, failures: u32, retry_after: Option<Duration>) -> Option<Duration> {
        if failures >= self.retries.attempts {
            return None;
        }
        match retry_after {
            Some(delay) if delay > self.retries.max_delay => None,
            Some(delay) => Some(delay),
            None => Some(self.retries.delay_after(failures)),
        }
    }
}

/// Whether the same request may be answered better a little later.
pub(super) fn is_transient(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::INTERNAL_SERVER_ERROR
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
            | StatusCode::REQUEST_TIMEOUT
    )
}

/// `Retry-After`, in seconds or as a date.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    let now = jiff::Timestamp::try_from(SystemTime::now()).ok()?;
    Duration::try_from(date.duration_since(now)).ok()
}

pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    a.origin() == b.origin()
}

/// `host` or `host:port`, as references have it.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// A URL without what may be secret in its query.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.to_string()
}

fn transport(url: &Url, source: impl std::error::Error + Send + Sync + 'static) -> RegistryError {
    let mut texts = vec![source.to_string()];
    let mut next = std::error::Error::source(&source);
    while let Some(error) = next {
        texts.push(error.to_string());
        next = error.source();
    }
    if texts.iter().any(|text| text.contains("InvalidContentType")) {
        return RegistryError::Settings(format!(
            "the registry {} does not speak TLS; if it is right that it speaks plain HTTP, name it in the insecure registries",
            authority(url)
        ));
    }
    RegistryError::Transport { url: shown(url), source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let after = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, value.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("soon"), None);
        assert_eq!(after("-1"), None);
        assert!(after("Fri, 31 Dec 2100 23:59:59 GMT").unwrap() > Duration::from_secs(1 << 30));
        assert_eq!(after("Fri, 31 Dec 1999 23:59:59 GMT"), None);
    }

    #[test]
    fn queries_are_not_shown() {
        let url = Url::parse("https://cdn.example/blob?signature=secret").unwrap();
        assert_eq!(shown(&url), "https://cdn.example/blob");
    }
}
