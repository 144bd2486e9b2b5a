//! What the words of the command line do. Each is a client of the daemon's API; none knows anything that the API does not say.

pub(crate) mod bundle;
mod each;
mod egress;
mod exec;
mod filters;
mod history;
mod images;
mod import;
mod inspect;
mod lifecycle;
mod load;
mod logs;
mod networks;
mod prune;
mod ps;
mod registry;
mod run;
mod save;
mod session;
mod status;
mod transfer;
mod up;
mod version;
mod volumes;

use crate::{
    args::{Command, ImageCommand},
    failure::Outcome,
    paths::Home,
};

/// Carries out a command; `started` is when the process began, in microseconds of CLOCK_MONOTONIC.
pub(crate) async fn run(command: Command, home: Home, started: u64) -> Outcome {
    match command {
        Command::Up(args) => up::up(&home, &args).await,
        Command::Down(args) => up::down(&home, &args).await,
        Command::Status(args) => status::run(&home, args.json).await,
        Command::Version(args) => version::run(&home, args.json).await,
        Command::Pull(args) | Command::Image(ImageCommand::Pull(args)) => transfer::pull(&home, &args).await,
        Command::Push(args) | Command::Image(ImageCommand::Push(args)) => transfer::push(&home, &args).await,
        Command::Login(args) => registry::log_in(&home, &args).await,
        Command::Logout(args) => registry::log_out(&args),
        Command::Search(args) => registry::search(&home, &args).await,
        Command::Load(args) | Command::Image(ImageCommand::Load(args)) => load::run(&home, &args).await,
        Command::Save(args) | Command::Image(ImageCommand::Save(args)) => save::run(&home, &args).await,
        Command::Import(args) | Command::Image(ImageCommand::Import(args)) => import::run(&home, &args).await,
        Command::History(args) | Command::Image(ImageCommand::History(args)) => {
            history::run(&home, &args).await
        }
        Command::Image(ImageCommand::Prune(args)) => prune::run(&home, &args).await,
        Command::Images(args) | Command::Image(ImageCommand::List(args)) => images::list(&home, &args).await,
        Command::Rmi(args) | Command::Image(ImageCommand::Rm(args)) => images::remove(&home, &args).await,
        Command::Tag(args) | Command::Image(ImageCommand::Tag(args)) => images::tag(&home, &args).await,
        Command::Run(args) => run::run(&home, &args, started).await,
        Command::Create(args) => run::create_only(&home, &args).await,
        Command::Start(args) => run::start(&home, &args).await,
        Command::Attach(args) => run::attach(&home, &args).await,
        Command::Egress(args) => egress::run(&home, &args).await,
        Command::Exec(args) => exec::run(&home, &args).await,
        Command::Ps(args) => ps::run(&home, &args).await,
        Command::Logs(args) => logs::run(&home, &args).await,
        Command::Stop(args) => lifecycle::stop(&home, &args, "stop").await,
        Command::Restart(args) => lifecycle::stop(&home, &args, "restart").await,
        Command::Kill(args) => lifecycle::kill(&home, &args).await,
        Command::Wait(args) => lifecycle::wait(&home, &args).await,
        Command::Rm(args) => lifecycle::remove(&home, &args).await,
        Command::Rename(args) => lifecycle::rename(&home, &args).await,
        Command::Inspect(args) => inspect::run(&home, &args).await,
        Command::Network(args) => networks::run(&home, &args.command).await,
        Command::Volume(args) => volumes::run(&home, &args.command).await,
        Command::Doctor | Command::Daemon(_) | Command::Vmm | Command::Fsd | Command::Bundle(_) => {
            unreachable!("the caller has carried these out")
        }
    }
}
