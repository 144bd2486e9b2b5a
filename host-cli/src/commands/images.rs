//! `coracle images`, `rmi` and `tag`.

use anyhow::Context;
use serde::Deserialize;

use super::filters::Filters;
use crate::{
    args::{ImagesArgs, RmiArgs, TagArgs},
    client::{self, escape},
    failure::{Failure, Outcome, describe},
    paths::Home,
    table::Table,
    terminal,
    units::{human_duration, human_size},
};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Summary {
    id: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    repo_digests: Option<Vec<String>>,
    #[serde(default)]
    created: i64,
    #[serde(default)]
    size: u64,
}

/// Lists images.
pub(super) async fn list(home: &Home, args: &ImagesArgs) -> Outcome {
    let mut filters = Filters::of(&args.filter)?;
    if let Some(name) = &args.name {
        filters.add("reference", name);
    }
    let docker = client::connect(home).await?;
    let path = format!("/images/json?all={}&filters={}", u8::from(args.all), filters.query());
    let images: Vec<Summary> = docker.get(&path).await.context("cannot list images")?;
    let now = jiff::Timestamp::now().as_second();
    let headings: &[&str] = match args.digests {
        true => &["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE"],
        false => &["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"],
    };
    let mut table = Table::new(headings);
    let mut ids = String::new();
    for image in &images {
        let id = if args.no_trunc { image.id.clone() } else { short(&image.id) };
        for (repository, tag) in names(image) {
            ids += &format!("{id}\n");
            let created = match image.created {
                ..=0 => "N/A".to_owned(),
                created => format!("{} ago", human_duration(now - created)),
            };
            let (id, size) = (id.clone(), human_size(image.size));
            match args.digests {
                true => {
                    let digest = digest(image, &repository);
                    table.row([repository, tag, digest, id, created, size]);
                }
                false => table.row([repository, tag, id, created, size]),
            }
        }
    }
    terminal::print(&if args.quiet { ids } else { table.render() })?;
    Ok(0)
}

/// The digest of the image in a repository.
fn digest(image: &Summary, repository: &str) -> String {
    let digests = image.repo_digests.as_deref().unwrap_or_default();
    let found = digests.iter().filter_map(|name| name.split_once('@')).find(|(name, _)| *name == repository);
    found.map_or_else(|| "<none>".to_owned(), |(_, digest)| digest.to_owned())
}

/// Takes a name apart; no tag means `latest`.
pub(super) fn repository_and_tag(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "latest"),
    }
}

/// The names of an image, taken apart; one without a name has a line, too. Digests name repositories without a tag.
fn names(image: &Summary) -> Vec<(String, String)> {
    let none = || "<none>".to_owned();
    let tags = image.repo_tags.as_deref().unwrap_or_default();
    let mut named: Vec<_> = tags
        .iter()
        .map(|name| match name.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => (repository.to_owned(), tag.to_owned()),
            _ => (name.clone(), none()),
        })
        .collect();
    for (repository, _) in image.repo_digests.iter().flatten().filter_map(|name| name.split_once('@')) {
        if !named.iter().any(|(known, _)| known == repository) {
            named.push((repository.to_owned(), none()));
        }
    }
    if named.is_empty() { vec![(none(), none())] } else { named }
}

/// Twelve digits of an id.
pub(super) fn short(id: &str) -> String {
    id.strip_prefix("sha256:").unwrap_or(id).chars().take(12).collect()
}

/// Removes images or names of images.
pub(super) async fn remove(home: &Home, args: &RmiArgs) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Removed {
        untagged: Option<String>,
        deleted: Option<String>,
    }
    let docker = client::connect(home).await?;
    let mut code = 0;
    for image in &args.images {
        let path = format!("/images/{}?force={}", escape(image), u8::from(args.force));
        let removed = async {
            let answer = docker.delete(&path).await?;
            serde_json::from_slice::<Vec<Removed>>(&answer).context("cannot understand the answer")
        };
        match removed.await.with_context(|| format!("cannot remove {image}")) {
            Ok(removed) => {
                let untagged = removed
                    .iter()
                    .filter_map(|one| one.untagged.as_ref())
                    .map(|name| format!("Untagged: {name}\n"));
                let deleted = removed
                    .iter()
                    .filter_map(|one| one.deleted.as_ref())
                    .map(|id| format!("Deleted: {id}\n"));
                terminal::print(&untagged.chain(deleted).collect::<String>())?;
            }
            Err(error) => {
                terminal::complain(&format!("coracle: {}\n", describe(&error)));
                code = 1;
            }
        }
    }
    if code == 0 { Ok(0) } else { Err(Failure::silent(code)) }
}

/// Gives an image a further name.
pub(super) async fn tag(home: &Home, args: &TagArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let (repository, tag) = repository_and_tag(&args.name);
    let path = format!("/images/{}/tag?repo={}&tag={}", escape(&args.image), escape(repository), escape(tag));
    docker.post(&path).await.with_context(|| format!("cannot give {} the name {}", args.image, args.name))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_at_the_tag() {
        let image = |tags: &[&str]| Summary {
            id: String::new(),
            repo_tags: Some(tags.iter().map(|&tag| tag.to_owned()).collect()),
            repo_digests: None,
            created: 0,
            size: 0,
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(names(&image(&["busybox:latest"])), [pair("busybox", "latest")]);
        assert_eq!(
            names(&image(&["localhost:5000/a:1", "b:2"])),
            [pair("localhost:5000/a", "1"), pair("b", "2")]
        );
        assert_eq!(names(&image(&[])), [pair("<none>", "<none>")]);
        let digest = format!("a@sha256:{}", "0".repeat(64));
        let by_digest = |tags: &[&str]| Summary { repo_digests: Some(vec![digest.clone()]), ..image(tags) };
        assert_eq!(names(&by_digest(&[])), [pair("a", "<none>")]);
        assert_eq!(names(&by_digest(&["a:1"])), [pair("a", "1")]);
    }
}
