//! One user at one registry: the first look at it, tokens, and requests that are authorized as it wants. A token server
//! may lie: what it sends is bounded, and a registry that is never satisfied is asked twice and no more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use url::Url;

use super::challenge::Challenge;
use super::error::{Refusal, RegistryError, clip};
use super::http_client::{Body, Call, HttpClient, is_transient, retry_after};
use super::settings::{Endpoint, RegistrySettings};

const MAX_TOKEN_ANSWER: usize = 1 << 20;
/// A token that says nothing of its end is good for this long.
const TOKEN_LIFE: u64 = 60;
/// A token is not used when it is about to end.
const TOKEN_MARGIN: Duration = Duration::from_secs(5);
const CLIENT_ID: &str = "coracle";

/// Who someone is at a registry, as Docker's clients send it in `X-Registry-Auth`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Credentials {
    /// The user's name.
    pub username: String,
    /// The password or a token in its place.
    pub password: String,
    /// `user:password` in base64, of which old clients make the two.
    pub auth: String,
    /// The registry that they are for.
    pub serveraddress: String,
    /// A token that stands for both and gets further ones.
    pub identitytoken: String,
    /// A token for the registry itself.
    pub registrytoken: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

impl Credentials {
    /// From a header's value: JSON in base64 for URLs, with or without padding. Empty means none.
    pub fn from_header(value: &str) -> Result<Option<Self>, RegistryError> {
        let bad = |reason: &str| RegistryError::Settings(format!("the X-Registry-Auth header {reason}"));
        let value = value.trim();
        if value.is_empty() {
            return Ok(None);
        }
        let json = URL_SAFE
            .decode(value)
            .or_else(|_| base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(value))
            .or_else(|_| STANDARD.decode(value))
            .map_err(|_| bad("is not in base64"))?;
        let found: Option<Self> =
            serde_json::from_slice(&json).map_err(|_| bad("holds no credentials in JSON"))?;
        Ok(found.unwrap_or_default().completed())
    }

    /// With name and password from `auth` if they stand there; `None` if there is nothing.
    pub fn completed(mut self) -> Option<Self> {
        if self.username.is_empty()
            && let Ok(decoded) = STANDARD.decode(&self.auth)
            && let Ok(text) = String::from_utf8(decoded)
            && let Some((username, password)) = text.split_once(':')
        {
            self.username = username.to_owned();
            self.password = password.trim_end_matches('\0').to_owned();
        }
        let is_empty = [&self.username, &self.password, &self.identitytoken, &self.registrytoken]
            .iter()
            .all(|field| field.is_empty());
        (!is_empty).then_some(self)
    }

    fn basic(&self) -> Option<HeaderValue> {
        if self.username.is_empty() && self.password.is_empty() {
            return None;
        }
        let joined = STANDARD.encode(format!("{}:{}", self.username, self.password));
        HeaderValue::try_from(format!("Basic {joined}")).ok()
    }
}

/// What a registry wants.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Access {
    Open,
    Basic,
    Bearer { realm: Url, service: Option<String>, scope: Option<String> },
}

#[derive(Debug, Clone)]
struct Token {
    authorization: HeaderValue,
    until: Instant,
}

/// What a token server gives.
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    refresh_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

/// One user at one registry.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) http: HttpClient,
    pub(super) is_mirror: bool,
    credentials: Option<Credentials>,
    access: Mutex<Access>,
    /// By scopes. Locked while a token is fetched, so that it is fetched once.
    tokens: Mutex<HashMap<String, Token>>,
}

