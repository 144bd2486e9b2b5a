//! `/_ping`, `/version`, `/info`, `/system/df`.

use http::{HeaderValue, StatusCode};
use serde_json::json;

use super::{
    images,
    images::list::{Details, summary},
};
use crate::{
    container::state::Status,
    error::Result,
    http::{
        Request, Response, body,
        version::{NEWEST, OLDEST},
    },
    sandbox::SandboxId,
    time::UnixNanos,
};

/// The daemon's architecture in the words of Go.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

pub(crate) fn ping() -> Response {
    let mut response = body::text("OK");
    let headers = response.headers_mut();
    headers.insert("builder-version", HeaderValue::from_static("1"));
    headers.insert("cache-control", HeaderValue::from_static("no-cache, no-store, must-revalidate"));
    headers.insert("pragma", HeaderValue::from_static("no-cache"));
    headers.insert("swarm", HeaderValue::from_static("inactive"));
    response
}

/// The kernel that containers see: the guest's if one runs, else the host's, which would run it.
fn kernel_version(request: &Request) -> String {
    let state = request.core.sandboxes.get(&SandboxId::shared()).state();
    let guest = state
        .borrow()
        .running()
        .and_then(|running| running.hello.as_ref().map(|hello| hello.kernel_release.clone()));
    guest.unwrap_or_else(|| rustix::system::uname().release().to_string_lossy().into_owned())
}

pub(crate) fn version(request: &Request) -> Response {
    let config = &request.core.config;
    let kernel = kernel_version(request);
    body::ok(&json!({
        "Platform": { "Name": "Coracle" },
        "Components": [{
            "Name": "Engine",
            "Version": config.version,
            "Details": {
                "ApiVersion": NEWEST.to_string(),
                "MinAPIVersion": OLDEST.to_string(),
                "Arch": architecture(),
                "Os": "linux",
                "GitCommit": config.git_commit,
                "KernelVersion": kernel,
                "Experimental": "false",
            },
        }],
        "Version": config.version,
        "ApiVersion": NEWEST.to_string(),
        "MinAPIVersion": OLDEST.to_string(),
        "GitCommit": config.git_commit,
        "GoVersion": "",
        "Os": "linux",
        "Arch": architecture(),
        "KernelVersion": kernel,
    }))
}

pub(crate) async fn info(request: &Request) -> Result<Response> {
    let core = &request.core;
    let count_images = images(core, |images| images.list().map(|list| list.len())).await?;
    let all = core.containers.all();
    let statuses: Vec<Status> = all.iter().map(|container| container.record().state.status).collect();
    let count = |wanted: Status| statuses.iter().filter(|status| **status == wanted).count();
    let (running, paused) = (count(Status::Running) + count(Status::Restarting), count(Status::Paused));
    let uname = rustix::system::uname();
    let memory = rustix::system::sysinfo();
    let total = u64::from(memory.mem_unit).saturating_mul(memory.totalram);
    let registries = super::registry::config(&core.config.registries.load()?);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(body::ok(&json!({
        "ID": "",
        "Name": uname.nodename().to_string_lossy(),
        "Containers": all.len(),
        "ContainersRunning": running,
        "ContainersPaused": paused,
        "ContainersStopped": all.len() - running - paused,
        "Images": count_images,
        "Driver": "erofs",
        "DriverStatus": [["Layers", "one EROFS image each, under overlay"]],
        "Plugins": { "Volume": [], "Network": [], "Authorization": null, "Log": ["json-file", "local", "none"] },
        "MemoryLimit": true,
        "SwapLimit": true,
        "CpuCfsPeriod": true,
        "CpuCfsQuota": true,
        "CPUShares": true,
        "CPUSet": true,
        "PidsLimit": true,
        "IPv4Forwarding": false,
        "OomKillDisable": false,
        "Debug": false,
        "NFd": 0,
        "NGoroutines": 0,
        "SystemTime": UnixNanos::now().rfc3339(),
        "LoggingDriver": "json-file",
        "CgroupDriver": "cgroupfs",
        "CgroupVersion": "2",
        "NEventsListener": core.events.listeners(),
        "KernelVersion": kernel_version(request),
        "OperatingSystem": "Coracle",
        "OSVersion": "",
        "OSType": "linux",
        "Architecture": std::env::consts::ARCH,
        "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": registries,
        "NCPU": cpus,
        "MemTotal": total,
        "GenericResources": null,
        "DockerRootDir": core.config.home.to_string_lossy(),
        "HttpProxy": "",
        "HttpsProxy": "",
        "NoProxy": "",
        "Labels": [],
        "ExperimentalBuild": false,
        "ServerVersion": core.config.version,
        "Runtimes": { "runc": { "path": "coracle-agent" }, "io.containerd.runc.v2": { "path": "coracle-agent" } },
        "DefaultRuntime": "runc",
        "Swarm": { "NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": false, "Error": "", "RemoteManagers": null },
        "LiveRestoreEnabled": true,
        "Isolation": "",
        "InitBinary": "coracle-agent",
        "ContainerdCommit": { "ID": "" },
        "RuncCommit": { "ID": "" },
        "InitCommit": { "ID": "" },
        "SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns"],
        "Warnings": null,
    })))
}

pub(crate) async fn disk_usage(request: &Request) -> Result<Response> {
    let core = &request.core;
    let list = images(core, coracle_image_store::ImageStore::list).await?;
    let all = core.containers.all();
    let users = |id: &coracle_image_store::ImageId| {
        all.iter().filter(|container| container.record().image() == *id).count()
    };
    let total = images(core, coracle_image_store::ImageStore::layers_size).await?;
    let details = Details { version: request.version, shared_size: true };
    let summaries: Vec<_> = list.iter().map(|image| summary(image, users(&image.id), details)).collect();
    let mut containers = Vec::with_capacity(all.len());
    for container in &all {
        let mut summary = super::list::summary(core, container);
        // No sandbox is started to be asked for sizes.
        if core.sandboxes.get(&container.record().sandbox).is_running() {
            super::list::add_sizes(core, container, &mut summary).await;
        }
        containers.push(summary);
    }
    let volumes = super::volumes::usage(core).await;
    Ok(body::json(
        StatusCode::OK,
        &json!({
            "LayersSize": total,
            "Images": summaries,
            "Containers": containers,
            "Volumes": volumes,
            "BuildCache": [],
        }),
    ))
}

/// `POST /build/prune`: nothing is kept of builds, so there is nothing to free.
pub(crate) fn prune_build_cache() -> Response {
    body::ok(&json!({ "CachesDeleted": [], "SpaceReclaimed": 0 }))
}
