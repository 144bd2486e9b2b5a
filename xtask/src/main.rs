//! Builds, tests, demonstrates and measures Coracle: `cargo xtask kernel | guest | dist | lab | demo | test | bench`.
//!
//! Everything that these need is installed or made on the way and kept, so that the second run is quick. What comes from outside
//! comes through apt and cargo, which check it.

mod cache;
mod cpio;
mod lab;
mod packages;
#[path = "../../vmm/src/probe.rs"]
mod probe;
mod shell;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests, demonstrates and measures Coracle", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs a command on a machine with a usable KVM: this one, or else an emulated one with this one's files.
    Lab {
        #[command(flatten)]
        options: lab::Options,
        /// Says whether this machine's KVM is usable, and runs nothing.
        #[arg(long, exclusive = true)]
        probe: bool,
        /// The command and its arguments.
        #[arg(last = true, required_unless_present = "probe")]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Lab { probe: true, .. } => Ok(match probe::probe() {
            Ok(()) => {
                println!("KVM is usable here.");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("KVM is not usable here: {error}.");
                ExitCode::FAILURE
            }
        }),
        Task::Lab { options, command, .. } => lab::run(&options, &command),
    }
}
