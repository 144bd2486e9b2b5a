//! Builds, tests, demonstrates and measures Coracle: `cargo xtask kernel | guest | dist | lab | demo | test | bench`.
//!
//! Everything that these need is installed or made on the way and kept, so that the second run is quick. What comes from outside
//! comes through apt and cargo, which check it.

mod bench;
mod cache;
mod clients;
mod cpio;
mod demo;
mod dist;
mod guest;
mod images;
mod kernel;
mod lab;
mod packages;
#[path = "../../vmm/src/probe.rs"]
#[allow(unreachable_pub, reason = "it is public where it belongs to")]
mod probe;
mod progress;
mod shell;
mod test;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Builds, tests, demonstrates and measures Coracle",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Builds the guest's kernel, or finds it in the cache, and prints its path.
    Kernel,
    /// Builds everything for the virtual machine: kernel, agent, initramfs, the data disk's template.
    Guest,
    /// Makes the trial images, in target/images.
    Images,
    /// Builds the `coracle` binary with everything in it, in target/dist.
    Dist,
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
    /// Shows first containers, through the stock docker CLI and through ours, and where the time goes.
    Demo {
        #[command(flatten)]
        options: lab::Options,
    },
    /// The demo itself, on a machine with a usable KVM.
    #[command(hide = true)]
    DemoInside,
    /// Checks formatting and lints, and runs all tests, those that need a virtual machine in the lab.
    Test,
    /// Runs test binaries, given as NAME=PATH, on a machine with a usable KVM.
    #[command(hide = true)]
    TestInside {
        /// The test binaries.
        binaries: Vec<String>,
    },
    /// Measures beside a peer; what stands after `--` is passed on to the bench.
    Bench {
        /// Which bench.
        name: bench::Name,
        #[command(flatten)]
        options: lab::Options,
        /// Options of the bench, for example --json.
        #[arg(last = true)]
        arguments: Vec<String>,
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
        Task::Kernel => println!("{}", kernel::build()?.display()),
        Task::Guest => {
            guest::build()?;
        }
        Task::Images => println!("{}", images::build()?.display()),
        Task::Dist => println!("{}", dist::build()?.display()),
        Task::Lab { probe: true, .. } => match probe::probe() {
            Ok(()) => println!("KVM is usable here."),
            Err(error) => {
                println!("KVM is not usable here: {error}.");
                return Ok(ExitCode::FAILURE);
            }
        },
        Task::Lab { options, command, .. } => return lab::run(&options, &command),
        Task::Demo { options } => return demo::run(&options),
        Task::DemoInside => demo::inside()?,
        Task::Test => test::run()?,
        Task::TestInside { binaries } => test::inside(&binaries)?,
        Task::Bench { name, options, arguments } => return bench::run(name, options, &arguments),
    }
    Ok(ExitCode::SUCCESS)
}

/// The folder of the workspace.
fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate stands in a folder of the workspace")
}
