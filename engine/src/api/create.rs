//! `/containers/create`: from a checked request and an image to a container on disk.

use std::sync::Arc;

use coracle_image_store::{Image, Platform};
use http::StatusCode;
use serde_json::json;

use super::images;
use crate::{
    container::{
        Container, actor,
        config::{Config, HostConfig},
        isolation,
        mounts::{
            self, Wanted,
            confine::{check_policy, confine},
        },
        names,
        options::CreateRequest,
        record::Record,
    },
    core::Core,
    egress::policy::Policy,
    error::{Error, Result, chain},
    http::{Request, Response, body},
    sandbox::SandboxId,
};

pub(crate) async fn create(mut request: Request) -> Result<Response> {
    let body = request.read_body().await?;
    let CreateRequest { mut config, mut host_config, networks, warnings } = CreateRequest::parse(&body)?;
    let core = &request.core;
    // Until the container is known, its image must not go.
    let _image_stays = core.image_gate.read().await;
    let image = find_image(&request, &config).await?;
    let platform = check_platform(&request, &image)?;
    config.merge_image(&image.config.config)?;
    let policy = Policy::of(config.labels.iter())?;
    if !config.working_dir.is_empty() && !config.working_dir.starts_with('/') {
        return Err(Error::invalid(format!(
            "the image's working directory '{}' is not an absolute path",
            config.working_dir
        )));
    }
    name_donors(&request, &mut host_config);
    let networks = core.wanted_networks(&mut config, &mut host_config, networks)?;
    // Until the container is known, its volumes must not go.
    let _volumes_stay = core.volumes.gate.read().await;
    let mut wanted = mounts::wanted(core, &config, &host_config)?;
    let asker = request.asker.as_ref().map(|asker| asker.record());
    confine(&mut wanted, &core.sockets(), asker.as_deref())?;
    check_policy(&wanted, &policy)?;
    check_sources(core, &wanted).await?;
    let sandbox = SandboxId::shared();
    warm_up(&request, &sandbox);
    let id = names::new_id();
    fill_defaults(&mut config, &mut host_config, id.short());
    let mut warnings = warnings;
    if host_config.network_mode == "host"
        && (!host_config.port_bindings.is_empty() || host_config.publish_all_ports)
    {
        warnings.push("Published ports are discarded when using host network mode".to_owned());
    }
    let name = core.containers.reserve(request.query.get("name"), &id)?;
    let trace = core.timings.begin(id.as_str(), &name, request.received);
    let mut record = Record::new(
        id,
        name.clone(),
        SandboxId::shared(),
        &image.id,
        platform.to_string(),
        config,
        host_config,
    );
    record.networks = networks;
    let result = make(&request, record, wanted).await;
    let container = match result {
        Ok(container) => container,
        Err(error) => {
            core.containers.release(&name);
            return Err(error);
        }
    };
    trace.mark("created");
    container.set_trace(trace);
    let record = container.record();
    core.events.container("create", record.id.as_str(), &record.config.image, record.event_attributes());
    Ok(body::json(StatusCode::CREATED, &json!({ "Id": record.id.as_str(), "Warnings": warnings })))
}

/// Writes it down, then lets it be found.
async fn make(request: &Request, mut record: Record, wanted: Wanted) -> Result<Arc<Container>> {
    let core = &request.core;
    let (volumes, made) = core.make_volumes(wanted.volumes).await?;
    record.volumes = volumes;
    record.binds = wanted.binds;
    let result = write_down(core, record).await;
    if result.is_err() {
        core.undo_volumes(&made).await;
    }
    result
}

/// Misses early what a start would miss.
async fn check_sources(core: &Core, wanted: &Wanted) -> Result<()> {
    if wanted.binds.is_empty() {
        return Ok(());
    }
    let (binds, sockets) = (wanted.binds.clone(), core.sockets());
    tokio::task::spawn_blocking(move || {
        let mut trees = binds.iter().filter(|bind| !bind.engine);
        trees.try_for_each(|bind| mounts::source::check(bind, &sockets))
    })
    .await?
}

