//! The coracle binary: CLI, daemon, doctor; and the virtual machine monitor and the file server under their own names.
//!
//! Which of them it is, is decided here, by the name under which it was called and by its first argument.

mod args;
mod bundle;
mod client;
mod clock;
mod commands;
mod daemon;
mod docker_config;
mod docker_context;
mod doctor;
mod failure;
mod files;
mod paths;
mod progress;
mod registries;
mod settings;
mod table;
mod terminal;
#[cfg(feature = "test-seam")]
mod test_seam;
mod timings;
mod units;
mod vm;

use std::{ffi::OsStr, path::Path, process::ExitCode};

use clap::{Parser, error::ErrorKind};

use args::{Cli, Command};
use failure::{Failure, Outcome};
use paths::Home;

/// What a shell shows for a program that wrote to a closed pipe: 128 + SIGPIPE.
const READER_GONE: u8 = 141;

fn main() -> ExitCode {
    let started = clock::monotonic_micros();
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name() == Some(OsStr::new(vm::process::VMM_NAME)) {
        return finish(vm::process::run().map(|()| 0).map_err(Failure::from));
    }
    if Path::new(&name).file_name() == Some(OsStr::new(vm::process::FILE_SERVER_NAME)) {
        return finish(vm::process::run_file_server().map(|()| 0).map_err(Failure::from));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    finish(dispatch(cli.command, started))
}

/// Prints what is wrong with the command line; `run`'s own mistakes end with Docker's 125.
fn refuse(error: &clap::Error) -> ExitCode {
    // There is nobody left to tell if that fails.
    let _ = error.print();
    let for_container = std::env::args().nth(1).is_some_and(|word| matches!(word.as_str(), "run" | "create"));
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ if for_container => ExitCode::from(125),
        _ => ExitCode::from(2),
    }
}

fn finish(outcome: Outcome) -> ExitCode {
    let code = outcome.unwrap_or_else(|failure| {
        if failure.is_reader_gone() {
            return READER_GONE;
        }
        failure.report();
        failure.code
    });
    ExitCode::from(code)
}

fn dispatch(command: Command, started: u64) -> Outcome {
    match command {
        Command::Vmm => return vm::process::run().map(|()| 0).map_err(Failure::from),
        Command::Fsd => return vm::process::run_file_server().map(|()| 0).map_err(Failure::from),
        Command::Bundle(args) => return commands::bundle::run(&args),
        _ => {}
    }
    let home = Home::from_env()?;
    if let Command::Daemon(args) = &command {
        return daemon::run(&home, args);
    }
    if let Command::Doctor = command {
        return doctor::run(&home);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(commands::run(command, home, started));
    // A thread that still reads standard input must not be waited for.
    runtime.shutdown_background();
    outcome
}
