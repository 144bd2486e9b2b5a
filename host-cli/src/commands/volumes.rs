//! `coracle volume`.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::each;
use crate::{
    args::VolumeCommand,
    client::{self, Docker, escape},
    failure::{Failure, Outcome},
    paths::Home,
    table::Table,
    terminal,
    units::human_size,
};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Volume {
    name: String,
    driver: String,
}

/// Carries a command out.
pub(super) async fn run(home: &Home, command: &VolumeCommand) -> Outcome {
    let docker = client::connect(home).await?;
    match command {
        VolumeCommand::Create { label, name } => {
            let labels: Value = label
                .iter()
                .map(|label| label.split_once('=').unwrap_or((label, "")))
                .map(|(name, value)| (name.to_owned(), Value::from(value)))
                .collect::<serde_json::Map<_, _>>()
                .into();
            let body = json!({ "Name": name.clone().unwrap_or_default(), "Labels": labels });
            let volume: Volume =
                docker.post_json("/volumes/create", &body).await.context("cannot make the volume")?;
            terminal::print(&format!("{}\n", volume.name))?;
            Ok(0)
        }
        VolumeCommand::Ls { quiet, filter } => list(&docker, *quiet, filter).await,
        VolumeCommand::Inspect { names } => each::inspect(&docker, "/volumes", names).await,
        VolumeCommand::Rm { force, names } => {
            let remove = async |docker: &Docker, name: &str| {
                docker.delete(&format!("/volumes/{}?force={}", escape(name), u8::from(*force))).await?;
                Ok(name.to_owned())
            };
            each::each(&docker, names, "remove", remove).await
        }
        VolumeCommand::Prune { all, force } => prune(&docker, *all, *force).await,
    }
}

async fn list(docker: &Docker, quiet: bool, filters: &[String]) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct List {
        volumes: Vec<Volume>,
    }
    let mut asked = serde_json::Map::new();
    for filter in filters {
        let (name, value) = filter
            .split_once('=')
            .with_context(|| format!("`{filter}` is no filter: expected NAME=VALUE"))?;
        let values = asked.entry(name.to_owned()).or_insert_with(|| json!([]));
        values.as_array_mut().expect("it is made as one").push(value.into());
    }
    let path = format!("/volumes?filters={}", escape(&Value::from(asked).to_string()));
    let list: List = docker.get(&path).await.context("cannot list volumes")?;
    let mut table = Table::new(&["DRIVER", "VOLUME NAME"]);
    let mut names = String::new();
    for volume in list.volumes {
        names += &format!("{}\n", volume.name);
        table.row([volume.driver, volume.name]);
    }
    terminal::print(&if quiet { names } else { table.render() })?;
    Ok(0)
}

async fn prune(docker: &Docker, all: bool, force: bool) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Pruned {
        volumes_deleted: Vec<String>,
        space_reclaimed: u64,
    }
    if !force && !confirmed(all)? {
        return Ok(0);
    }
    let filters = json!({ "all": [all.to_string()] }).to_string();
    let path = format!("/volumes/prune?filters={}", escape(&filters));
    let pruned: Pruned = docker.post_json(&path, &json!({})).await.context("cannot remove unused volumes")?;
    for name in &pruned.volumes_deleted {
        terminal::print(&format!("{name}\n"))?;
    }
    terminal::print(&format!("Total reclaimed space: {}\n", human_size(pruned.space_reclaimed)))?;
    Ok(0)
}

/// Asks the person, as Docker's CLI does; where nobody can be asked, it needs `--force`.
fn confirmed(all: bool) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(
            anyhow::anyhow!("this removes data for good: use --force where nobody can be asked").into()
        );
    }
    let which = if all { "all volumes" } else { "all volumes without a name" };
    eprint!(
        "WARNING! This will remove {which} that no container uses.\nAre you sure you want to continue? [y/N] "
    );
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
