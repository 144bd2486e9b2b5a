//! `coracle status`: what runs, in words or as JSON.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    client::{self, Docker},
    failure::{Failure, Outcome},
    paths::Home,
    table::printable,
    terminal, vm,
};

/// What the daemon says of itself.
#[derive(Debug, Deserialize)]
struct DaemonStatus {
    version: String,
    pid: u32,
    started: String,
    containers: Counts,
    images: u64,
    sandboxes: Vec<VmStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Counts {
    total: u64,
    running: u64,
}

/// What the daemon says of a virtual machine. What it does not say stays out of the JSON, too.
#[derive(Debug, Serialize, Deserialize)]
struct VmStatus {
    id: String,
    state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file_server_pid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lost: Option<String>,
    #[serde(flatten)]
    more: serde_json::Map<String, Value>,
}

/// Prints the state of everything.
pub(super) async fn run(home: &Home, as_json: bool) -> Outcome {
    let status = match client::connect_running(home)? {
        Some(docker) => Some(ask(&docker, home).await?),
        None => None,
    };
    let text =
        if as_json { format!("{}\n", as_value(home, status.as_ref())) } else { words(home, status.as_ref()) };
    terminal::print(&text)?;
    Ok(0)
}

/// Whether a virtual machine runs or starts.
pub(super) async fn vm_runs(docker: &Docker) -> Result<bool, Failure> {
    let status: DaemonStatus =
        docker.get("/coracle/status").await.context("cannot ask the daemon for its status")?;
    Ok(status.sandboxes.iter().any(|vm| matches!(vm.state.as_str(), "running" | "starting")))
}

async fn ask(docker: &Docker, home: &Home) -> Result<DaemonStatus, Failure> {
    let mut status: DaemonStatus =
        docker.get("/coracle/status").await.context("cannot ask the daemon for its status")?;
    for machine in status.sandboxes.iter_mut().filter(|machine| machine.state == "running") {
        let record = vm::Folder::new(home.vms().join(&machine.id)).load_boot();
        machine.pid = record.as_ref().map(|record| record.pid);
        machine.file_server_pid = record.and_then(|record| record.file_server_pid);
    }
    Ok(status)
}

fn as_value(home: &Home, status: Option<&DaemonStatus>) -> Value {
    let place = json!({ "home": home.root(), "socket": home.socket() });
    let mut value = match status {
        None => json!({ "daemon": null, "vms": [] }),
        Some(status) => json!({
            "daemon": { "pid": status.pid, "version": status.version, "started": status.started },
            "containers": status.containers,
            "images": status.images,
            "vms": status.sandboxes,
        }),
    };
    if let (Value::Object(value), Value::Object(place)) = (&mut value, place) {
        value.extend(place);
    }
    value
}

fn words(home: &Home, status: Option<&DaemonStatus>) -> String {
    let Some(status) = status else {
        return format!(
            "daemon      not running (a command that needs it starts it)\nsocket      {}\n",
            home.socket().display()
        );
    };
    let mut text = format!(
        "daemon      running (version {}, process {}, since {})\nsocket      {}\ncontainers  {} running, {} in all\nimages      {}\n",
        status.version,
        status.pid,
        status.started,
        home.socket().display(),
        status.containers.running,
        status.containers.total,
        status.images,
    );
    for machine in &status.sandboxes {
        let process = machine.pid.map(|pid| format!(", process {pid}")).unwrap_or_default();
        let kernel = machine.more.get("kernel_release").and_then(Value::as_str);
        let kernel = kernel.map(|release| format!(", Linux {}", printable(release))).unwrap_or_default();
        let reason =
            machine.reason.as_ref().map(|reason| format!(": {}", printable(reason))).unwrap_or_default();
        text += &format!("vm          {} {}{process}{kernel}{reason}\n", machine.id, machine.state);
        if let Some(lost) = &machine.lost {
            text += &format!("            {}\n", printable(lost));
        }
    }
    if status.sandboxes.is_empty() {
        text += "vm          not running (a container that needs it starts it)\n";
    }
    text
}
