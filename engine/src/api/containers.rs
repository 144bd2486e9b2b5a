//! `/containers/*`: lists, inspection, and what changes a container's state.

use std::sync::Arc;

use coracle_agent_api::TerminalSize;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{list, networks, refuse, to_its_end};
use crate::{
    container::{Container, Stop, files, health::Health, mounts, record::Record, signal, state::Status},
    core::Core,
    error::{Error, Result},
    exec::not_running,
    http::{Request, Response, body},
    time::or_never,
};

pub(crate) async fn list(request: &Request) -> Result<Response> {
    let containers = list::select(&request.core, &request.query)?;
    let with_size = request.query.flag("size");
    let mut summaries = Vec::with_capacity(containers.len());
    for container in containers {
        let mut summary = list::summary(&request.core, &container);
        if with_size {
            list::add_sizes(&request.core, &container, &mut summary).await;
        }
        summaries.push(summary);
    }
    Ok(body::ok(&summaries))
}

pub(crate) async fn start(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    refuse(request, "checkpoint", "--checkpoint")?;
    let asked = request.received;
    to_its_end(&request.core, async move { container.start(asked).await }).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn stop(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let stop = stop_options(request)?;
    to_its_end(&request.core, async move { container.stop(stop).await }).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn restart(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let stop = stop_options(request)?;
    to_its_end(&request.core, async move { container.restart(stop).await }).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

fn stop_options(request: &Request) -> Result<Stop> {
    let signal = request.query.get("signal").map(signal::parse).transpose()?;
    Ok(Stop { signal, timeout: request.query.number("t")?, by_user: true })
}

pub(crate) async fn kill(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let number = request.query.get("signal").map_or(Ok(signal::SIGKILL), signal::parse)?;
    to_its_end(&request.core, async move {
        let exits = container.lifecycle();
        let before = exits.borrow().exits;
        container.kill_with(number).await?;
        if number == signal::SIGKILL && container.is_running() {
            // As in Docker, a killed container has ended when the call returns.
            let mut exits = exits;
            let ended = exits.wait_for(|now| now.exits > before || now.removed);
            let _ = tokio::time::timeout(std::time::Duration::from_secs(10), ended).await;
        }
        Ok(())
    })
    .await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn pause(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    to_its_end(&request.core, async move { container.pause().await }).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn unpause(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    to_its_end(&request.core, async move { container.unpause().await }).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn rename(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let name =
        request.query.get("name").ok_or_else(|| Error::invalid("Neither old nor new names may be empty"))?;
    container.rename(name.to_owned()).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn remove(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    refuse(request, "link", "--link")?;
    let force = request.query.flag("force");
    let volumes = request.query.flag("v");
    to_its_end(&request.core, async move { container.remove(force, volumes).await }).await?;
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn resize(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let record = container.record();
    let size = terminal_size(request)?;
    if !record.state.status.is_running() {
        return Err(not_running(&record));
    }
    request.core.sandboxes.get(&record.sandbox).agent().resize(&record.id, size).await?;
    Ok(body::empty(StatusCode::OK))
}

/// Reads `h` and `w`.
pub(super) fn terminal_size(request: &Request) -> Result<TerminalSize> {
    let number = |name: &str| -> Result<u16> {
        request
            .query
            .number(name)?
            .ok_or_else(|| Error::invalid(format!("the terminal's size is missing: `{name}`")))
    };
    Ok(TerminalSize { rows: number("h")?, cols: number("w")? })
}

pub(crate) async fn inspect(request: &Request, id: &str) -> Result<Response> {
    let container = request.core.containers.find(id)?;
    let execs = request.core.execs.of(container.id());
    let mut description = describe(&request.core, &container, &execs);
    if request.query.flag("size") {
        let (written, all) = files::sizes(&request.core, &container).await?;
        description["SizeRw"] = json!(written);
        description["SizeRootFs"] = json!(all);
    }
    Ok(body::ok(&description))
}

fn describe(core: &Core, container: &Arc<Container>, execs: &[String]) -> Value {
    let record = container.record();
    let command = record.config.command();
    let tells_path = record.host_config.log_config.driver == "json-file";
    let log_path = container
        .log()
        .filter(|_| tells_path)
        .map(|log| log.path().to_string_lossy().into_owned())
        .unwrap_or_default();
    json!({
        "Id": record.id.as_str(),
        "Created": record.created.rfc3339(),
        "Path": command.first(),
        "Args": command.get(1..).unwrap_or_default(),
        "State": state(&record, container.health().as_ref()),
        "Image": record.image().to_string(),
        "ResolvConfPath": "",
        "HostnamePath": "",
        "HostsPath": "",
        "LogPath": log_path,
        "Name": format!("/{}", record.name),
        "RestartCount": record.state.restarts,
        "Driver": "erofs",
        "Platform": record.platform.split('/').next(),
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": if execs.is_empty() { Value::Null } else { json!(execs) },
        "HostConfig": host_config(&record),
        "GraphDriver": { "Name": "erofs", "Data": {} },
        "Mounts": mounts::describe(core, &record),
        "Config": config(&record),
        "NetworkSettings": networks::settings(core, &record),
    })
}

fn state(record: &Record, health: Option<&Health>) -> Value {
    let state = &record.state;
    let mut value = json!({
        "Status": state.status.name(),
        "Running": state.status.is_active(),
        "Paused": state.status == Status::Paused,
        "Restarting": state.status == Status::Restarting,
        "OOMKilled": state.oom_killed,
        "Dead": state.status == Status::Dead,
        "Pid": state.pid,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": or_never(state.started),
        "FinishedAt": or_never(state.finished),
    });
    if let Some(health) = health {
        value["Health"] = health.describe();
    }
    value
}

fn config(record: &Record) -> Value {
    let mut value = serde_json::to_value(&record.config).expect("a configuration has no map with odd keys");
    if let Some(members) = value.as_object_mut() {
        let volumes = members.get("Volumes").and_then(Value::as_object).is_some_and(Map::is_empty);
        if volumes {
            members.insert("Volumes".to_owned(), Value::Null);
        }
        members.insert("OnBuild".to_owned(), Value::Null);
        members.remove("NetworkDisabled");
    }
    value
}

/// What was asked for, and Docker's defaults for what cannot be asked for yet.
fn host_config(record: &Record) -> Value {
    let mut value = json!({
        "Cgroup": "",
        "CpuRealtimePeriod": 0,
        "CpuRealtimeRuntime": 0,
        "DeviceRequests": null,
        "CpuCount": 0,
        "CpuPercent": 0,
        "IOMaximumIOps": 0,
        "IOMaximumBandwidth": 0,
    });
    let own = serde_json::to_value(&record.host_config).expect("a configuration has no map with odd keys");
    if let (Some(all), Value::Object(own)) = (value.as_object_mut(), own) {
        let empty_is_null = [
            "Binds",
            "CapAdd",
            "CapDrop",
            "DeviceCgroupRules",
            "ExtraHosts",
            "GroupAdd",
            "Links",
            "SecurityOpt",
            "VolumesFrom",
        ];
        for (name, value) in own {
            if name == "Mounts" && value.as_array().is_some_and(Vec::is_empty) {
                continue;
            }
            let empty = value.as_array().is_some_and(Vec::is_empty) && empty_is_null.contains(&name.as_str());
            all.insert(name, if empty { Value::Null } else { value });
        }
    }
    value
}
