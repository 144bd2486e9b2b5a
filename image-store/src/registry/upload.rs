//! An upload by the distribution specification: begun with POST, sent with PATCH, from where it broke if it broke, and
//! ended with PUT. The registry says with each answer where to go on; it gets this user's token only at its own address.

use std::io::{Seek, SeekFrom};
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{self, HeaderValue};
use http::{Method, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::sync::watch;
use tokio_util::io::ReaderStream;
use url::Url;

use super::error::RegistryError;
use super::http_client::{Body, Call, is_transient, retry_after};
use super::push::{blob_headers, is_there};
use super::repository::Repository;
use crate::digest::Digest;

const BUFFER: usize = 64 << 10;

/// A file to send, and where it is told how far it is.
pub(super) struct FileBody {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) sent: watch::Sender<u64>,
}

impl FileBody {
    /// The file from `offset` on.
    fn from(&self, offset: u64) -> Body {
        let opened = std::fs::File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(offset))?;
            Ok(file)
        });
        let file = match opened {
            Ok(file) => tokio::fs::File::from_std(file),
            Err(error) => {
                let failed = futures_util::stream::once(async move { Err(error) });
                return StreamBody::new(failed).boxed_unsync();
            }
        };
        let (sent, mut position) = (self.sent.clone(), offset);
        let pieces = ReaderStream::with_capacity(file, BUFFER).map(move |piece| {
            let piece = piece?;
            position += piece.len() as u64;
            sent.send_replace(position);
            Ok(Frame::data(piece))
        });
        StreamBody::new(pieces).boxed_unsync()
    }
}

impl Repository {
    /// Whether the repository has a blob.
    pub(super) async fn has_blob(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let url = self.blob_url(digest)?;
        let response = self.send_retrying(&Call::new(Method::HEAD, url.clone())).await?;
        match is_there(&Method::HEAD, response.status()) {
            Some(there) => Ok(there),
            None => Err(self.session.refused(&url, response).await),
        }
    }
}

/// An upload that has begun.
pub(super) struct Upload<'a> {
    repository: &'a Repository,
    location: Url,
}

impl<'a> Upload<'a> {
    /// Begins one.
    pub(super) async fn begin(repository: &'a Repository) -> Result<Self, RegistryError> {
        let url = repository.url("blobs/uploads/")?;
        let response = repository.send_retrying(&empty_post(url.clone())).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(repository.session.refused(&url, response).await);
        }
        let location = location(repository, &url, &response)?;
        Ok(Self { repository, location })
    }

    /// Asks for a blob of another repository. False: it is not to be had that way.
    pub(super) async fn mount(
        repository: &'a Repository,
        digest: &Digest,
        from: &str,
    ) -> Result<bool, RegistryError> {
        let mut url = repository.url("blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        let response = repository.send_retrying(&empty_post(url.clone())).await?;
        if response.status() == StatusCode::ACCEPTED
            && let Ok(location) = location(repository, &url, &response)
        {
            // An upload was begun instead, which nobody wants.
            let _ = repository.send(&Call::new(Method::DELETE, location)).await;
        }
        Ok(response.status() == StatusCode::CREATED)
    }

    /// Sends what fits into one request.
    pub(super) async fn send_small(
        self,
        body: &(dyn Fn() -> Body + Send + Sync),
        length: usize,
        digest: &Digest,
    ) -> Result<(), RegistryError> {
        let mut call = Call::new(Method::PUT, with_digest(&self.location, digest));
        call.headers = blob_headers(length as u64);
        call.body = Some(body);
        let response = self.repository.send(&call).await?;
        self.expect(&call.url, response, StatusCode::CREATED).await.map(drop)
    }

    /// Sends a file, from where it broke if it breaks.
    pub(super) async fn send_file(mut self, file: &FileBody, digest: &Digest) -> Result<(), RegistryError> {
        let http = &self.repository.session.http;
        let (mut offset, mut failures) = (0, 0);
        while offset < file.size {
            let error = match self.send_rest(file, offset).await {
                Ok(()) => break,
                Err(error) => error,
            };
            failures += 1;
            let delay = http.wait_time(failures, error.retry_after()).filter(|_| error.is_transient());
            let Some(delay) = delay else { return Err(error) };
            tracing::debug!(%error, ?delay, "an upload broke");
            tokio::time::sleep(delay).await;
            offset = self.resume_at(file.size).await?;
        }
        let mut call = Call::new(Method::PUT, with_digest(&self.location, digest));
        call.headers = blob_headers(0);
        let response = self.repository.send(&call).await?;
        self.expect(&call.url, response, StatusCode::CREATED).await.map(drop)
    }

    async fn send_rest(&mut self, file: &FileBody, offset: u64) -> Result<(), RegistryError> {
        let body = || file.from(offset);
        let mut call = Call::new(Method::PATCH, self.location.clone());
        call.headers = blob_headers(file.size - offset);
        if offset > 0 {
            let range = HeaderValue::try_from(format!("{offset}-{}", file.size - 1));
            call.headers.insert(header::CONTENT_RANGE, range.map_err(|_| RegistryError::Cancelled)?);
        }
        call.body = Some(&body);
        let response = self.repository.send(&call).await?;
        let response = self.expect(&call.url, response, StatusCode::ACCEPTED).await?;
        self.location = location(self.repository, &call.url, &response)?;
        Ok(())
    }

    /// How much the registry has; from the start, in a new upload, if it does not say.
    async fn resume_at(&mut self, size: u64) -> Result<u64, RegistryError> {
        let call = Call::new(Method::GET, self.location.clone());
        if let Ok(response) = self.repository.send(&call).await
            && response.status() == StatusCode::NO_CONTENT
            && let Ok(next) = location(self.repository, &call.url, &response)
            && let Some(end) = range_end(response.headers()).filter(|end| *end > 0 && *end < size)
        {
            self.location = next;
            return Ok(end + 1);
        }
        self.location = Self::begin(self.repository).await?.location;
        Ok(0)
    }

    async fn expect(
        &self,
        url: &Url,
        response: Response<Incoming>,
        wanted: StatusCode,
    ) -> Result<Response<Incoming>, RegistryError> {
        match response.status() {
            status if status == wanted => Ok(response),
            _ => Err(self.repository.session.refused(url, response).await),
        }
    }
}

