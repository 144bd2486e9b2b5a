//! `boot` and `run`: from the CLI's start to a container's first byte, in a machine that is not there yet and in one that runs,
//! against QEMU's microvm machine in the same run. The peer has neither a daemon nor a CLI: its times are those of the machine and
//! the agent alone, which is less than ours contain.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::Stdio,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use coracle_tests::{
    Installation,
    report::{self, Row, median},
    run,
};
use serde_json::Value;

use crate::microvm::{Microvm, Parts};

const CPUS: u32 = 2;
const MEMORY_MIB: u32 = 512;
const PEER: &str = "QEMU microvm";
const PLACE: &str = "the lab (emulated: ratios and counts only)";

pub(crate) fn boot(rounds: usize, json: bool) -> Result<()> {
    let bench = Bench::new()?;
    let mut ours = Samples::default();
    let mut theirs = Samples::default();
    let mut phases: Vec<Vec<(String, f64)>> = Vec::new();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        bench.coracle.coracle(&["down"]).ok();
        let (first_byte, trace) = bench.first_byte(&["run", "--rm", "busybox", "echo", "hello"])?;
        ours.first_byte.push(first_byte);
        ours.exits.push(exits(bench.coracle.vmm_pid() as u32)?);
        ours.ready.push(moment(&trace, "vmm", "agent-ready")? - moment(&trace, "vmm", "start-asked")?);
        phases.push(stretches(&trace)?);
        bench.coracle.coracle(&["down"]).ok();

        let machine = Microvm::start(&bench.parts()?)?;
        theirs.ready.push(machine.ready_ms);
        theirs.first_byte.push(machine.run(round)?.since_boot_ms);
        theirs.exits.push(exits(machine.pid())?);
    }
    let row = |metric: &str, unit, ours: &[f64], theirs: &[f64], goal| Row {
        metric: metric.to_owned(),
        value: median(ours),
        unit,
        peer: Some((PEER.to_owned(), median(theirs))),
        goal,
    };
    let mut rows = vec![
        row("VM exits, start to a container's first byte", "exits", &ours.exits, &theirs.exits, Some(1.0)),
        row("VMM's start to agent ready", "ms", &ours.ready, &theirs.ready, Some(1.0)),
        row(
            "CLI's start to first byte, peer: machine alone",
            "ms",
            &ours.first_byte,
            &theirs.first_byte,
            None,
        ),
    ];
    rows.extend(shares(&phases));
    report::print("boot", PLACE, false, &rows, json)
}

pub(crate) fn warm(rounds: usize, json: bool) -> Result<()> {
    let bench = Bench::new()?;
    bench.coracle.coracle(&["run", "--rm", "busybox", "true"]).ok();
    let (mut cli, mut docker, mut start) = (Vec::new(), Vec::new(), Vec::new());
    let (mut peer_start, mut peer_first) = (Vec::new(), Vec::new());
    let mut phases = Vec::new();
    let machine = {
        let copy = bench.coracle.scratch().join("data.img");
        run(std::process::Command::new("cp").arg("--sparse=always").arg(&bench.data_disk).arg(&copy)).ok();
        Microvm::start(&Parts { data_disk: copy, ..bench.parts()? })?
    };
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let (first_byte, trace) = bench.first_byte(&["run", "--rm", "busybox", "echo", "hello"])?;
        cli.push(first_byte);
        start.push(moment(&trace, "daemon", "agent-started")? - moment(&trace, "daemon", "layers-attached")?);
        phases.push(stretches(&trace)?);
        docker.push(bench.docker_first_byte()?);
        let times = machine.run(round)?;
        peer_start.push(times.start_ms);
        peer_first.push(times.first_byte_ms);
    }
    let row = |metric: &str, ours: &[f64], theirs: &[f64], goal| Row {
        metric: metric.to_owned(),
        value: median(ours),
        unit: "ms",
        peer: Some((PEER.to_owned(), median(theirs))),
        goal,
    };
    let mut rows = vec![
        row("the agent's start of a container, as its client sees it", &start, &peer_start, Some(1.0)),
        row("coracle run to first byte, peer: agent alone", &cli, &peer_first, None),
        row("docker run to first byte, peer: agent alone", &docker, &peer_first, None),
    ];
    rows.extend(shares(&phases));
    report::print("run", PLACE, false, &rows, json)
}

#[derive(Default)]
struct Samples {
    exits: Vec<f64>,
    ready: Vec<f64>,
    first_byte: Vec<f64>,
}

