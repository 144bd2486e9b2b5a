//! `coracle stop`, `restart`, `kill`, `wait`, `rm` and `rename`: one call for each container that was named. One that fails
//! does not keep the others from their turn.

use anyhow::{Context, Result};
use serde::Deserialize;

use super::each;
use crate::{
    args::{Containers, KillArgs, RenameArgs, RmArgs, StopArgs},
    client::{self, Docker, escape},
    failure::Outcome,
    paths::Home,
};

/// Stops or restarts containers.
pub(super) async fn stop(home: &Home, args: &StopArgs, verb: &str) -> Outcome {
    let mut query = Vec::new();
    query.extend(args.timeout.map(|seconds| format!("t={seconds}")));
    query.extend(args.signal.as_ref().map(|signal| format!("signal={}", escape(signal))));
    let query = query.join("&");
    each(home, &args.targets, verb, async |docker, name| {
        docker.post(&format!("/containers/{}/{verb}?{query}", escape(name))).await?;
        Ok(name.to_owned())
    })
    .await
}

/// Sends a signal to containers.
pub(super) async fn kill(home: &Home, args: &KillArgs) -> Outcome {
    each(home, &args.targets, "kill", async |docker, name| {
        docker.post(&format!("/containers/{}/kill?signal={}", escape(name), escape(&args.signal))).await?;
        Ok(name.to_owned())
    })
    .await
}

/// Waits for containers.
pub(super) async fn wait(home: &Home, targets: &Containers) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Ended {
        status_code: i64,
    }
    each(home, targets, "wait for", async |docker, name| {
        let path = format!("/containers/{}/wait", escape(name));
        let ended: Ended = docker.post_json(&path, &serde_json::json!({})).await?;
        Ok(ended.status_code.to_string())
    })
    .await
}

/// Removes containers.
pub(super) async fn remove(home: &Home, args: &RmArgs) -> Outcome {
    each(home, &args.targets, "remove", async |docker, name| {
        let (force, volumes) = (u8::from(args.force), u8::from(args.volumes));
        docker.delete(&format!("/containers/{}?force={force}&v={volumes}", escape(name))).await?;
        Ok(name.to_owned())
    })
    .await
}

/// Gives a container another name.
pub(super) async fn rename(home: &Home, args: &RenameArgs) -> Outcome {
    let docker = client::connect(home).await?;
    let path = format!("/containers/{}/rename?name={}", escape(&args.container), escape(&args.name));
    docker.post(&path).await.with_context(|| format!("cannot rename {}", args.container))?;
    Ok(0)
}

/// Does something to each container and prints what it gives, or why it failed.
pub(super) async fn each(
    home: &Home,
    targets: &Containers,
    verb: &str,
    act: impl AsyncFn(&Docker, &str) -> Result<String>,
) -> Outcome {
    each::each(&client::connect(home).await?, &targets.containers, verb, act).await
}
