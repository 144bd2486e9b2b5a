//! `/images/*` except loading.

pub(crate) mod commit;
pub(crate) mod import;
pub(crate) mod list;
pub(crate) mod prune;
pub(crate) mod save;
mod wildcard;

use coracle_image_store::{Error as ImageError, Image, ImageId, ImageUser, Reference, Removal};
use serde_json::{Value, json};

use super::{images, refuse};
use crate::{
    core::Core,
    error::{Error, Result},
    http::{Request, Response, body},
};

async fn find(request: &Request, name: &str) -> Result<Image> {
    let name = name.to_owned();
    images(&request.core, move |images| images.image(&images.resolve(&name)?)).await
}

pub(crate) async fn inspect(request: &Request, name: &str) -> Result<Response> {
    refuse(request, "platform", "--platform")?;
    refuse(request, "manifests", "manifests")?;
    let image = find(request, name).await?;
    let config = &image.config;
    let layers: Vec<String> = config.rootfs.diff_ids.iter().map(ToString::to_string).collect();
    Ok(body::ok(&json!({
        "Id": image.id.to_string(),
        "RepoTags": image.repo_tags,
        "RepoDigests": image.repo_digests,
        "Parent": "",
        "Comment": config.history.last().map(|line| serde_json::to_value(line).unwrap_or_default()["comment"].clone()).filter(Value::is_string).unwrap_or_else(|| json!("")),
        "Created": image.created.map(|created| created.to_string()),
        "DockerVersion": "",
        "Author": config.author.clone().unwrap_or_default(),
        "Config": config.config,
        "Architecture": config.architecture,
        "Variant": config.variant.clone().unwrap_or_default(),
        "Os": config.os,
        "OsVersion": config.os_version.clone().unwrap_or_default(),
        "Size": image.size,
        "VirtualSize": image.size,
        "GraphDriver": { "Name": "erofs", "Data": {} },
        "RootFS": { "Type": "layers", "Layers": layers },
        "Metadata": { "LastTagTime": crate::time::NEVER },
    })))
}

pub(crate) async fn history(request: &Request, name: &str) -> Result<Response> {
    refuse(request, "platform", "--platform")?;
    let image = find(request, name).await?;
    let lines: Vec<Value> = image
        .history()
        .iter()
        .map(|line| {
            json!({
                "Id": line.id.as_ref().map_or_else(|| "<missing>".to_owned(), ToString::to_string),
                "Created": line.created.map_or(0, |created| created.as_second()),
                "CreatedBy": line.created_by,
                "Tags": line.tags,
                "Size": line.size,
                "Comment": line.comment,
            })
        })
        .collect();
    Ok(body::ok(&lines))
}

pub(crate) async fn tag(request: &Request, name: &str) -> Result<Response> {
    let repository =
        request.query.get("repo").ok_or_else(|| Error::invalid("no repository named in `repo`"))?;
    let text = match request.query.get("tag") {
        Some(tag) => format!("{repository}:{tag}"),
        None => repository.to_owned(),
    };
    let target = Reference::parse(&text)
        .map_err(|error| Error::invalid(format!("invalid reference format: {error}")))?;
    let (source, shown) = (name.to_owned(), target.to_string());
    let id = images(&request.core, move |images| {
        let id = images.resolve(&source)?;
        images.tag(&source, &target)?;
        Ok::<_, ImageError>(id)
    })
    .await?;
    request.core.events.image("tag", &id.to_string(), &shown);
    Ok(body::empty(http::StatusCode::CREATED))
}

pub(crate) async fn remove(request: &Request, name: &str) -> Result<Response> {
    refuse(request, "platforms", "--platform")?;
    let core = &request.core;
    let force = request.query.flag("force");
    let _alone = core.image_gate.write().await;
    let users = users(core);
    let owned = name.to_owned();
    let (id, removals) = images(core, move |images| {
        let id = images.resolve(&owned)?;
        Ok::<_, ImageError>((id, images.remove(&owned, force, &|image| user(&users, image))?))
    })
    .await?;
    Ok(body::ok(&told(core, &id, removals).await))
}

/// The containers that use images; those that run come first.
fn users(core: &Core) -> Vec<(ImageId, ImageUser)> {
    let mut users: Vec<_> = core
        .containers
        .all()
        .iter()
        .map(|container| {
            let record = container.record();
            let user = ImageUser {
                container: record.id.short().to_owned(),
                is_running: record.state.status.is_active(),
            };
            (record.image(), user)
        })
        .collect();
    users.sort_by_key(|(_, user)| !user.is_running);
    users
}

fn user(users: &[(ImageId, ImageUser)], image: &ImageId) -> Option<ImageUser> {
    users.iter().find(|(used, _)| used == image).map(|(_, user)| user.clone())
}

/// Tells listeners what was removed from an image, and lets go of its layers; the answer for the client.
async fn told(core: &Core, id: &ImageId, removals: Vec<Removal>) -> Vec<Value> {
    for host in core.sandboxes.all() {
        host.detach_removed().await;
    }
    let id = id.to_string();
    let mut answer = Vec::new();
    for removal in removals {
        match removal {
            Removal::Untagged(name) => {
                core.events.image("untag", &id, &name);
                answer.push(json!({ "Untagged": name }));
            }
            Removal::Deleted(deleted) => {
                core.events.image("delete", &deleted, &deleted);
                answer.push(json!({ "Deleted": deleted }));
            }
        }
    }
    answer
}

/// Forgets images that were removed by force and whose containers are gone now.
pub(crate) async fn forget_removed(core: &Core) {
    let used: std::collections::HashSet<_> =
        core.containers.all().iter().map(|container| container.record().image()).collect();
    if let Err(error) = images(core, move |images| images.forget_removed(&|id| used.contains(id))).await {
        tracing::warn!(%error, "cannot forget removed images");
    }
}
