//! Everything that must hold before a change lands, in stages: formatting, lints, unit and integration tests, the build, and the end-to-end
//! tests, those of them that need a virtual machine in the lab. The first stage that fails ends it and is named in the last line.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{clients, dist, guest, images, lab, packages, shell};

/// Runs all stages.
pub(crate) fn run() -> Result<()> {
    let mut stages = Stages::default();
    let outcome = all(&mut stages);
    stages.print();
    outcome
}

fn all(stages: &mut Stages) -> Result<()> {
    stages.run("machine", || {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the tests make namespaces, mounts and control groups: run them as root"
        );
        for names in [packages::KERNEL, packages::DISK, packages::IMAGES, packages::TESTS, packages::PEERS] {
            packages::ensure(names)?;
        }
        packages::ensure_docker_cli()
    })?;
    stages.run("fmt", || shell::run(guest::cargo().args(["fmt", "--all", "--check"])))?;
    stages.run("clippy", || {
        shell::run(guest::cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]))
    })?;
    stages.run("dist", || dist::build().map(drop))?;
    stages.run("images", || images::build().map(drop))?;
    stages.run("clients", || clients::build().map(drop))?;
    stages.run("test", || {
        shell::run(guest::cargo().args([
            "test",
            "--workspace",
            "--exclude",
            "coracle-tests",
            "--no-fail-fast",
        ]))
    })?;
    let mut binaries = Vec::new();
    stages.run("build end-to-end tests", || {
        binaries = end_to_end_binaries()?;
        Ok(())
    })?;
    let (in_lab, here): (Vec<Binary>, Vec<Binary>) =
        binaries.into_iter().partition(|binary| binary.name.starts_with("lab_"));
    stages.run("end to end, here", || run_each(&here))?;
    stages.run("lab", || lab::prepare(&lab::Options::default()))?;
    stages.run("end to end, in the lab", || run_in_lab(&in_lab))
}

/// Runs test binaries one after the other (each a name and a path), in the lab.
pub(crate) fn inside(binaries: &[String]) -> Result<()> {
    let binaries: Vec<Binary> = binaries
        .iter()
        .map(|text| {
            let (name, path) = text.split_once('=').with_context(|| format!("not NAME=PATH: {text}"))?;
            Ok(Binary { name: name.to_owned(), path: path.into() })
        })
        .collect::<Result<_>>()?;
    run_each(&binaries)
}

struct Binary {
    name: String,
    path: PathBuf,
}

fn run_each(binaries: &[Binary]) -> Result<()> {
    let mut failed = Vec::new();
    for binary in binaries {
        println!("\n     Running {}", binary.name);
        let started = Instant::now();
        // One test at a time: in the lab they share one processor, emulated, some of them twice.
        let status = Command::new(&binary.path).arg("--test-threads=1").status();
        let status = status.with_context(|| format!("cannot start {}", binary.path.display()))?;
        println!("     {} took {:.0} s", binary.name, started.elapsed().as_secs_f64());
        if !status.success() {
            failed.push(binary.name.as_str());
        }
    }
    ensure!(failed.is_empty(), "tests failed in {}", failed.join(", "));
    Ok(())
}

/// Each in a lab of its own, which has all its memory, and whose end is not the end of the others.
fn run_in_lab(binaries: &[Binary]) -> Result<()> {
    ensure!(!binaries.is_empty(), "there is no end-to-end test for the lab");
    let xtask = std::env::current_exe().context("cannot find this program")?;
    let mut failed = Vec::new();
    for binary in binaries {
        let path = binary.path.to_str().context("a test's path is not UTF-8")?;
        // A process each: what a lab leaves waiting for signals and input ends with it.
        let status = Command::new(&xtask)
            .args(["lab", "--"])
            .arg(&xtask)
            .args(["test-inside", &format!("{}={path}", binary.name)])
            .status()
            .context("cannot start the lab")?;
        if !status.success() {
            failed.push(binary.name.as_str());
        }
    }
    ensure!(failed.is_empty(), "tests failed in {}", failed.join(", "));
    Ok(())
}

/// Builds the end-to-end tests and finds their binaries in what cargo says.
fn end_to_end_binaries() -> Result<Vec<Binary>> {
    let mut binaries = test_binaries(&["--package", "coracle-tests"])?;
    binaries.extend(test_binaries(&["--package", "coracle-vmm", "--test", "lab_machine"])?);
    binaries.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(binaries)
}

/// Builds tests, those that these words choose, and says where they are.
fn test_binaries(which: &[&str]) -> Result<Vec<Binary>> {
    let mut command = guest::cargo();
    command.arg("test").args(which).args(["--no-run", "--message-format=json-render-diagnostics"]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(output.status.success(), "`{}` failed: {}", shell::describe(&command), output.status);
    let mut binaries = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Value = serde_json::from_str(line).context("cargo's messages are not JSON")?;
        if let (Some(path), Some(name), Some(true)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
            message["profile"]["test"].as_bool(),
        ) {
            binaries.push(Binary { name: name.to_owned(), path: path.into() });
        }
    }
    Ok(binaries)
}

/// How long each stage took.
#[derive(Default)]
struct Stages(Vec<(&'static str, Duration, bool)>);

impl Stages {
    fn run(&mut self, name: &'static str, stage: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n=== {name}");
        let started = Instant::now();
        let outcome = stage();
        self.0.push((name, started.elapsed(), outcome.is_ok()));
        outcome.with_context(|| format!("stage `{name}` failed"))
    }

    fn print(&self) {
        println!("\n{:<28} {:>8}", "stage", "seconds");
        for (name, took, passed) in &self.0 {
            println!("{name:<28} {:>8.1}{}", took.as_secs_f64(), if *passed { "" } else { "  failed" });
        }
    }
}
