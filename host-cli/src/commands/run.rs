//! `coracle run`, `create`, `start` and `attach`.
//!
//! The order is Docker's: create, attach, wait, start. Attaching and waiting come before the start, so that no byte of output
//! and no exit code is missed, however quick the container is.

use std::pin::pin;

use anyhow::Context;
use coracle_image_store::Reference;
use serde::Deserialize;

use super::{
    session::{Ended, Exit, Session, Target, start_failure_code},
    transfer::{Talk, pull_image},
};
use crate::{
    args::{AttachArgs, CreateOptions, PullPolicy, RunArgs, SessionArgs, StartArgs},
    client::{self, ClientError, Docker, escape, stream::FirstByte},
    failure::{Failure, Outcome},
    paths::Home,
    progress,
    terminal::{self, DetachKeys},
    timings::Timings,
};

/// Exit code of a failure that is coracle's own, not the container's.
const OWN_FAILURE: u8 = 125;

/// `coracle run`.
pub(super) async fn run(home: &Home, args: &RunArgs, started: u64) -> Outcome {
    run_in(home, args, started).await.map_err(|failure| match failure.code {
        1 => failure.code(OWN_FAILURE),
        _ => failure,
    })
}

async fn run_in(home: &Home, args: &RunArgs, started: u64) -> Outcome {
    let options = &args.create;
    let attached = !args.detach;
    if attached {
        Session::check_terminal(options.tty, options.interactive)?;
    }
    let detach_keys = DetachKeys::parse(&args.session.detach_keys)?;
    let mut timings = Timings::new(started, args.timings)?;
    let docker = client::connect(home).await?;
    timings.now("daemon-connected");
    let id = create(&docker, options, attached).await?;
    timings.now("created");
    if args.detach {
        start_call(&docker, &id, options.image()).await?;
        timings.now("started");
        terminal::print(&format!("{id}\n"))?;
        timings.report(home, &docker, &id, None).await?;
        return Ok(0);
    }
    let session = Session {
        docker,
        target: Target::Container,
        id,
        tty: options.tty,
        input: options.interactive,
        signals: args.session.sig_proxy,
        detach_keys,
    };
    let condition = if options.rm { "removed" } else { "next-exit" };
    attended(&session, condition, options.image(), Some((&mut timings, home))).await
}

/// Attaches, waits, starts, follows.
async fn attended(
    session: &Session,
    condition: &str,
    what: &str,
    mut timings: Option<(&mut Timings, &Home)>,
) -> Outcome {
    let (docker, id) = (&session.docker, &session.id);
    let (streams, exit) = tokio::join!(session.attach(), Exit::wait_for(docker, id, condition));
    let streams = streams.with_context(|| format!("cannot attach to the container of {what}"))?;
    let exit = exit.with_context(|| format!("cannot wait for the container of {what}"))?;
    let first_byte = FirstByte::default();
    let mut following = pin!(session.follow(streams, &first_byte));
    let mut starting = pin!(start_call(docker, id, what));
    // Output is shown as it comes, even before the daemon's answer. A terminal stays as it is until there is a container.
    let early = tokio::select! {
        biased;
        started = &mut starting => started.map(|()| None)?,
        ended = &mut following, if !session.tty => Some(ended?),
    };
    if early == Some(Ended::Output) {
        starting.await?;
    }
    if let Some((timings, _)) = &mut timings {
        timings.now("started");
    }
    let _forwarding = session.forward_signals()?;
    let ended = match early {
        Some(ended) => ended,
        None => following.await?,
    };
    let outcome = match ended {
        Ended::Output => exit.code().await,
        Ended::Detached => Ok(0),
        Ended::Signal(number) => Err(Failure::silent(128 + number)),
    };
    if let Some((timings, home)) = timings {
        timings.report(home, docker, id, first_byte.micros()).await?;
    }
    outcome
}

/// Creates a container; its id.
async fn create(docker: &Docker, options: &CreateOptions, attached: bool) -> Result<String, Failure> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Created {
        id: String,
        #[serde(default)]
        warnings: Option<Vec<String>>,
    }
    let path = match options.name() {
        Some(name) => format!("/containers/create?name={}", escape(name)),
        None => "/containers/create".to_owned(),
    };
    let image = options.image();
    let body = options.body(attached)?;
    if options.pull == PullPolicy::Always {
        pull(docker, image).await?;
    }
    let mut made: Result<Created, ClientError> = docker.post_json(&path, &body).await;
    if options.pull == PullPolicy::Missing && made.as_ref().is_err_and(is_image_missing) {
        let shown = Reference::parse(image).map_or_else(|_| image.to_owned(), |name| name.to_string());
        terminal::complain(&format!("Unable to find image '{shown}' locally\n"));
        pull(docker, image).await?;
        made = docker.post_json(&path, &body).await;
    }
    let created = made
        .with_context(|| format!("cannot create a container of {image}"))
        .map_err(|error| Failure::from(error).code(OWN_FAILURE))?;
    for warning in created.warnings.unwrap_or_default() {
        terminal::complain(&format!("coracle: {warning}\n"));
    }
    Ok(created.id)
}

