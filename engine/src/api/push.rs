//! `POST /images/NAME/push`: a push, told as Docker tells it.

use std::sync::Arc;

use coracle_image_store::{
    Reference,
    registry::{Credentials, PushEvent, PushStatus},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    images, refuse,
    transfer::{self, Lines, progress, step},
};
use crate::{
    core::Core,
    error::{Error, Result},
    http::{Request, Response},
    registries,
};

/// How many events of a push wait to be told.
const QUEUE: usize = 32;

pub(crate) async fn push(request: Request, name: &str) -> Result<Response> {
    refuse(&request, "platform", "--platform")?;
    let repository = registries::reference(name)?;
    if repository.digest().is_some() {
        return Err(Error::invalid("cannot push a digest reference"));
    }
    let tag = request.query.get("tag").map(str::to_owned);
    let credentials = registries::credentials(&request.headers)?;
    let references = references(&request.core, name, &repository, tag.as_deref()).await?;
    let core = Arc::clone(&request.core);
    transfer::stream(&request.core, move |lines| async move {
        let refers = format!("The push refers to repository [{}]", repository.canonical_name());
        lines.say(json!({ "status": refers })).await;
        for reference in references {
            one(&core, reference, credentials.as_ref(), &lines).await?;
        }
        Ok(())
    })
    .await
}

/// What is to be pushed: one tag, or without one all that the repository has here.
async fn references(
    core: &Core,
    name: &str,
    repository: &Reference,
    tag: Option<&str>,
) -> Result<Vec<Reference>> {
    let has_tag = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
    match tag {
        Some(tag) => Ok(vec![registries::reference(&format!("{}:{tag}", repository.canonical_name()))?]),
        None if has_tag => Ok(vec![repository.clone()]),
        None => {
            let all = images(core, coracle_image_store::ImageStore::list).await?;
            let tags = all.iter().flat_map(|image| &image.repo_tags);
            let tags = tags.filter_map(|tag| Reference::parse(tag).ok());
            let here: Vec<_> =
                tags.filter(|tag| tag.canonical_name() == repository.canonical_name()).collect();
            if here.is_empty() {
                let shown = repository.familiar_name();
                let message = format!("An image does not exist locally with the tag: {shown}");
                return Err(Error::not_found(message));
            }
            Ok(here)
        }
    }
}

async fn one(
    core: &Core,
    reference: Reference,
    credentials: Option<&Credentials>,
    lines: &Lines,
) -> Result<()> {
    let settings = core.config.registries.load()?;
    let (events, mut inbox) = mpsc::channel(QUEUE);
    let telling = async {
        while let Some(event) = inbox.recv().await {
            lines.say(line(&event)).await;
        }
    };
    let pushing = async {
        let result = core.registries.push(&settings, &reference, credentials, &events).await;
        drop(events);
        result
    };
    let (result, ()) = tokio::join!(pushing, telling);
    let pushed = result?;
    core.events.image("push", &reference.to_string(), &reference.familiar_name());
    let tag = reference.tag().unwrap_or("latest");
    let (digest, size) = (pushed.digest.to_string(), pushed.size);
    lines.say(json!({ "status": format!("{tag}: digest: {digest} size: {size}") })).await;
    lines.say(json!({ "progressDetail": {}, "aux": { "Tag": tag, "Digest": digest, "Size": size } })).await;
    Ok(())
}

fn line(event: &PushEvent) -> Value {
    let id = event.diff_id.short();
    match &event.status {
        PushStatus::Preparing => step("Preparing", &id),
        PushStatus::Waiting => step("Waiting", &id),
        PushStatus::Pushing { current, total } => progress("Pushing", &id, *current, *total),
        PushStatus::Pushed => step("Pushed", &id),
        PushStatus::LayerAlreadyExists => step("Layer already exists", &id),
        PushStatus::MountedFrom(name) => step(&format!("Mounted from {name}"), &id),
    }
}
