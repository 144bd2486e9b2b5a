//! `/images/json`: which images there are, by Docker's filters.

use std::cmp::Ordering;

use coracle_image_store::{Digest, ImageId, ImageStore, ImageSummary};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::super::{images, prune::until};
use super::wildcard::fits;
use crate::{
    core::Core,
    error::{Error, Result},
    http::{Request, Response, body, filters::Filters, version::ApiVersion},
    time::UnixNanos,
};

const FILTERS: [&str; 6] = ["reference", "label", "dangling", "before", "since", "until"];
/// Older clients know images without names by this one.
const NO_NAME: (ApiVersion, &str, &str) = (ApiVersion(1, 43), "<none>:<none>", "<none>@<none>");

/// What to tell of images.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Details {
    pub(crate) version: ApiVersion,
    pub(crate) shared_size: bool,
}

/// One entry of `docker images`.
pub(crate) fn summary(image: &ImageSummary, containers: usize, details: Details) -> Value {
    let mut tags = image.repo_tags.clone();
    let mut digests = image.repo_digests.clone();
    let (first, no_tag, no_digest) = NO_NAME;
    if tags.is_empty() && digests.is_empty() && details.version < first {
        tags.push(no_tag.to_owned());
        digests.push(no_digest.to_owned());
    }
    let mut summary = json!({
        "Id": image.id.to_string(),
        "ParentId": "",
        "RepoTags": tags,
        "RepoDigests": digests,
        "Created": image.created.map_or(0, |created| created.as_second()),
        "Size": image.size,
        "SharedSize": if details.shared_size { json!(image.shared_size) } else { json!(-1) },
        "Labels": image.labels,
        "Containers": containers,
    });
    if details.version < ApiVersion(1, 44) {
        summary["VirtualSize"] = json!(image.size);
    }
    summary
}

/// An image here is for one platform, and has one manifest if it came with one.
fn manifests(images: &ImageStore, image: &ImageSummary) -> Result<Value> {
    let Some(manifest) = images.manifest(&image.id)? else { return Ok(json!([])) };
    let platform = images.image(&image.id)?.platform;
    let digest = Digest::of(&manifest).to_string();
    Ok(json!([{
        "ID": digest,
        "Descriptor": {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": manifest.len(),
            "platform": platform,
        },
        "Available": true,
        "Kind": "image",
        "Size": { "Content": 0, "Total": image.size },
        "ImageData": { "Platform": platform, "Containers": [], "Size": { "Unpacked": image.size } },
    }]))
}

pub(crate) async fn list(request: &Request) -> Result<Response> {
    let core = &request.core;
    let filters = Filters::of(&request.query, &FILTERS)?;
    let wanted = Wanted::of(core, &filters).await?;
    let details = Details { version: request.version, shared_size: request.query.flag("shared-size") };
    let with_manifests = request.query.flag("manifests");
    let list = images(core, move |images| {
        let describe = |image: ImageSummary| {
            let manifests = with_manifests.then(|| manifests(images, &image)).transpose()?;
            Ok::<_, Error>((image, manifests))
        };
        images.list()?.into_iter().map(describe).collect::<Result<Vec<_>>>()
    })
    .await?;
    let all = core.containers.all();
    let users = |id: &ImageId| all.iter().filter(|container| container.record().image() == *id).count();
    let summaries: Vec<_> = list
        .into_iter()
        .filter_map(|(image, manifests)| Some((wanted.part_of(image)?, manifests)))
        .map(|(image, manifests)| {
            let mut summary = summary(&image, users(&image.id), details);
            if let Some(manifests) = manifests {
                summary["Manifests"] = manifests;
            }
            summary
        })
        .collect();
    Ok(body::ok(&summaries))
}

/// Filters, understood.
struct Wanted<'a> {
    filters: &'a Filters,
    dangling: Option<bool>,
    before: Vec<Option<Timestamp>>,
    since: Vec<Option<Timestamp>>,
    until: Vec<UnixNanos>,
}

impl<'a> Wanted<'a> {
    async fn of(core: &Core, filters: &'a Filters) -> Result<Self> {
        let dangling = match filters.values("dangling") {
            [] => None,
            [value] => Some(truth(value)?),
            _ => return Err(Error::invalid("more than one value of the filter 'dangling'")),
        };
        Ok(Self {
            filters,
            dangling,
            before: created(core, filters.values("before")).await?,
            since: created(core, filters.values("since")).await?,
            until: filters.values("until").iter().map(|text| until(text)).collect::<Result<_>>()?,
        })
    }

    /// The image with those of its names that are wanted, if it is wanted at all.
    fn part_of(&self, mut image: ImageSummary) -> Option<ImageSummary> {
        let patterns = self.filters.values("reference");
        if !patterns.is_empty() {
            image.repo_tags.retain(|tag| patterns.iter().any(|pattern| reference_fits(pattern, tag)));
            image.repo_digests.retain(|name| patterns.iter().any(|pattern| reference_fits(pattern, name)));
        }
        let has_name = !image.repo_tags.is_empty() || !image.repo_digests.is_empty();
        let named = match self.dangling {
            Some(true) => image.repo_tags.is_empty(),
            Some(false) => has_name,
            None => true,
        };
        let is = |wanted: Ordering| move |other: &Option<Timestamp>| image.created.cmp(other) == wanted;
        let nanos = image.created.map(|created| created.as_nanosecond());
        // An image that does not say when it was made is older than all that do, as for Docker.
        let is_old = |until: &UnixNanos| nanos.is_none_or(|created| created < i128::from(until.0));
        let fits = named
            && (patterns.is_empty() || has_name)
            && self.filters.labels("label", |name| image.labels.get(name).map(String::as_str))
            && self.before.iter().all(is(Ordering::Less))
            && self.since.iter().all(is(Ordering::Greater))
            && self.until.iter().all(is_old);
        fits.then_some(image)
    }
}

/// When images were made.
async fn created(core: &Core, names: &[String]) -> Result<Vec<Option<Timestamp>>> {
    let mut times = Vec::new();
    for name in names {
        let name = name.clone();
        let image = images(core, move |images| images.image(&images.resolve(&name)?)).await?;
        times.push(image.created);
    }
    Ok(times)
}

/// A value of the filter `dangling`.
pub(crate) fn truth(value: &str) -> Result<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(Error::invalid(format!(
            "invalid filter 'dangling={}'",
            other.chars().take(60).collect::<String>()
        ))),
    }
}

/// `docker images PATTERN`: the name with or without its tag or digest.
fn reference_fits(pattern: &str, name: &str) -> bool {
    let repository = match name.split_once('@') {
        Some((repository, _)) => repository,
        None => name.rsplit_once(':').map_or(name, |(repository, _)| repository),
    };
    fits(pattern, name) || fits(pattern, repository)
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
            ("*", "example.org/busybox:latest", false),
            ("*/busybox", "example.org/busybox:latest", true),
            ("localhost:5000/a", "localhost:5000/a:1", true),
            ("a@sha256:*", "a@sha256:00", true),
            ("a", "a@sha256:00", true),
        ] {
            assert_eq!(reference_fits(pattern, tag), fits, "{pattern} {tag}");
        }
    }
}
