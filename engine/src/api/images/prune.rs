//! `/images/prune`: removes images that no container uses, by Docker's filters.

use coracle_image_store::{ImageStore, ImageSummary};
use serde_json::json;

use super::super::{images, prune::until};
use super::{list::truth, told, user, users};
use crate::{
    error::{Error, Result},
    http::{Request, Response, body, filters::Filters},
    time::UnixNanos,
};

pub(crate) async fn prune(request: &Request) -> Result<Response> {
    let core = &request.core;
    let filters = Filters::of(&request.query, &["dangling", "until", "label", "label!"])?;
    let dangling_only = match filters.values("dangling") {
        [] => true,
        [value] => truth(value)?,
        _ => return Err(Error::invalid("more than one value of the filter 'dangling'")),
    };
    let until = match filters.values("until") {
        [] => None,
        [one] => Some(until(one)?),
        _ => return Err(Error::invalid("more than one until filter specified")),
    };
    let _alone = core.image_gate.write().await;
    let before = images(core, ImageStore::layers_size).await?;
    let users = users(core);
    let mut deleted = Vec::new();
    for image in images(core, ImageStore::list).await? {
        if dangling_only && !image.repo_tags.is_empty() || !is_meant(&image, &filters, until) {
            continue;
        }
        if user(&users, &image.id).is_some() {
            continue;
        }
        let id = image.id;
        // Forced, because it may have several names.
        match images(core, move |images| images.remove(&id.to_string(), true, &|_| None)).await {
            Ok(removals) => deleted.extend(told(core, &id, removals).await),
            Err(error) => tracing::warn!(%error, image = %id.short(), "cannot prune an image"),
        }
    }
    let after = images(core, ImageStore::layers_size).await?;
    core.events.image("prune", "", "");
    Ok(body::ok(&json!({ "ImagesDeleted": deleted, "SpaceReclaimed": before.saturating_sub(after) })))
}

fn is_meant(image: &ImageSummary, filters: &Filters, until: Option<UnixNanos>) -> bool {
    let label = |name: &str| image.labels.get(name).map(String::as_str);
    let created = image.created.map(|created| created.as_nanosecond());
    let is_old = |until: UnixNanos| created.is_some_and(|created| created < i128::from(until.0));
    let unwanted = filters.values("label!").iter().any(|wanted| match wanted.split_once('=') {
        Some((name, value)) => label(name) == Some(value),
        None => label(wanted).is_some(),
    });
    filters.labels("label", label) && !unwanted && until.is_none_or(is_old)
}
