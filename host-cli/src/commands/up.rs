//! `coracle up` and `coracle down`: the whole engine, on and off.

use std::time::Duration;

use anyhow::Context;
use http::Method;

use crate::{
    args::{DownArgs, UpArgs},
    client::{self, ClientError},
    daemon::lock::Lock,
    docker_context,
    failure::{Failure, Outcome},
    paths::Home,
    progress,
    settings::Settings,
    terminal,
    units::human_binary_size,
    vm,
};

/// How long a daemon may take to end after it has said that everything is stopped.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts the daemon, makes the docker context, says how to use it.
pub(super) async fn up(home: &Home, args: &UpArgs) -> Outcome {
    let wanted = Settings {
        cpus: args.cpus.map(u32::from),
        memory: args.memory,
        disk: args.disk,
        insecure_registries: list(&args.insecure_registry),
        registry_mirrors: list(&args.registry_mirror),
    };
    let has_size = wanted.has_size();
    if wanted != Settings::default() {
        choose(home, &wanted)?;
    }
    let docker = client::connect(home).await?;
    if has_size && super::status::vm_runs(&docker).await? {
        terminal::complain(
            "coracle: the virtual machine runs already: its new size counts from its next start (`coracle down`, then `coracle up`)\n",
        );
    }
    if !args.no_context {
        docker_context::create(&home.docker_host())?;
    }
    terminal::print(&format!("export DOCKER_HOST={}\n", home.docker_host()))?;
    Ok(0)
}

/// A list that was given; an empty value empties it.
fn list(values: &[String]) -> Option<Vec<String>> {
    (!values.is_empty()).then(|| values.iter().filter(|value| !value.is_empty()).cloned().collect())
}

/// Keeps what was chosen, if a machine of that size is possible.
fn choose(home: &Home, wanted: &Settings) -> Result<(), Failure> {
    home.create()?;
    let settings = Settings::load(&home.settings())?.merged(wanted.clone());
    let size = settings.machine_size()?;
    let disk = vm::Folder::new(home.vms().join("default")).data_disk();
    if let Some(there) = vm::disk_size(&disk).filter(|there| wanted.disk.is_some() && *there > size.disk) {
        return Err(Failure::new(format_args!(
            "cannot make the data disk smaller: it has {} already",
            human_binary_size(there)
        ))
        .hint("to begin with an empty one: `coracle down`, then remove the folder vms/default in coracle's home"));
    }
    Ok(settings.save(&home.settings())?)
}

/// Stops containers, machine and daemon.
pub(super) async fn down(home: &Home, args: &DownArgs) -> Outcome {
    let Some(docker) = client::connect_running(home)? else {
        return Ok(0);
    };
    let path = match args.timeout {
        Some(seconds) => format!("/coracle/down?t={seconds}"),
        None => "/coracle/down".to_owned(),
    };
    let stopping = docker.call(Method::POST, &path, client::empty());
    match progress::while_waiting("stopping containers and the virtual machine", stopping).await {
        // A daemon that is going may close the connection before its answer is through: the lock says how it went.
        Ok(_) | Err(ClientError::Transport(_)) => {}
        Err(error) => return Err(Failure::from(error).hint("`coracle status` shows what still runs")),
    }
    let lock = home.daemon_lock();
    let ended = tokio::task::spawn_blocking(move || Lock::wait(&lock).map(drop));
    match tokio::time::timeout(END_TIMEOUT, ended).await {
        Ok(ended) => ended?.context("cannot tell whether the daemon has ended")?,
        Err(_) => return Err(Failure::new("the daemon does not end")),
    }
    Ok(0)
}
