//! `coracle image prune`.

use std::io::BufRead;

use anyhow::Context;
use http::Method;
use http_body_util::BodyExt;
use serde::Deserialize;

use super::filters::Filters;
use crate::{
    args::PruneArgs,
    client::{self, empty},
    failure::Outcome,
    paths::Home,
    terminal,
    units::human_size,
};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    images_deleted: Option<Vec<Deleted>>,
    #[serde(default)]
    space_reclaimed: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Deleted {
    untagged: Option<String>,
    deleted: Option<String>,
}

/// Removes images that nothing uses.
pub(super) async fn run(home: &Home, args: &PruneArgs) -> Outcome {
    let mut filters = Filters::of(&args.filter)?;
    filters.add("dangling", if args.all { "false" } else { "true" });
    let what =
        if args.all { "images without at least one container associated to them" } else { "dangling images" };
    if !args.force && !is_confirmed(&format!("WARNING! This will remove all {what}."))? {
        return Ok(0);
    }
    let docker = client::connect(home).await?;
    let path = format!("/images/prune?filters={}", filters.query());
    let answer = docker.call(Method::POST, &path, empty()).await.context("cannot remove unused images")?;
    let answer = answer.into_body().collect().await.context("lost the connection to the daemon")?.to_bytes();
    let answer: Answer = serde_json::from_slice(&answer).context("cannot understand the daemon's answer")?;
    let mut text = String::new();
    let deleted = answer.images_deleted.unwrap_or_default();
    if !deleted.is_empty() {
        text += "Deleted Images:\n";
        for image in deleted {
            text.extend(image.untagged.map(|name| format!("untagged: {name}\n")));
            text.extend(image.deleted.map(|id| format!("deleted: {id}\n")));
        }
        text += "\n";
    }
    text += &format!("Total reclaimed space: {}\n", human_size(answer.space_reclaimed));
    terminal::print(&text)?;
    Ok(0)
}

fn is_confirmed(warning: &str) -> std::io::Result<bool> {
    terminal::print(&format!("{warning}\nAre you sure you want to continue? [y/N] "))?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
