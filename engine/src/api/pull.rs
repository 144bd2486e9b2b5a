//! `POST /images/create` with `fromImage`: a pull, told as Docker tells it.

use std::sync::Arc;

use coracle_image_store::{
    Platform, Reference,
    registry::{Credentials, LayerStatus, Pull, PullEvent},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::transfer::{self, Lines, progress, step};
use crate::{
    core::Core,
    error::{Error, Result},
    http::{Request, Response},
    registries,
};

/// How many events of a pull wait to be told.
const QUEUE: usize = 32;

/// What a client wants.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    One(Reference),
    /// All tags of the repository.
    All(Reference),
}

pub(crate) async fn create(request: Request) -> Result<Response> {
    let name =
        request.query.get("fromImage").ok_or_else(|| Error::invalid("no image named in `fromImage`"))?;
    let wanted = wanted(name, request.query.get("tag"))?;
    let platform = match request.query.get("platform") {
        Some(text) => Some(text.parse::<Platform>().map_err(|error| Error::invalid(error.to_string()))?),
        None => None,
    };
    let credentials = registries::credentials(&request.headers)?;
    let core = Arc::clone(&request.core);
    transfer::stream(&request.core, move |lines| async move {
        match wanted {
            Wanted::One(reference) => one(&core, reference, platform, credentials, &lines).await,
            Wanted::All(reference) => all(&core, &reference, platform, credentials, &lines).await,
        }
    })
    .await
}

/// `tag` is a tag or a digest; without one, and without one in the name, all tags are meant.
fn wanted(name: &str, tag: Option<&str>) -> Result<Wanted> {
    let last = name.rsplit('/').next().unwrap_or_default();
    let is_bare = !last.contains([':', '@']);
    match tag {
        Some(tag) => {
            let bare = registries::reference(name)?;
            let separator = if tag.contains(':') { '@' } else { ':' };
            Ok(Wanted::One(registries::reference(&format!("{}{separator}{tag}", bare.canonical_name()))?))
        }
        None if is_bare => Ok(Wanted::All(registries::reference(name)?)),
        None => Ok(Wanted::One(registries::reference(name)?)),
    }
}

async fn all(
    core: &Arc<Core>,
    reference: &Reference,
    platform: Option<Platform>,
    credentials: Option<Credentials>,
    lines: &Lines,
) -> Result<()> {
    let settings = core.config.registries.load()?;
    let tags = core.registries.tags(&settings, reference, credentials.as_ref()).await?;
    for tag in tags {
        let one_tag = registries::reference(&format!("{}:{tag}", reference.canonical_name()))?;
        one(core, one_tag, platform.clone(), credentials.clone(), lines).await?;
    }
    Ok(())
}

async fn one(
    core: &Arc<Core>,
    reference: Reference,
    platform: Option<Platform>,
    credentials: Option<Credentials>,
    lines: &Lines,
) -> Result<()> {
    let settings = core.config.registries.load()?;
    let pull = Pull { reference, platform, credentials };
    let (events, mut inbox) = mpsc::channel(QUEUE);
    let telling = async {
        while let Some(event) = inbox.recv().await {
            lines.say(line(event)).await;
        }
    };
    let pulling = async move {
        let result = core.registries.pull(&settings, &pull, &events).await;
        drop(events);
        (result, pull.reference)
    };
    let ((result, reference), ()) = tokio::join!(pulling, telling);
    let pulled = result?;
    core.events.image("pull", &reference.to_string(), &reference.familiar_name());
    lines.say(json!({ "status": format!("Digest: {}", pulled.digest) })).await;
    let what = if pulled.was_up_to_date { "Image is up to date" } else { "Downloaded newer image" };
    lines.say(json!({ "status": format!("Status: {what} for {reference}") })).await;
    Ok(())
}

fn line(event: PullEvent) -> Value {
    match event {
        PullEvent::Pulling { repository, name } => {
            json!({ "status": format!("Pulling from {repository}"), "id": name })
        }
        PullEvent::Layer { blob, status } => layer_line(&blob.short(), &status),
    }
}

fn layer_line(id: &str, status: &LayerStatus) -> Value {
    match status {
        LayerStatus::AlreadyExists => step("Already exists", id),
        LayerStatus::PullingFsLayer => step("Pulling fs layer", id),
        LayerStatus::Waiting => step("Waiting", id),
        LayerStatus::Downloading { current, total } => progress("Downloading", id, *current, *total),
        LayerStatus::Retrying { seconds } => {
            let unit = if *seconds == 1 { "second" } else { "seconds" };
            step(&format!("Retrying in {seconds} {unit}"), id)
        }
        LayerStatus::VerifyingChecksum => step("Verifying Checksum", id),
        LayerStatus::DownloadComplete => step("Download complete", id),
        LayerStatus::Extracting { current, total } => progress("Extracting", id, *current, *total),
        LayerStatus::PullComplete => step("Pull complete", id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_tags_are_put_together_as_docker_does() {
        let one = |name: &str, tag: Option<&str>| match wanted(name, tag).unwrap() {
            Wanted::One(reference) => reference.to_string(),
            Wanted::All(reference) => format!("all of {}", reference.familiar_name()),
        };
        let digest = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(one("busybox", Some("latest")), "busybox:latest");
        assert_eq!(one("busybox:1", None), "busybox:1");
        assert_eq!(one("busybox:1", Some("2")), "busybox:2");
        assert_eq!(one("localhost:5000/busybox", None), "all of localhost:5000/busybox");
        assert_eq!(one("busybox", Some(&digest)), format!("busybox@{digest}"));
        assert_eq!(one(&format!("busybox@{digest}"), None), format!("busybox@{digest}"));
        assert!(wanted("Busybox", None).is_err());
        assert!(wanted("busybox", Some("a b")).is_err());
    }
}
