//! `/containers/{id}/exec` and `/exec/*`.

use std::sync::Arc;

use http::StatusCode;
use serde::Deserialize;
use serde_json::json;

use super::{attach::Session, containers::terminal_size, to_its_end};
use crate::{
    container::options,
    error::{Error, Result},
    exec::{Exec, ExecConfig, check_container},
    http::{
        Request, Response, body,
        detach::DetachKeys,
        hijack::{self, Framing, content_type},
    },
    io::Chunk,
};

/// Body of a start.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct StartOptions {
    detach: bool,
    tty: bool,
    console_size: Option<[u32; 2]>,
}

pub(crate) async fn create(mut request: Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let config = ExecConfig::parse(&request.read_body().await?)?;
    let keys = &config.detach_keys;
    DetachKeys::parse((!keys.is_empty()).then_some(keys.as_str()))?;
    check_container(&container.record())?;
    let exec = request.core.execs.create(&container, config)?;
    Ok(body::json(StatusCode::CREATED, &json!({ "Id": exec.id.as_str() })))
}

pub(crate) async fn start(mut request: Request, id: &str) -> Result<Response> {
    let exec = request.core.execs.find(id)?;
    let body = request.read_body().await?;
    let options: StartOptions =
        if body.is_empty() { StartOptions::default() } else { options::typed(options::object(&body)?)? };
    check_container(&exec.container.record())?;
    if exec.state().begun {
        return Err(Error::conflict(format!("exec command {} is already running or has run", exec.id)));
    }
    let core = Arc::clone(&request.core);
    if options.detach {
        let size = options.console_size;
        let exec = Arc::clone(&exec);
        to_its_end(&request.core, async move { exec.start(&core, size).await }).await?;
        return Ok(body::empty(StatusCode::OK));
    }
    // As in Docker, whoever starts it says how its output comes, whether or not it has a terminal.
    let content_type = content_type(options.tty, request.version);
    let session = session(&exec, Framing::of(options.tty))?;
    if hijack::wants_upgrade(&request) {
        return hijack::hijack(
            &mut request,
            content_type,
            move |incoming, mut outgoing, presence| async move {
                let (starter, started) = (Arc::clone(&core), Arc::clone(&exec));
                let result =
                    to_its_end(&core, async move { started.start(&starter, options.console_size).await })
                        .await;
                if let Err(error) = result {
                    // The head is out: the error is a part of the stream, and the exit code tells the class.
                    let _ = outgoing
                        .send(
                            &session
                                .framing
                                .frame(crate::logs::Stream::Stderr, format!("{error}\r\n").as_bytes()),
                        )
                        .await;
                    outgoing.close().await;
                    return;
                }
                session.run(incoming, outgoing, presence).await;
            },
        );
    }
    if exec.config.attach_stdin {
        return Err(Error::invalid(
            "attaching to standard input needs a connection that can be upgraded: send `Connection: Upgrade` and `Upgrade: tcp`",
        ));
    }
    plain(&request, &exec, session, content_type, options.console_size).await
}

fn session(exec: &Arc<Exec>, framing: Framing) -> Result<Session> {
    let config = &exec.config;
    let tty = config.tty;
    let (output, _) = exec.fanout.subscribe(config.attach_stdout, config.attach_stderr, None);
    let keys = (!config.detach_keys.is_empty()).then_some(config.detach_keys.as_str());
    Ok(Session {
        replay: None,
        output: Some(output),
        input: config.attach_stdin.then(|| exec.stdin.sender()),
        framing,
        closes_stdin: !tty,
        detach: if tty && config.attach_stdin { Some(DetachKeys::parse(keys)?) } else { None },
    })
}

/// Output as an ordinary body, for clients that only listen.
async fn plain(
    request: &Request,
    exec: &Arc<Exec>,
    session: Session,
    content_type: &'static str,
    size: Option<[u32; 2]>,
) -> Result<Response> {
    let (core, started) = (Arc::clone(&request.core), Arc::clone(exec));
    to_its_end(&request.core, async move { started.start(&core, size).await }).await?;
    let (feed, response) = body::stream(content_type);
    let Session { output, framing, .. } = session;
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(async move {
        let Some(mut output) = output else { return };
        while let Some(Chunk { stream, bytes }) = output.recv().await {
            if feed.send(framing.frame(stream, &bytes)).await.is_err() {
                return;
            }
        }
    }));
    Ok(response)
}

pub(crate) fn inspect(request: &Request, id: &str) -> Result<Response> {
    let exec = request.core.execs.find(id)?;
    let state = exec.state();
    let config = &exec.config;
    Ok(body::ok(&json!({
        "ID": exec.id.as_str(),
        "Running": state.running,
        "ExitCode": state.exit_code,
        "ProcessConfig": {
            "tty": config.tty,
            "entrypoint": config.cmd.first(),
            "arguments": config.cmd.get(1..).unwrap_or_default(),
            "privileged": config.privileged,
            "user": config.user,
        },
        "OpenStdin": config.attach_stdin,
        "OpenStdout": config.attach_stdout,
        "OpenStderr": config.attach_stderr,
        "CanRemove": state.exit_code.is_some(),
        "ContainerID": exec.container.id().as_str(),
        "DetachKeys": config.detach_keys,
        "Pid": state.pid,
    })))
}

pub(crate) async fn resize(request: &Request, id: &str) -> Result<Response> {
    let exec = request.core.execs.find(id)?;
    let size = terminal_size(request)?;
    let record = exec.container.record();
    exec.wait_for_start().await?;
    request.core.sandboxes.get(&record.sandbox).agent().resize(&exec.id, size).await?;
    Ok(body::empty(StatusCode::OK))
}