impl Session {
    /// Looks whether there is a registry behind `endpoint`, and what it wants.
    pub(super) async fn open(
        settings: &RegistrySettings,
        endpoint: &Endpoint,
        credentials: Option<&Credentials>,
    ) -> Result<Arc<Self>, RegistryError> {
        let http = HttpClient::new(settings, endpoint)?;
        let url = join(&http.base, "v2/")?;
        let call = Call::new(Method::GET, url.clone());
        let mut failures = 0;
        let access = loop {
            let response = http.send(&call, None).await?;
            match response.status() {
                StatusCode::OK => break Access::Open,
                StatusCode::UNAUTHORIZED => break access(&http, &Challenge::parse_all(response.headers()))?,
                status if is_transient(status) => {
                    failures += 1;
                    let after = retry_after(response.headers());
                    if !http.wait(failures, after).await {
                        return Err(RegistryError::Refused(http.refusal(&url, response).await));
                    }
                }
                StatusCode::NOT_FOUND => {
                    return Err(RegistryError::protocol(&http.host(), "there is no /v2/: it is no registry"));
                }
                _ => return Err(RegistryError::Refused(http.refusal(&url, response).await)),
            }
        };
        Ok(Arc::new(Self::with_access(http, endpoint, credentials, access)))
    }

    /// Without the first look, for what is no registry of the second version.
    pub(super) fn unopened(
        settings: &RegistrySettings,
        endpoint: &Endpoint,
        credentials: Option<&Credentials>,
    ) -> Result<Self, RegistryError> {
        let http = HttpClient::new(settings, endpoint)?;
        Ok(Self::with_access(http, endpoint, credentials, Access::Open))
    }

    fn with_access(
        http: HttpClient,
        endpoint: &Endpoint,
        credentials: Option<&Credentials>,
        access: Access,
    ) -> Self {
        Self {
            http,
            is_mirror: endpoint.is_mirror,
            credentials: credentials.filter(|_| !endpoint.is_mirror).cloned(),
            access: Mutex::new(access),
            tokens: Mutex::default(),
        }
    }

    /// A URL beneath `/v2/`.
    pub(super) fn url(&self, path: &str) -> Result<Url, RegistryError> {
        join(&self.http.base, &format!("v2/{path}"))
    }