/// An installation with an image, and where its parts are.
struct Bench {
    coracle: Installation,
    data_disk: PathBuf,
    trace: PathBuf,
}

impl Bench {
    fn new() -> Result<Self> {
        let coracle = Installation::new();
        coracle.coracle(&["up", "--cpus", &CPUS.to_string(), "--memory", &format!("{MEMORY_MIB}m")]).ok();
        let coracle = coracle.with_busybox();
        let data_disk = coracle.home().join("vms/default/data.img");
        let trace = coracle.scratch().join("trace");
        Ok(Self { coracle, data_disk, trace })
    }

    /// Milliseconds from the start of `coracle` to the first byte of its output, and its trace.
    fn first_byte(&self, args: &[&str]) -> Result<(f64, Value)> {
        let mut command = self.coracle.command("coracle");
        command.args(args).env("CORACLE_TRACE", &self.trace);
        let time = first_byte(command)?;
        Ok((time, serde_json::from_slice(&fs::read(&self.trace)?)?))
    }

    fn docker_first_byte(&self) -> Result<f64> {
        let mut command = self.coracle.command("docker");
        command.args(["run", "--rm", "--network", "none", "busybox", "echo", "hello"]);
        first_byte(command)
    }

    /// The same for QEMU; our machine must not run while it uses the data disk.
    fn parts(&self) -> Result<Parts> {
        let layers = self.coracle.home().join("images/layers");
        let layer = fs::read_dir(layers)?.next().context("the image has a layer")??.path();
        let diff_id = layer.file_stem().and_then(|stem| stem.to_str()).context("a layer's name")?.parse()?;
        Ok(Parts { data_disk: self.data_disk.clone(), layer, diff_id, cpus: CPUS, memory_mib: MEMORY_MIB })
    }
}

fn first_byte(mut command: std::process::Command) -> Result<f64> {
    let begin = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("stdout was piped")?;
    let mut byte = [0];
    stdout.read_exact(&mut byte).context("no byte came")?;
    let time = begin.elapsed().as_secs_f64() * 1e3;
    std::io::copy(&mut stdout, &mut std::io::sink())?;
    ensure!(child.wait()?.success(), "{command:?} failed");
    Ok(time)
}

/// How often the processors of a process's machine left the guest, as KVM counts.
fn exits(pid: u32) -> Result<f64> {
    let folder = Path::new("/sys/kernel/debug/kvm");
    let mine = fs::read_dir(folder).context("KVM's counters need debugfs")?.filter_map(Result::ok);
    let machine = mine
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{pid}-")))
        })
        .with_context(|| format!("process {pid} has no machine"))?;
    Ok(fs::read_to_string(machine.join("exits"))?.trim().parse()?)
}

/// When something happened, in milliseconds since the CLI's start.
fn moment(trace: &Value, part: &str, name: &str) -> Result<f64> {
    let moments = trace["moments"].as_array().context("a trace has moments")?;
    let found = moments.iter().find(|moment| moment["part"] == part && moment["name"] == name);
    let micros = found.and_then(|moment| moment["micros"].as_f64());
    Ok(micros.with_context(|| format!("the trace has no {part} {name}"))? / 1e3)
}

/// What share of the way to the first byte was before each moment.
fn stretches(trace: &Value) -> Result<Vec<(String, f64)>> {
    let moments = trace["moments"].as_array().context("a trace has moments")?;
    let all = moment(trace, "cli", "first-byte")?;
    let mut before = 0.0;
    let mut stretches = Vec::new();
    for moment in moments {
        let (part, name) =
            (moment["part"].as_str().unwrap_or_default(), moment["name"].as_str().unwrap_or_default());
        let at = moment["micros"].as_f64().context("a moment has a time")? / 1e3;
        stretches.push((format!("share of the time: {part} {name}"), 100.0 * (at - before) / all));
        before = at;
        if name == "first-byte" {
            break;
        }
    }
    Ok(stretches)
}

/// The medians of the shares.
fn shares(rounds: &[Vec<(String, f64)>]) -> Vec<Row> {
    let Some(first) = rounds.first() else { return Vec::new() };
    let of = |name: &str| -> Vec<f64> {
        rounds.iter().flatten().filter(|(other, _)| other == name).map(|(_, share)| *share).collect()
    };
    first
        .iter()
        .map(|(name, _)| Row {
            metric: name.clone(),
            value: median(&of(name)),
            unit: "%",
            peer: None,
            goal: None,
        })
        .collect()
}
