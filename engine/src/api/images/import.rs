//! `/images/create?fromSrc=-`: an image of a file system's tar stream, which is the body.

use std::sync::Arc;

use coracle_image_store::{Import, Platform, Reference};
use serde_json::json;
use tokio::sync::mpsc;

use super::super::load::{BodyReader, QUEUE, feed};
use crate::{
    error::{Error, Result},
    http::{Request, Response, body},
};

pub(crate) async fn import(request: Request) -> Result<Response> {
    let query = &request.query;
    if query.get("fromSrc") != Some("-") {
        return Err(Error::unsupported(
            "importing from a URL is not supported by Coracle: download it, and import the file or standard input",
        ));
    }
    let import = Import {
        tag: name(query.get("repo"), query.get("tag"))?,
        changes: query.all("changes").map(str::to_owned).collect(),
        comment: query.get("message").unwrap_or("Imported from -").to_owned(),
        platform: query.get("platform").map(platform).transpose()?,
    };
    let tag = import.tag.as_ref().map(ToString::to_string);
    let (pieces, reader) = mpsc::channel(QUEUE);
    let feeder = request.core.tasks.spawn(feed(request.body, pieces));
    let images = Arc::clone(&request.core.images);
    let imported =
        tokio::task::spawn_blocking(move || images.import(BodyReader::new(reader), &import)).await?;
    // The client reads the answer only when it has sent everything.
    let _ = feeder.await;
    let id = imported?.id.to_string();
    request.core.events.image("import", &id, tag.as_deref().unwrap_or(&id));
    let (lines, response) = body::stream("application/json");
    let _ = lines.try_send(body::json_line(&json!({ "status": id })));
    Ok(response)
}

/// The name for a new image; `docker commit` has the same parameters.
pub(crate) fn name(repository: Option<&str>, tag: Option<&str>) -> Result<Option<Reference>> {
    let Some(repository) = repository else { return Ok(None) };
    let text = tag.map_or_else(|| repository.to_owned(), |tag| format!("{repository}:{tag}"));
    let parsed = Reference::parse(&text);
    parsed.map(Some).map_err(|error| Error::invalid(format!("invalid reference format: {error}")))
}

fn platform(text: &str) -> Result<Platform> {
    let bad = || {
        Error::invalid(format!("\"{}\" is an invalid platform", text.chars().take(60).collect::<String>()))
    };
    let parts: Vec<&str> = text.split('/').collect();
    let is_good = |part: &&str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    if !parts.iter().all(is_good) {
        return Err(bad());
    }
    match parts.as_slice() {
        [os] if os.eq_ignore_ascii_case("linux") => Ok(Platform::host()),
        [os, architecture] => Ok(Platform {
            os: os.to_ascii_lowercase(),
            architecture: (*architecture).to_owned(),
            variant: None,
        }),
        [os, architecture, variant] => Ok(Platform {
            os: os.to_ascii_lowercase(),
            architecture: (*architecture).to_owned(),
            variant: Some((*variant).to_owned()),
        }),
        _ => Err(bad()),
    }
}
