//! Coracle's own endpoints, beside Docker's on the same socket. They have no versions; the CLI is of the same build.
//!
//! | method and path | answer |
//! |---|---|
//! | `GET /coracle/status` | `{"version","pid","started","containers":{"total","running"},"images","sandboxes":[{"id","state","reason","lost","adopted","agent_version","kernel_release","boot":[{"name","micros"}],"guest_boot":[{"name","guest_micros"}],"layers"}]}`; what is not known is `null` |
//! | `GET /coracle/timings/{container}` | where the time of the newest start went: `{"id","name","unix_nanos","phases":[{"name","micros"}],"agent":[{"name","micros"}]}`; phases are counted from the moment `unix_nanos` at which the create request was read, the agent's from its own reading of the start request; also after the container was removed |
//! | `GET /coracle/egress?container=NAME` | the newest connections that containers asked for, oldest first: `[{"Time","Container","Name","Protocol","Destination","Host","Allowed","Reason"}]` |
//! | `POST /coracle/down?t=SECONDS` | 204 when all containers are stopped (each with its own stop timeout, or the one given) and all sandboxes are shut down; the daemon then ends |
//! | `GET /coracle/containers/{id}/layer` | what the container changed in its image's files: a tar stream with OCI whiteouts |
//! | `GET /coracle/vm/kmsg?sandbox=NAME&follow=0` | the guest kernel's log as text, from its beginning; without `follow=0` also on as it grows |

use std::sync::Arc;

use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::{images, to_its_end};
use crate::{
    error::{Error, Result},
    http::{Request, Response, body},
    sandbox::{SandboxId, SandboxState},
    sandboxes::Host,
};

pub(crate) async fn status(request: &Request) -> Result<Response> {
    let core = &request.core;
    let count = images(core, |images| images.list().map(|list| list.len())).await?;
    let all = core.containers.all();
    let running = all.iter().filter(|container| container.is_active()).count();
    let mut sandboxes = Vec::new();
    for host in core.sandboxes.all() {
        sandboxes.push(sandbox(&host).await);
    }
    Ok(body::ok(&json!({
        "version": core.config.version,
        "pid": std::process::id(),
        "started": core.started.rfc3339(),
        "containers": { "total": all.len(), "running": running },
        "images": count,
        "sandboxes": sandboxes,
    })))
}

async fn sandbox(host: &Host) -> Value {
    let state = host.state().borrow().clone();
    let reason = match &state {
        SandboxState::Died { reason } => Some(reason.clone()),
        _ => None,
    };
    let running = state.running();
    let hello = running.and_then(|running| running.hello.as_ref());
    json!({
        "id": host.id().as_str(),
        "state": state.name(),
        "reason": reason,
        "lost": running.and_then(|running| running.lost.as_ref()),
        "adopted": running.map(|running| running.adopted),
        "agent_version": hello.map(|hello| &hello.agent_version),
        "kernel_release": hello.map(|hello| &hello.kernel_release),
        "boot": running.map(|running| json!(running.boot)),
        "guest_boot": hello.map(|hello| json!(hello.phases)),
        "layers": host.layers().await,
    })
}

pub(crate) fn timings(request: &Request, container: &str) -> Result<Response> {
    let report = request.core.timings.find(container);
    let report = report
        .ok_or_else(|| Error::not_found(format!("no start of a container {container} is remembered")))?;
    Ok(body::ok(&report))
}

pub(crate) fn egress(request: &Request) -> Result<Response> {
    let container =
        request.query.get("container").map(|name| request.core.containers.find(name)).transpose()?;
    Ok(body::ok(&request.core.audit.lines(container.as_ref().map(|container| container.id().as_str()))))
}

pub(crate) async fn down(request: &Request) -> Result<Response> {
    let timeout = request.query.number("t")?;
    let core = Arc::clone(&request.core);
    to_its_end(&request.core, async move { core.go_down(timeout).await }).await?;
    Ok(body::empty(http::StatusCode::NO_CONTENT))
}

pub(crate) async fn kmsg(request: &Request) -> Result<Response> {
    let id = match request.query.get("sandbox") {
        Some(name) => {
            name.parse().map_err(|error: crate::sandbox::SandboxIdError| Error::invalid(error.to_string()))?
        }
        None => SandboxId::shared(),
    };
    let hosts = request.core.sandboxes.all();
    let host = hosts.iter().find(|host| *host.id() == id && host.is_running());
    let host = host.ok_or_else(|| {
        Error::conflict(format!("the sandbox `{id}` is not running, so its kernel has no log to show"))
    })?;
    let mut kernel_log = host.agent().kmsg(request.query.flag_or("follow", true)).await?;
    let (feed, response) = body::stream("text/plain; charset=utf-8");
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(async move {
        loop {
            let frame = tokio::select! {
                () = feed.closed() => return,
                frame = kernel_log.frame() => frame,
            };
            let Some(Ok(frame)) = frame else { return };
            if let Ok(data) = frame.into_data()
                && feed.send(data).await.is_err()
            {
                return;
            }
        }
    }));
    Ok(response)
}
