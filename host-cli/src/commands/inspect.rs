//! `coracle inspect`: containers and images as JSON.

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, ser::PrettyFormatter};

use crate::{
    args::{InspectArgs, ObjectKind},
    client::{self, ClientError, Docker, escape},
    failure::{Failure, Outcome},
    paths::Home,
    terminal,
};

/// Prints what is known of each name, as one array.
pub(super) async fn run(home: &Home, args: &InspectArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let mut found = Vec::new();
    let mut failed = false;
    for name in &args.names {
        match look_up(&docker, name, args.kind).await {
            Ok(value) => found.push(value),
            Err(error) if error.is_not_found() => {
                terminal::complain(&format!(
                    "coracle: cannot inspect {name}: there is no such {}\n",
                    kind_name(args.kind)
                ));
                failed = true;
            }
            Err(error) => {
                return Err(anyhow::Error::new(error).context(format!("cannot inspect {name}")).into());
            }
        }
    }
    let mut text = Vec::new();
    let mut serializer =
        serde_json::Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"    "));
    found.serialize(&mut serializer).context("cannot write the answer as JSON")?;
    terminal::print(&format!("{}\n", String::from_utf8_lossy(&text)))?;
    if failed { Err(Failure::silent(1)) } else { Ok(0) }
}

async fn look_up(docker: &Docker, name: &str, kind: Option<ObjectKind>) -> Result<Value, ClientError> {
    let name = escape(name);
    if kind != Some(ObjectKind::Image) {
        let container = docker.get(&format!("/containers/{name}/json")).await;
        match container {
            Err(error) if error.is_not_found() && kind.is_none() => {}
            decided => return decided,
        }
    }
    docker.get(&format!("/images/{name}/json")).await
}

fn kind_name(kind: Option<ObjectKind>) -> &'static str {
    match kind {
        None => "container or image",
        Some(ObjectKind::Container) => "container",
        Some(ObjectKind::Image) => "image",
    }
}
