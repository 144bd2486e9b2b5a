//! The engine over an agent without a VM, to try clients against: `process AGENT FOLDER` serves `FOLDER/docker.sock`. Needs root.

use std::{path::PathBuf, sync::Arc};

use coracle_engine::{
    Engine, EngineConfig, HostFiles, RegistrySource,
    sandbox::{Sandbox, SandboxId, process::ProcessSandbox},
};
use coracle_image_store::ImageStore;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(agent), Some(home)) = (args.next(), args.next()) else {
        return Err("usage: process AGENT FOLDER".into());
    };
    std::fs::create_dir_all(&home)?;
    let images = Arc::new(ImageStore::open(&home.join("images"))?);
    let folder = home.join("vms");
    let factory = move |id: &SandboxId| -> Arc<dyn Sandbox> {
        Arc::new(ProcessSandbox::new(id.clone(), &agent, &folder.join(id.as_str())))
    };
    let config = EngineConfig {
        home: home.clone(),
        version: "0.0.0-example".to_owned(),
        git_commit: String::new(),
        registries: RegistrySource::default(),
        host_files: HostFiles::default(),
    };
    let engine = Engine::new(config, images, Arc::new(factory)).await?;
    let socket = home.join("docker.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = tokio::net::UnixListener::bind(&socket)?;
    println!("export DOCKER_HOST=unix://{}", socket.display());
    engine.serve(listener, async { drop(tokio::signal::ctrl_c().await) }).await;
    Ok(())
}
