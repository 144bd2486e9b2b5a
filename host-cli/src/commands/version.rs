//! `coracle version`: the client's and the daemon's.

use anyhow::Context;
use serde_json::{Value, json};

use crate::{
    client::{self, API_VERSION},
    failure::Outcome,
    paths::Home,
    table::printable,
    terminal,
};

/// Prints the versions; a daemon that does not run is not started for it.
pub(super) async fn run(home: &Home, as_json: bool) -> Outcome {
    let server: Option<Value> = match client::connect_running(home)? {
        Some(docker) => Some(docker.get("/version").await.context("cannot ask the daemon for its version")?),
        None => None,
    };
    if as_json {
        let client = json!({ "Version": env!("CARGO_PKG_VERSION"), "ApiVersion": API_VERSION });
        terminal::print(&format!("{}\n", json!({ "Client": client, "Server": server })))?;
        return Ok(0);
    }
    let mut text =
        format!("Client:\n Version:      {}\n API version:  {API_VERSION}\n", env!("CARGO_PKG_VERSION"));
    match server {
        None => text += "Server: not running\n",
        Some(server) => {
            let field = |name: &str| printable(server.get(name).and_then(Value::as_str).unwrap_or("unknown"));
            text += &format!(
                "Server:\n Version:      {}\n API version:  {} (minimum {})\n OS/Arch:      {}/{}\n",
                field("Version"),
                field("ApiVersion"),
                field("MinAPIVersion"),
                field("Os"),
                field("Arch"),
            );
        }
    }
    terminal::print(&text)?;
    Ok(0)
}
