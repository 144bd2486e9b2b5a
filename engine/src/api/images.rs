//! `/images/*` except loading.

use coracle_image_store::{Error as ImageError, Image, ImageId, ImageSummary, Reference, Removal};
use serde_json::{Value, json};

use super::{images, refuse};
use crate::{
    error::{Error, Result},
    http::{Request, Response, body, filters::Filters},
};

/// One entry of `docker images`.
pub(crate) fn summary(image: &ImageSummary, containers: usize) -> Value {
    json!({
        "Id": image.id.to_string(),
        "ParentId": "",
        "RepoTags": image.repo_tags,
        "RepoDigests": image.repo_digests,
        "Created": image.created.map_or(0, |created| created.as_second()),
        "Size": image.size,
        "SharedSize": -1,
        "VirtualSize": image.size,
        "Labels": image.labels,
        "Containers": containers,
    })
}

pub(crate) async fn list(request: &Request) -> Result<Response> {
    let core = &request.core;
    let filters = Filters::of(&request.query, &["reference", "label", "dangling"])?;
    let all = core.containers.all();
    let list = images(core, coracle_image_store::ImageStore::list).await?;
    let dangling = |image: &ImageSummary| image.repo_tags.is_empty();
    let fits = |image: &&ImageSummary| {
        filters.any("reference", |pattern| image.repo_tags.iter().any(|tag| reference_fits(pattern, tag)))
            && filters.labels("label", |name| image.labels.get(name).map(String::as_str))
            && filters.any("dangling", |wanted| matches!(wanted, "true" | "1") == dangling(image))
    };
    let users = |id: &ImageId| all.iter().filter(|container| container.record().image() == *id).count();
    let summaries: Vec<_> = list.iter().filter(fits).map(|image| summary(image, users(&image.id))).collect();
    Ok(body::ok(&summaries))
}

/// `docker images PATTERN`: with or without a tag, `*` for any run of characters.
fn reference_fits(pattern: &str, tag: &str) -> bool {
    let (name, _) = tag.rsplit_once(':').unwrap_or((tag, ""));
    wildcard(pattern.as_bytes(), tag.as_bytes()) || wildcard(pattern.as_bytes(), name.as_bytes())
}

fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    // Greedy with one point to come back to, so that no pattern takes long.
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    p = at + 1;
                    t = from + 1;
                    star = Some((at, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

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
    let users: Vec<(ImageId, bool, String)> = core
        .containers
        .all()
        .iter()
        .map(|container| {
            let record = container.record();
            (record.image(), record.state.status.is_active(), record.id.short().to_owned())
        })
        .collect();
    let owned = name.to_owned();
    let removals = images(core, move |images| remove_unless_used(images, &owned, force, &users)).await?;
    for host in core.sandboxes.all() {
        host.detach_removed().await;
    }
    let mut answer = Vec::new();
    for removal in removals {
        match removal {
            Removal::Untagged(tag) => {
                core.events.image("untag", &tag, &tag);
                answer.push(json!({ "Untagged": tag }));
            }
            Removal::Deleted(id) => {
                core.events.image("delete", &id, &id);
                answer.push(json!({ "Deleted": id }));
            }
        }
    }
    Ok(body::ok(&answer))
}

/// Docker's rules: a running container keeps its image from being removed, a stopped one too unless forced; a name that is not
/// the image's last can always go.
fn remove_unless_used(
    images: &coracle_image_store::ImageStore,
    name: &str,
    force: bool,
    users: &[(ImageId, bool, String)],
) -> Result<Vec<Removal>> {
    let id = images.resolve(name)?;
    let image = images.image(&id)?;
    let by_id = id.to_string().trim_start_matches("sha256:").starts_with(name.trim_start_matches("sha256:"));
    let deletes = by_id || image.repo_tags.len() <= 1;
    let used =
        |running: bool| users.iter().find(|(image, is_running, _)| *image == id && *is_running == running);
    let short = id.short();
    let conflict = |how: &str, state: &str, container: &str| {
        Error::conflict(format!(
            "conflict: unable to {how} ({state}) - container {container} is using its referenced image {short}"
        ))
    };
    if deletes && let Some((_, _, container)) = used(true) {
        let how =
            if by_id { format!("delete {short}") } else { format!("remove repository reference \"{name}\"") };
        return Err(conflict(&how, if by_id { "cannot be forced" } else { "must force" }, container));
    }
    if deletes
        && !force
        && let Some((_, _, container)) = used(false)
    {
        let how =
            if by_id { format!("delete {short}") } else { format!("remove repository reference \"{name}\"") };
        return Err(conflict(&how, if by_id { "must be forced" } else { "must force" }, container));
    }
    // A stopped container whose image was removed by force keeps its layers: it can still be started.
    Ok(images.remove(name, force, &|image| users.iter().any(|(user, _, _)| user == image))?)
}

/// The error for pulling, which `docker run` shows when an image is not there.
pub(crate) fn no_pull(request: &Request) -> Error {
    if request.query.get("fromSrc").is_some() {
        return Error::unsupported(
            "importing file systems is not supported by Coracle yet: make an image archive and use `docker load`",
        );
    }
    let name = request.query.get("fromImage").unwrap_or("the image");
    let tag = request
        .query
        .get("tag")
        .map(|tag| format!("{}{tag}", if tag.contains(':') { "@" } else { ":" }))
        .unwrap_or_default();
    let shown: String = format!("{name}{tag}").chars().take(200).collect();
    Error::unsupported(format!(
        "cannot pull {shown}: pulling is not supported by Coracle yet; make an archive of the image, for example with `skopeo copy docker://{shown} docker-archive:image.tar:{shown}`, and load it with `docker load -i image.tar`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_patterns_fit_with_and_without_tags() {
        for (pattern, tag, fits) in [
            ("busybox", "busybox:latest", true),
            ("busybox:latest", "busybox:latest", true),
            ("busy*", "busybox:latest", true),
            ("*:latest", "busybox:latest", true),
            ("busybox:1", "busybox:latest", false),
            ("usybox", "busybox:latest", false),
            ("*a*a*a*b", &"a".repeat(60), false),
        ] {
            assert_eq!(reference_fits(pattern, tag), fits, "{pattern} {tag}");
        }
    }
}
