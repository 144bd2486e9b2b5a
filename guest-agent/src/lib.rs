//! The agent: PID 1 of the guest. It mounts layers, runs containers in their own namespaces and cgroups, and serves the
//! agent API to the host. It trusts the host and nothing that comes out of an image or a container.
//!
//! It also runs as an ordinary root process, in mount and network namespaces of its own, so that containers can be tested in seconds
//! without a VM.

#[cfg(not(target_os = "linux"))]
compile_error!("the agent runs on Linux only");

mod agent;
pub mod as_init;
pub mod as_process;
mod bpf;
mod cgroup;
mod check;
mod child;
mod clock;
mod containers;
mod egress;
mod engine_socket;
mod error;
mod fork_server;
mod host_trees;
mod http;
mod incoming;
mod layers;
mod mounts;
mod network;
mod packet;
mod processes;
mod reaper;
mod seccomp;
mod storage;
mod sys;
mod volumes;

use std::sync::Arc;

use agent::Agent;
use coracle_agent_api::{API_VERSION, Hello, Phase};
use tokio::signal::unix::{SignalKind, signal};

/// Threads for work that blocks; unmounting can be slow where the disk is.
const BLOCKING_THREADS: usize = 16;

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_THREADS).build()
}

/// Moments of the start.
#[derive(Default)]
struct Phases(Vec<Phase>);

impl Phases {
    fn mark(&mut self, name: &str) {
        self.0.push(Phase { name: name.to_owned(), guest_micros: clock::boot_micros() });
    }
}

/// The line that tells the host that the agent is ready.
fn hello(phases: Phases) -> Vec<u8> {
    let hello = Hello {
        api_version: API_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        phases: phases.0,
    };
    let mut line = serde_json::to_vec(&hello).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Reaps orphans for ever.
async fn reap_orphans(agent: Arc<Agent>) -> std::io::Result<()> {
    let mut ended = signal(SignalKind::child())?;
    while ended.recv().await.is_some() {
        agent.reap();
    }
    Ok(())
}
