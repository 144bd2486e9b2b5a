//! Runs the benches of `tests/`: builds everything for release, then starts the bench where it belongs, on this machine or in the lab.
//! The tables are kept in `tests/bench/results/`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::{dist, guest, images, lab, packages, shell, workspace};

/// The benches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    /// From the CLI's start to a container's first byte in a cold machine, against QEMU's microvm machine.
    Boot,
    /// The same in a machine that runs.
    Run,
    /// The VMM alone: memory, streams, disks and idleness, against QEMU's microvm machine and the host's TCP.
    Vmm,
    /// Create, start and end of a container by the agent alone, against crun and runc.
    Agent,
}

/// Runs the bench; `options` are passed on to it.
pub(crate) fn run(name: Name, lab_options: lab::Options, options: &[String]) -> Result<ExitCode> {
    packages::ensure(packages::PEERS)?;
    packages::ensure_docker_cli()?;
    match name {
        Name::Agent | Name::Vmm => drop(guest::build()?),
        Name::Boot | Name::Run => drop(dist::build()?),
    }
    if name != Name::Vmm {
        images::build()?;
    }
    let binary = if name == Name::Vmm { "bench-vmm" } else { "bench" };
    let target = workspace().join("target/bench");
    let mut build = guest::cargo();
    build
        .args(["build", "--release", "--package", "coracle-tests", "--bin", binary])
        .env("CARGO_TARGET_DIR", &target);
    shell::run(&mut build)?;
    let bench = target.join("release").join(binary);
    let bench = bench.to_str().context("the workspace's path is not UTF-8")?;
    let word = name.to_possible_value().context("every bench has a name")?.get_name().to_owned();
    match name {
        Name::Agent => {
            let status = shell::command(bench, [word].iter().chain(options))
                .status()
                .with_context(|| format!("cannot start {bench}"))?;
            Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Name::Boot | Name::Run | Name::Vmm => {
            let results = workspace().join("tests/bench/results");
            let script = "CORACLE_BENCH_RESULTS=$CORACLE_LAB_OUT exec \"$0\" \"$@\"";
            let mut arguments =
                vec!["sh".to_owned(), "-c".to_owned(), script.to_owned(), bench.to_owned(), word];
            arguments.extend_from_slice(options);
            lab::run(&lab::Options { out: Some(results), ..lab_options }, &arguments)
        }
    }
}