fn is_image_missing(error: &ClientError) -> bool {
    error.is_not_found() && error.to_string().contains("No such image")
}

/// Gets an image before a container is made of it.
async fn pull(docker: &Docker, image: &str) -> Result<(), Failure> {
    let reference = Reference::parse(image).map_err(|error| Failure::new(error).code(OWN_FAILURE))?;
    let pulling = pull_image(docker, &reference, false, None, Talk::Aside);
    pulling.await.map_err(|failure| failure.code(OWN_FAILURE))
}

/// Starts a container; a failure has Docker's exit code for it.
async fn start_call(docker: &Docker, id: &str, what: &str) -> Result<(), Failure> {
    let path = format!("/containers/{}/start", escape(id));
    let starting = docker.post(&path);
    match progress::while_waiting("starting the virtual machine and the container", starting).await {
        Ok(_) => Ok(()),
        Err(error) => {
            let code = match &error {
                ClientError::Refused { message, .. } => start_failure_code(message),
                _ => OWN_FAILURE,
            };
            Err(Failure::from(
                anyhow::Error::new(error).context(format!("cannot start the container of {what}")),
            )
            .code(code))
        }
    }
}

/// `coracle create`.
pub(super) async fn create_only(home: &Home, options: &CreateOptions) -> Outcome {
    let docker = client::connect(home).await?;
    let id = create(&docker, options, true).await.map_err(|failure| failure.code(1))?;
    terminal::print(&format!("{id}\n"))?;
    Ok(0)
}

/// The part of a container's particulars that a session needs.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Particulars {
    id: String,
    config: ConfigPart,
    state: StatePart,
    host_config: HostConfigPart,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ConfigPart {
    #[serde(default)]
    tty: bool,
    #[serde(default)]
    open_stdin: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct StatePart {
    #[serde(default)]
    running: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfigPart {
    #[serde(default)]
    auto_remove: bool,
}

/// `coracle start`.
pub(super) async fn start(home: &Home, args: &StartArgs) -> Outcome {
    if !args.attach && !args.interactive {
        return super::lifecycle::each(home, &args.targets, "start", async |docker, name| {
            let starting = format!("/containers/{}/start", escape(name));
            progress::while_waiting("starting the virtual machine and the container", docker.post(&starting))
                .await?;
            Ok(name.to_owned())
        })
        .await;
    }
    let [name] = args.targets.containers.as_slice() else {
        return Err(Failure::new("cannot start several containers with -a or -i: name one"));
    };
    let docker = client::connect(home).await?;
    let container = particulars(&docker, name).await?;
    if container.state.running {
        return Err(Failure::new(format_args!("cannot start {name}: it runs already"))
            .hint(format_args!("`coracle attach {name}` connects to it")));
    }
    let session = session(docker, &container, args.interactive, &args.session)?;
    let condition = if container.host_config.auto_remove { "removed" } else { "next-exit" };
    attended(&session, condition, name, None).await.map_err(|failure| match failure.code {
        OWN_FAILURE => failure.code(1),
        _ => failure,
    })
}

/// `coracle attach`.
pub(super) async fn attach(home: &Home, args: &AttachArgs) -> Outcome {
    let name = &args.container;
    let docker = client::connect(home).await?;
    let container = particulars(&docker, name).await?;
    if !container.state.running {
        return Err(Failure::new(format_args!("cannot attach to {name}: it does not run"))
            .hint(format_args!("`coracle start -a {name}` starts it")));
    }
    let session = session(docker, &container, !args.no_stdin, &args.session)?;
    let (streams, exit) =
        tokio::join!(session.attach(), Exit::wait_for(&session.docker, &session.id, "not-running"));
    let streams = streams.with_context(|| format!("cannot attach to {name}"))?;
    let exit = exit.with_context(|| format!("cannot wait for {name}"))?;
    let _forwarding = session.forward_signals()?;
    match session.follow(streams, &FirstByte::default()).await? {
        Ended::Output => exit.code().await,
        Ended::Detached => Ok(0),
        Ended::Signal(number) => Err(Failure::silent(128 + number)),
    }
}

async fn particulars(docker: &Docker, name: &str) -> Result<Particulars, Failure> {
    let found = docker.get(&format!("/containers/{}/json", escape(name))).await;
    Ok(found.with_context(|| format!("cannot look at {name}"))?)
}

fn session(
    docker: Docker,
    container: &Particulars,
    input: bool,
    args: &SessionArgs,
) -> Result<Session, Failure> {
    let input = input && container.config.open_stdin;
    Session::check_terminal(container.config.tty, input)?;
    Ok(Session {
        docker,
        target: Target::Container,
        id: container.id.clone(),
        tty: container.config.tty,
        input,
        signals: args.sig_proxy,
        detach_keys: DetachKeys::parse(&args.detach_keys)?,
    })
}