/// Puts a manifest under a tag.
pub(super) async fn put_manifest(
    repository: &Repository,
    tag: &str,
    media_type: &'static str,
    bytes: &[u8],
    digest: &Digest,
) -> Result<(), RegistryError> {
    let content = Bytes::copy_from_slice(bytes);
    let body = || -> Body { Full::new(content.clone()).map_err(|never| match never {}).boxed_unsync() };
    let url = repository.url(&format!("manifests/{tag}"))?;
    let mut call = Call::new(Method::PUT, url.clone());
    call.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    call.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    call.body = Some(&body);
    let http = &repository.session.http;
    let mut failures = 0;
    loop {
        let response = repository.send(&call).await?;
        if is_transient(response.status()) {
            failures += 1;
            if http.wait(failures, retry_after(response.headers())).await {
                continue;
            }
        }
        if response.status() != StatusCode::CREATED {
            return Err(repository.session.refused(&url, response).await);
        }
        let stated = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        return match stated {
            Some(stated) if stated != digest.to_string() => {
                Err(RegistryError::protocol(&http.host(), "it keeps another manifest than was sent"))
            }
            _ => Ok(()),
        };
    }
}

fn empty_post(url: Url) -> Call<'static> {
    let mut call = Call::new(Method::POST, url);
    call.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(0));
    call
}

fn location(repository: &Repository, url: &Url, response: &Response<Incoming>) -> Result<Url, RegistryError> {
    let http = &repository.session.http;
    let value = response.headers().get(header::LOCATION);
    let value =
        value.ok_or_else(|| RegistryError::protocol(&http.host(), "it does not say where to upload to"))?;
    http.resolve(url, value)
}

fn with_digest(location: &Url, digest: &Digest) -> Url {
    let mut url = location.clone();
    url.query_pairs_mut().append_pair("digest", &digest.to_string());
    url
}

/// The end of `Range: 0-123`.
fn range_end(headers: &http::HeaderMap) -> Option<u64> {
    let text = headers.get(header::RANGE)?.to_str().ok()?;
    text.trim_start_matches("bytes=").strip_prefix("0-")?.parse().ok()
}
