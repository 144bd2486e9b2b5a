//! `coracle ps`.

use anyhow::Context;
use serde::Deserialize;

use super::filters::Filters;
use crate::{
    args::PsArgs,
    client,
    failure::{Failure, Outcome},
    paths::Home,
    table::{Table, ellipsis},
    terminal,
    units::human_duration,
};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Summary {
    id: String,
    #[serde(default)]
    names: Vec<String>,
    #[serde(default)]
    image: String,
    #[serde(default)]
    command: String,
    #[serde(default)]
    created: i64,
    #[serde(default)]
    status: String,
}

/// Lists containers.
pub(super) async fn run(home: &Home, args: &PsArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let containers: Vec<Summary> = docker.get(&query(args)?).await.context("cannot list containers")?;
    let now = jiff::Timestamp::now().as_second();
    let mut table = Table::new(&["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"]);
    let mut ids = String::new();
    for container in containers {
        let cut = |text: &str, width| if args.no_trunc { text.to_owned() } else { ellipsis(text, width) };
        let id = if args.no_trunc { container.id } else { super::images::short(&container.id) };
        ids += &format!("{id}\n");
        let names: Vec<_> = container.names.iter().map(|name| name.trim_start_matches('/')).collect();
        table.row([
            id,
            container.image,
            format!("\"{}\"", cut(&container.command, 20)),
            format!("{} ago", human_duration(now - container.created)),
            container.status,
            String::new(),
            names.join(","),
        ]);
    }
    terminal::print(&if args.quiet { ids } else { table.render() })?;
    Ok(0)
}

fn query(args: &PsArgs) -> Result<String, Failure> {
    let last = if args.latest { Some(1) } else { args.last };
    let mut path = format!("/containers/json?all={}", u8::from(args.all || last.is_some()));
    if let Some(last) = last {
        path += &format!("&limit={last}");
    }
    path += &format!("&filters={}", Filters::of(&args.filter)?.query());
    Ok(path)
}
