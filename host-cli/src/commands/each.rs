//! Commands that do the same with each of several names: one that fails does not hold up those after it.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    client::{Docker, escape},
    failure::{Failure, Outcome, describe},
    terminal,
};

/// Does something with each, and prints what is said of it.
pub(super) async fn each(
    docker: &Docker,
    names: &[String],
    verb: &str,
    act: impl AsyncFn(&Docker, &str) -> Result<String>,
) -> Outcome {
    let mut failed = false;
    for name in names {
        match act(docker, name).await.with_context(|| format!("cannot {verb} {name}")) {
            Ok(said) => terminal::print(&format!("{said}\n"))?,
            Err(error) => {
                terminal::complain(&format!("coracle: {}\n", describe(&error)));
                failed = true;
            }
        }
    }
    if failed { Err(Failure::silent(1)) } else { Ok(0) }
}

/// Prints what is known of each, as one array. `place` is where the API has things of this kind.
pub(super) async fn inspect(docker: &Docker, place: &str, names: &[String]) -> Outcome {
    let mut found: Vec<Value> = Vec::new();
    let mut failed = false;
    for name in names {
        let answer = docker.get(&format!("{place}/{}", escape(name))).await;
        match answer.with_context(|| format!("cannot find {name}")) {
            Ok(thing) => found.push(thing),
            Err(error) => {
                terminal::complain(&format!("coracle: {}\n", describe(&error)));
                failed = true;
            }
        }
    }
    terminal::print(&format!("{:#}\n", Value::from(found)))?;
    if failed { Err(Failure::silent(1)) } else { Ok(0) }
}