async fn write_down(core: &Arc<Core>, record: Record) -> Result<Arc<Container>> {
    let folder = core.container_folder(&record.id);
    std::fs::create_dir_all(&folder).map_err(|error| {
        Error::internal(format!("cannot make the container's folder {}: {error}", folder.display()))
    })?;
    let (id, encoded) = (record.id.clone(), record.encode());
    let made = match core.store.put(id.as_str(), encoded).await {
        Ok(()) => actor::spawn(core, record).map_err(Error::from),
        Err(error) => Err(error.into()),
    };
    match made {
        Ok(container) => {
            core.containers.insert(&container);
            Ok(container)
        }
        Err(error) => {
            let _ = core.store.delete(id.as_str(), &[]).await;
            let _ = std::fs::remove_dir_all(&folder);
            Err(error)
        }
    }
}

/// Starts the sandbox while the container is written down and the client makes its next calls.
fn warm_up(request: &Request, sandbox: &SandboxId) {
    let core = Arc::clone(&request.core);
    let host = core.sandboxes.get(sandbox);
    if host.is_running() {
        return;
    }
    request.core.tasks.spawn(request.core.closing.clone().run_until_cancelled_owned(async move {
        if let Err(error) = core.start_sandbox(&host).await {
            // Whoever starts the container is told.
            tracing::warn!(sandbox = %host.id(), error = chain(&error), "the sandbox did not start");
        }
    }));
}

async fn find_image(request: &Request, config: &Config) -> Result<Image> {
    let name = config.image.clone();
    images(&request.core, move |images| images.image(&images.resolve(&name)?)).await
}

/// The image must be for this machine, and for the platform that was asked for.
fn check_platform<'a>(request: &Request, image: &'a Image) -> Result<&'a Platform> {
    let platform = &image.platform;
    if let Some(wanted) = request.query.get("platform") {
        let mut parts = wanted.split('/');
        let (os, architecture) = (parts.next().unwrap_or_default(), parts.next());
        let variant = parts.next();
        let os_fits = os.eq_ignore_ascii_case(&platform.os);
        let architecture_fits =
            architecture.is_none_or(|wanted| normalized(wanted) == normalized(&platform.architecture));
        let variant_fits =
            variant.is_none_or(|wanted| platform.variant.as_deref().is_none_or(|own| own == wanted));
        // A lone word may be an architecture.
        let lone = architecture.is_none() && normalized(os) == normalized(&platform.architecture);
        if !(os_fits && architecture_fits && variant_fits || lone) {
            let name: String = request.query.get("platform").unwrap_or_default().chars().take(60).collect();
            return Err(Error::not_found(format!(
                "image with reference {} was found but its platform ({platform}) does not match the specified platform ({name})",
                image.repo_tags.first().cloned().unwrap_or_else(|| image.id.to_string())
            )));
        }
    }
    if !platform.runs_on_host() {
        return Err(Error::invalid(format!(
            "the image is for {platform}, and this machine runs {}: load the image for this platform",
            Platform::host()
        )));
    }
    Ok(platform)
}

fn normalized(architecture: &str) -> &str {
    match architecture {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A container is remembered by its id, so that it can be renamed. As in Docker, one that is missing is missed at the start.
fn name_donors(request: &Request, host_config: &mut HostConfig) {
    for mode in [&mut host_config.ipc_mode, &mut host_config.pid_mode] {
        if let Some(donor) = isolation::donor(mode).and_then(|name| request.core.containers.find(name).ok()) {
            *mode = format!("container:{}", donor.id());
        }
    }
}

fn fill_defaults(config: &mut Config, host_config: &mut HostConfig, short_id: &str) {
    if config.hostname.is_empty() {
        short_id.clone_into(&mut config.hostname);
    }
    if host_config.log_config.driver.is_empty() {
        "json-file".clone_into(&mut host_config.log_config.driver);
    }
    if host_config.restart_policy.name.is_empty() {
        "no".clone_into(&mut host_config.restart_policy.name);
    }
    for (value, default) in [
        (&mut host_config.ipc_mode, "private"),
        (&mut host_config.cgroupns_mode, "private"),
        (&mut host_config.runtime, "runc"),
    ] {
        if value.is_empty() {
            default.clone_into(value);
        }
    }
    if host_config.memory > 0 && host_config.memory_swap == 0 {
        host_config.memory_swap = host_config.memory.saturating_mul(2);
    }
    if host_config.shm_size == 0 {
        host_config.shm_size = crate::container::options::DEFAULT_SHM;
    }
}
