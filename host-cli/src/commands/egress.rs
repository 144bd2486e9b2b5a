//! `coracle egress`: which connections to the outside containers asked for, and what became of that.

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::{
    args::EgressArgs,
    client::{self, escape},
    failure::Outcome,
    paths::Home,
    table::Table,
    terminal,
};

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    time: String,
    container: String,
    name: String,
    protocol: String,
    destination: String,
    host: String,
    allowed: bool,
    reason: String,
}

/// Shows the newest connections, the oldest of them first.
pub(super) async fn run(home: &Home, args: &EgressArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let path = match &args.container {
        Some(container) => format!("/coracle/egress?container={}", escape(container)),
        None => "/coracle/egress".to_owned(),
    };
    let lines: Vec<Line> = docker.get(&path).await.context("cannot show the connections")?;
    let lines = lines.into_iter().filter(|line| !(args.denied && line.allowed));
    if args.json {
        let mut all = String::new();
        for line in lines {
            all += &serde_json::to_string(&line).context("cannot print a connection")?;
            all.push('\n');
        }
        terminal::print(&all)?;
        return Ok(0);
    }
    let mut table = Table::new(&["TIME", "CONTAINER", "PROTOCOL", "DESTINATION", "NAME", "VERDICT"]);
    for line in lines {
        let verdict = if line.allowed { "allowed".to_owned() } else { format!("denied: {}", line.reason) };
        table.row([line.time, line.name, line.protocol, line.destination, line.host, verdict]);
    }
    terminal::print(&table.render())?;
    Ok(0)
}