    /// Sends a request with what the registry wants; once more with a new token if it does not like the first.
    pub(super) async fn send(
        &self,
        call: &Call<'_>,
        scopes: &[String],
    ) -> Result<Response<Incoming>, RegistryError> {
        let is_own = super::http_client::same_origin(&call.url, &self.http.base);
        let authorization = match is_own {
            true => self.authorization(scopes, None).await?,
            false => None,
        };
        let response = self.http.send(call, authorization.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED || !is_own {
            return Ok(response);
        }
        let challenges = Challenge::parse_all(response.headers());
        if challenges.is_empty() {
            return Ok(response);
        }
        let wanted = access(&self.http, &challenges)?;
        let is_basic_again = wanted == Access::Basic && authorization.is_some();
        if is_basic_again {
            return Ok(response);
        }
        drop(response);
        *self.access.lock().await = wanted;
        let renewed = self.authorization(scopes, authorization.as_ref()).await?;
        if renewed.is_none() {
            return Err(RegistryError::NoCredentials(self.http.host()));
        }
        self.http.send(call, renewed.as_ref()).await
    }

    /// The same for what only reads, and again after a while if the registry or the way to it fails.
    pub(super) async fn send_retrying(
        &self,
        call: &Call<'_>,
        scopes: &[String],
    ) -> Result<Response<Incoming>, RegistryError> {
        let mut failures = 0;
        loop {
            let result = self.send(call, scopes).await;
            failures += 1;
            match result {
                Ok(response) if is_transient(response.status()) => {
                    let after = retry_after(response.headers());
                    if !self.http.wait(failures, after).await {
                        return Ok(response);
                    }
                }
                Err(error) if error.is_transient() => {
                    if !self.http.wait(failures, None).await {
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
    }

    /// What an answer that is not the wanted one means.
    pub(super) async fn refused(&self, url: &Url, response: Response<Incoming>) -> RegistryError {
        let is_denied = response.status() == StatusCode::UNAUTHORIZED
            && Challenge::parse_all(response.headers()).iter().any(Challenge::is_insufficient_scope);
        let refusal = self.http.refusal(url, response).await;
        RegistryError::Refused(if is_denied { Refusal::denied() } else { refusal })
    }

    /// Whether the credentials are good; a token that can stand for them, if the registry gives one.
    pub(super) async fn log_in(&self) -> Result<Option<String>, RegistryError> {
        let access = self.access.lock().await.clone();
        let (authorization, identity) = match &access {
            Access::Open => return Ok(None),
            Access::Basic => (self.basic()?, None),
            Access::Bearer { .. } => {
                let answer = self.fetch_token(&access, &[], true).await?;
                (bearer(&self.http.host(), &answer)?.authorization, answer.refresh_token)
            }
        };
        let url = self.url("")?;
        let response = self.http.send(&Call::new(Method::GET, url.clone()), Some(&authorization)).await?;
        match response.status() {
            StatusCode::OK => Ok(identity.filter(|token| !token.is_empty())),
            _ => Err(self.refused(&url, response).await),
        }
    }

    fn basic(&self) -> Result<HeaderValue, RegistryError> {
        let basic = self.credentials.as_ref().and_then(Credentials::basic);
        basic.ok_or_else(|| RegistryError::NoCredentials(self.http.host()))
    }

    /// What to send; `rejected` is what was sent in vain.
    async fn authorization(
        &self,
        scopes: &[String],
        rejected: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let access = self.access.lock().await.clone();
        match &access {
            Access::Open => Ok(None),
            Access::Basic => self.basic().map(Some),
            Access::Bearer { .. } => self.token(&access, scopes, rejected).await.map(Some),
        }
    }

    async fn token(
        &self,
        access: &Access,
        scopes: &[String],
        rejected: Option<&HeaderValue>,
    ) -> Result<HeaderValue, RegistryError> {
        let host = self.http.host();
        if let Some(token) = self.credentials.as_ref().map(|known| known.registrytoken.as_str())
            && !token.is_empty()
        {
            return header_value(&host, token);
        }
        let key = scopes.join(" ");
        let mut tokens = self.tokens.lock().await;
        if let Some(token) = tokens.get(&key)
            && Some(&token.authorization) != rejected
            && token.until > Instant::now() + TOKEN_MARGIN
        {
            return Ok(token.authorization.clone());
        }
        let token = bearer(&host, &self.fetch_token(access, scopes, false).await?)?;
        tokens.insert(key, token.clone());
        Ok(token.authorization)
    }

    async fn fetch_token(
        &self,
        access: &Access,
        scopes: &[String],
        offline: bool,
    ) -> Result<TokenAnswer, RegistryError> {
        let Access::Bearer { realm, service, scope } = access else { return Err(RegistryError::Cancelled) };
        let scopes: Vec<&str> = match scopes {
            [] => scope.iter().map(String::as_str).collect(),
            scopes => scopes.iter().map(String::as_str).collect(),
        };
        let identity = self.credentials.as_ref().map_or("", |known| known.identitytoken.as_str());
        let mut failures = 0;
        loop {
            let result = match identity {
                "" => self.ask_for_token(realm, service.as_deref(), &scopes, offline).await,
                identity => self.refresh_token(realm, service.as_deref(), &scopes, identity).await,
            };
            failures += 1;
            match result {
                Ok(response) if is_transient(response.status()) => {
                    let after = retry_after(response.headers());
                    if !self.http.wait(failures, after).await {
                        return Err(RegistryError::Refused(self.http.refusal(realm, response).await));
                    }
                }
                Ok(response) if response.status().is_success() => {
                    let what = "answer of the token server";
                    return self.http.read_json(realm, response, what, MAX_TOKEN_ANSWER).await;
                }
                Ok(response) => {
                    let refusal = self.http.refusal(realm, response).await;
                    return Err(RegistryError::Refused(refusal));
                }
                Err(error) if error.is_transient() => {
                    if !self.http.wait(failures, None).await {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn ask_for_token(
        &self,
        realm: &Url,
        service: Option<&str>,
        scopes: &[&str],
        offline: bool,
    ) -> Result<Response<Incoming>, RegistryError> {
        let mut url = realm.clone();
        let basic = self.credentials.as_ref().and_then(Credentials::basic);
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = service {
                query.append_pair("service", service);
            }
            for scope in scopes {
                query.append_pair("scope", scope);
            }
            if offline {
                query.append_pair("offline_token", "true").append_pair("client_id", CLIENT_ID);
            }
            if let Some(known) = self.credentials.as_ref().filter(|known| !known.username.is_empty()) {
                query.append_pair("account", &known.username);
            }
        }
        self.http.send(&Call::new(Method::GET, url), basic.as_ref()).await
    }

    async fn refresh_token(
        &self,
        realm: &Url,
        service: Option<&str>,
        scopes: &[&str],
        identity: &str,
    ) -> Result<Response<Incoming>, RegistryError> {
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", service.unwrap_or_default())
            .append_pair("client_id", CLIENT_ID)
            .append_pair("scope", &scopes.join(" "))
            .append_pair("refresh_token", identity)
            .finish();
        let form = Bytes::from(form);
        let body = move || -> Body { Full::new(form.clone()).map_err(|never| match never {}).boxed_unsync() };
        let mut call = Call::new(Method::POST, realm.clone());
        let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
        call.headers.insert(header::CONTENT_TYPE, kind);
        call.body = Some(&body);
        self.http.send(&call, None).await
    }
}

fn join(base: &Url, path: &str) -> Result<Url, RegistryError> {
    base.join(path).map_err(|_| RegistryError::Settings(format!("`{}` makes no URL", clip(path))))
}

/// The first challenge that can be met; tokens before passwords, as Docker has it.
fn access(http: &HttpClient, challenges: &[Challenge]) -> Result<Access, RegistryError> {
    let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
    match bearer.or_else(|| challenges.first()) {
        Some(Challenge::Bearer { realm, service, scope, .. }) => {
            let realm = http
                .base
                .join(realm)
                .map_err(|_| RegistryError::protocol(&http.host(), "its token server has no URL"))?;
            http.check(&realm)?;
            Ok(Access::Bearer { realm, service: service.clone(), scope: scope.clone() })
        }
        Some(Challenge::Basic) => Ok(Access::Basic),
        None => Err(RegistryError::protocol(&http.host(), "it asks for an unknown kind of authorization")),
    }
}

fn bearer(host: &str, answer: &TokenAnswer) -> Result<Token, RegistryError> {
    let token = answer.token.as_deref().filter(|token| !token.is_empty());
    let token = token.or(answer.access_token.as_deref()).filter(|token| !token.is_empty());
    let token = token.ok_or_else(|| RegistryError::protocol(host, "its token server gives no token"))?;
    let life = answer.expires_in.unwrap_or(TOKEN_LIFE).clamp(TOKEN_LIFE, 24 * 3600);
    Ok(Token { authorization: header_value(host, token)?, until: Instant::now() + Duration::from_secs(life) })
}

fn header_value(host: &str, token: &str) -> Result<HeaderValue, RegistryError> {
    let is_plain = token.bytes().all(|byte| byte.is_ascii_graphic());
    let value = is_plain.then(|| HeaderValue::try_from(format!("Bearer {token}")).ok()).flatten();
    value.ok_or_else(|| RegistryError::protocol(host, "its token cannot be sent"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_in_any_base64_and_from_auth() {
        let json = r#"{"username":"sailor","password":"ahoy??>>"}"#;
        for header in [
            URL_SAFE.encode(json),
            STANDARD.encode(json),
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(json),
        ] {
            let found = Credentials::from_header(&header).unwrap().unwrap();
            assert_eq!((found.username.as_str(), found.password.as_str()), ("sailor", "ahoy??>>"));
            assert!(!format!("{found:?}").contains("ahoy"));
        }
        for none in [String::new(), URL_SAFE.encode("{}"), URL_SAFE.encode("null")] {
            assert_eq!(Credentials::from_header(&none).unwrap(), None);
        }
        for bad in ["!", "e30x", &URL_SAFE.encode("[1]")] {
            assert!(Credentials::from_header(bad).is_err(), "{bad}");
        }
        let old = Credentials { auth: STANDARD.encode("a:b:c"), ..Credentials::default() };
        let old = old.completed().unwrap();
        assert_eq!((old.username.as_str(), old.password.as_str()), ("a", "b:c"));
    }
}
