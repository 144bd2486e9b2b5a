//! `coracle history`.

use anyhow::Context;
use serde::Deserialize;

use crate::{
    args::HistoryArgs,
    client::{self, escape},
    failure::Outcome,
    paths::Home,
    table::{Table, ellipsis},
    terminal,
    units::{human_duration, human_size},
};

/// Commands are cut to this.
const COMMAND_WIDTH: usize = 45;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Step {
    id: String,
    #[serde(default)]
    created: i64,
    #[serde(default)]
    created_by: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    comment: String,
}

/// Shows how an image came to be, the newest step first.
pub(super) async fn run(home: &Home, args: &HistoryArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let path = format!("/images/{}/history", escape(&args.image));
    let steps: Vec<Step> =
        docker.get(&path).await.with_context(|| format!("cannot show the history of {}", args.image))?;
    let now = jiff::Timestamp::now().as_second();
    let mut table = Table::new(&["IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"]);
    let mut ids = String::new();
    for step in steps {
        let cut = |text: &str, width| if args.no_trunc { text.to_owned() } else { ellipsis(text, width) };
        let id = if args.no_trunc { step.id } else { super::images::short(&step.id) };
        ids += &format!("{id}\n");
        let created = match step.created {
            ..=0 => "N/A".to_owned(),
            created => format!("{} ago", human_duration(now - created)),
        };
        let command = cut(&step.created_by.replace('\t', " "), COMMAND_WIDTH);
        table.row([id, created, command, human_size(step.size), step.comment]);
    }
    terminal::print(&if args.quiet { ids } else { table.render() })?;
    Ok(0)
}
