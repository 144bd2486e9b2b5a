//! `coracle exec`: a further command in a running container.

use anyhow::Context;
use http::Method;
use serde::Deserialize;
use serde_json::json;

use super::session::{Ended, Session, Target, start_failure_code};
use crate::{
    args::ExecArgs,
    client::{self, ClientError, Docker, escape, json_body, stream::FirstByte},
    failure::{Failure, Outcome},
    paths::Home,
    terminal::DetachKeys,
};

/// Runs the command; its exit code is ours.
pub(super) async fn run(home: &Home, args: &ExecArgs) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Created {
        id: String,
    }
    Session::check_terminal(args.tty && !args.detach, args.interactive)?;
    let detach_keys = DetachKeys::parse(&args.detach_keys)?;
    let container = args.container();
    let docker = client::connect(home).await?;
    let path = format!("/containers/{}/exec", escape(container));
    let created: Created = docker
        .post_json(&path, &args.body()?)
        .await
        .with_context(|| format!("cannot run a command in {container}"))?;
    let start = format!("/exec/{}/start", escape(&created.id));
    let body = json_body(&json!({ "Detach": args.detach, "Tty": args.tty }))?;
    if args.detach {
        docker.call(Method::POST, &start, body).await.map_err(|error| refused(error, container))?;
        return Ok(0);
    }
    let streams = docker.hijack(&start, body).await.map_err(|error| refused(error, container))?;
    let session = Session {
        docker,
        target: Target::Exec,
        id: created.id,
        tty: args.tty,
        input: args.interactive,
        signals: false,
        detach_keys,
    };
    match session.follow(streams, &FirstByte::default()).await? {
        Ended::Output => exit_code(&session.docker, &session.id).await,
        Ended::Detached => Ok(0),
        Ended::Signal(number) => Err(Failure::silent(128 + number)),
    }
}

fn refused(error: ClientError, container: &str) -> Failure {
    let code = match &error {
        ClientError::Refused { message, .. } => match start_failure_code(message) {
            125 => 1,
            code => code,
        },
        _ => 1,
    };
    Failure::from(anyhow::Error::new(error).context(format!("cannot run a command in {container}")))
        .code(code)
}

async fn exit_code(docker: &Docker, id: &str) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Ended {
        exit_code: Option<i64>,
    }
    let ended: Ended = docker
        .get(&format!("/exec/{}/json", escape(id)))
        .await
        .context("cannot tell how the command ended")?;
    let code =
        ended.exit_code.context("cannot tell how the command ended: the daemon does not know it yet")?;
    Ok(u8::try_from(code).unwrap_or(1))
}
