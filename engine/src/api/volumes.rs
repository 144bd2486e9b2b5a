//! `/volumes/*`.

use std::{collections::BTreeMap, sync::Arc};

use coracle_agent_api::VolumeId;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::to_its_end;
use crate::{
    container::{mounts, options},
    core::Core,
    error::{Error, Kind, Result, chain},
    http::{Request, Response, body, filters::Filters, version::ApiVersion},
    volumes::Volume,
};

/// The first version of the API in which a prune leaves named volumes alone unless it is told otherwise.
const PRUNES_ANONYMOUS_ONLY: ApiVersion = ApiVersion(1, 42);

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct CreateRequest {
    name: String,
    driver: String,
    driver_opts: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    cluster_volume_spec: Option<Value>,
}

pub(crate) async fn create(mut request: Request) -> Result<Response> {
    let body = request.read_body().await?;
    let body = if body.is_empty() { b"{}".as_slice() } else { &body };
    let wanted: CreateRequest = options::typed(options::object(body)?)?;
    if wanted.cluster_volume_spec.is_some() {
        return Err(Error::unsupported("cluster volumes are not supported by Coracle: use local ones"));
    }
    if !matches!(wanted.driver.as_str(), "" | "local") {
        return Err(mounts::no_driver(Kind::NotFound, &wanted.driver));
    }
    if let Some(option) = wanted.driver_opts.keys().next() {
        return Err(mounts::no_driver_options(option));
    }
    let core = Arc::clone(&request.core);
    let volume = to_its_end(&request.core, async move {
        let name = Some(wanted.name.as_str()).filter(|name| !name.is_empty());
        let (volume, is_new) = core.volumes.make(&core.store, name, wanted.labels).await?;
        if is_new {
            core.events.volume("create", &volume.name, &[]);
        }
        Ok(volume)
    })
    .await?;
    Ok(body::json(StatusCode::CREATED, &describe(&volume)))
}

pub(crate) fn list(request: &Request) -> Result<Response> {
    let filters = Filters::of(&request.query, &["dangling", "driver", "label", "name"])?;
    let core = &request.core;
    let dangling = |wanted: &str| match wanted {
        "1" | "true" | "t" | "T" | "TRUE" | "True" => Ok(true),
        "0" | "false" | "f" | "F" | "FALSE" | "False" => Ok(false),
        other => Err(Error::invalid(format!(
            "invalid filter 'dangling=[{}]'",
            other.chars().take(40).collect::<String>()
        ))),
    };
    let dangling = filters.values("dangling").first().map(|wanted| dangling(wanted)).transpose()?;
    let fits = |volume: &Arc<Volume>| {
        dangling.is_none_or(|wanted| core.users_of_volume(&volume.name).is_empty() == wanted)
            && filters.any("driver", |wanted| wanted == "local")
            && filters.any("name", |wanted| volume.name.contains(wanted))
            && filters.labels("label", |name| volume.labels.get(name).map(String::as_str))
    };
    let volumes: Vec<_> =
        core.volumes.all().iter().filter(|volume| fits(volume)).map(|v| describe(v)).collect();
    Ok(body::ok(&json!({ "Volumes": volumes, "Warnings": null })))
}

pub(crate) fn inspect(request: &Request, name: &str) -> Result<Response> {
    Ok(body::ok(&describe(&*request.core.volumes.find(name)?)))
}

pub(crate) async fn remove(request: &Request, name: &str) -> Result<Response> {
    let (core, owned) = (Arc::clone(&request.core), name.to_owned());
    let removed = to_its_end(&request.core, async move { core.remove_volume(&owned).await }).await;
    match removed {
        Err(error) if error.status() == StatusCode::NOT_FOUND && request.query.flag("force") => {}
        other => other?,
    }
    Ok(body::empty(StatusCode::NO_CONTENT))
}

pub(crate) async fn prune(request: &Request) -> Result<Response> {
    let filters = Filters::of(&request.query, &["all", "label", "label!"])?;
    let all = match filters.values("all") {
        [] => request.version < PRUNES_ANONYMOUS_ONLY,
        [one] => matches!(one.as_str(), "1" | "true" | "t" | "T" | "TRUE" | "True"),
        _ => return Err(Error::invalid("invalid filter 'all': it can be given once")),
    };
    let core = Arc::clone(&request.core);
    let answer = to_its_end(&request.core, async move {
        let sizes = sizes(&core).await;
        let (mut deleted, mut reclaimed) = (Vec::new(), 0u64);
        for volume in core.volumes.all() {
            let label = |name: &str| volume.labels.get(name).map(String::as_str);
            let unwanted = !filters.values("label!").is_empty() && filters.labels("label!", label);
            if unwanted || !filters.labels("label", label) || !(all || volume.is_anonymous()) {
                continue;
            }
            match core.remove_volume(&volume.name).await {
                Ok(()) => {
                    reclaimed = reclaimed.saturating_add(sizes.get(&volume.id()).copied().unwrap_or(0));
                    deleted.push(volume.name.clone());
                }
                // It is in use, or someone else has removed it.
                Err(error) if matches!(error.status(), StatusCode::CONFLICT | StatusCode::NOT_FOUND) => {}
                Err(error) => tracing::warn!(%error, volume = volume.name, "cannot prune a volume"),
            }
        }
        Ok(json!({ "VolumesDeleted": deleted, "SpaceReclaimed": reclaimed }))
    })
    .await?;
    Ok(body::ok(&answer))
}

/// The volumes' part of `/system/df`.
pub(super) async fn usage(core: &Core) -> Vec<Value> {
    let sizes = sizes(core).await;
    let describe = |volume: &Arc<Volume>| {
        let mut described = describe(volume);
        // As in Docker, -1 is not known: the sandbox that has it does not run.
        let size = sizes.get(&volume.id()).map_or(-1, |bytes| i64::try_from(*bytes).unwrap_or(i64::MAX));
        let users = core.users_of_volume(&volume.name).len();
        described["UsageData"] = json!({ "Size": size, "RefCount": users });
        described
    };
    core.volumes.all().iter().map(describe).collect()
}

/// What volumes take, of those whose sandboxes run. One that was never mounted takes nothing.
async fn sizes(core: &Core) -> BTreeMap<VolumeId, u64> {
    let mut sizes = BTreeMap::new();
    for host in core.sandboxes.all().into_iter().filter(|host| host.is_running()) {
        let here = core.volumes.all().into_iter().filter(|volume| volume.sandbox == *host.id());
        let here: Vec<VolumeId> = here.map(|volume| volume.id()).collect();
        match host.agent().volumes().await {
            Ok(known) => {
                let known: BTreeMap<_, _> =
                    known.into_iter().map(|usage| (usage.volume, usage.bytes)).collect();
                sizes.extend(here.into_iter().map(|id| {
                    let bytes = known.get(&id).copied().unwrap_or(0);
                    (id, bytes)
                }));
            }
            Err(error) => tracing::warn!(error = chain(&error), "cannot measure volumes"),
        }
    }
    sizes
}

fn describe(volume: &Volume) -> Value {
    json!({
        "CreatedAt": volume.created.rfc3339(),
        "Driver": "local",
        "Labels": volume.labels,
        "Mountpoint": volume.mountpoint(),
        "Name": volume.name,
        "Options": null,
        "Scope": "local",
    })
}
