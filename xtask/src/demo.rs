//! The demo: first containers through the stock docker CLI and through ours, with what each command prints, and where the time went.
//! Every answer is checked, so a demo that reaches its end has worked. Its daemon and files are its own and gone afterwards.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{dist, images, lab, packages, shell, workspace};

/// Makes everything, then runs the demo on a machine with a usable KVM.
pub(crate) fn run(options: &lab::Options) -> Result<ExitCode> {
    packages::ensure_docker_cli()?;
    dist::build()?;
    images::build()?;
    lab::prepare(options)?;
    if let Err(reason) = lab::native(options) {
        println!(
            "{reason}; so the demo runs in the lab, an emulated machine that has a KVM and is about ten times slower."
        );
    }
    let xtask = std::env::current_exe().context("cannot find this program")?;
    let xtask = xtask.to_str().context("this program's path is not UTF-8")?;
    lab::run(options, &[xtask.to_owned(), "demo-inside".to_owned()])
}

/// What a command of the demo should do.
struct Step {
    command: &'static str,
    code: i32,
    /// All of these are to be in the output.
    prints: &'static [&'static str],
}

const fn step(command: &'static str, prints: &'static [&'static str]) -> Step {
    Step { command, code: 0, prints }
}

const fn ends(command: &'static str, code: i32) -> Step {
    Step { command, code, prints: &[] }
}

const DOCKER: &[Step] = &[
    step("docker load -i $IMAGES/busybox.docker.tar", &["Loaded image: busybox:latest"]),
    step("docker load -i $IMAGES/layered.oci.tar", &["layered:latest"]),
    step("docker images", &["busybox", "layered"]),
    step("docker run --rm busybox echo hello", &["hello\n"]),
    step(
        "docker run --rm layered sh -c 'id -un; pwd; ls /data /data/opaque'",
        &["sailor\n/home/sailor\n", "kept", "upper"],
    ),
    step(
        "docker run -d --name ticker busybox sh -c 'for i in 1 2 3; do echo tick $i; done; exec sleep 1000'",
        &[],
    ),
    step("docker ps", &["ticker", "busybox", "Up "]),
    step("docker exec ticker sh -c 'hostname; ps'", &["sleep 1000"]),
    step("docker inspect -f '{{.State.Status}} {{.Config.Image}}' ticker", &["running busybox\n"]),
    step("docker logs -f ticker & docker stop -t 1 ticker >/dev/null; wait", &["tick 1\ntick 2\ntick 3\n"]),
    step("docker wait ticker", &["137\n"]),
    step("docker rm ticker", &["ticker\n"]),
    step(
        "docker run -i --rm busybox cat < $SCRATCH/random | cmp - $SCRATCH/random && echo the same 16 MiB",
        &["the same 16 MiB\n"],
    ),
    ends("docker run --rm busybox sh -c 'exit 42'", 42),
    ends("docker run --rm busybox no-such-command", 127),
    ends("docker run --rm busybox /etc/passwd", 126),
    ends("docker run --rm no-such-image true", 125),
];

const CORACLE: &[Step] = &[
    step("coracle load -i $IMAGES/busybox.oci.tar", &["busybox:latest"]),
    step("coracle run --rm busybox echo hello", &["hello\n"]),
    step("coracle run -d --name boat busybox sh -c 'echo afloat; exec sleep 1000'", &[]),
    step("coracle ps", &["boat", "busybox"]),
    step("coracle logs boat", &["afloat\n"]),
    step("coracle exec boat uname -sr", &["Linux 6.12"]),
    step("coracle stop -t 1 boat", &["boat\n"]),
    step("coracle rm boat", &["boat\n"]),
    step(
        "coracle run -i --rm busybox cat < $SCRATCH/random | cmp - $SCRATCH/random && echo the same 16 MiB",
        &["the same 16 MiB\n"],
    ),
    ends("coracle run --rm busybox sh -c 'exit 42'", 42),
    ends("coracle run --rm busybox no-such-command", 127),
    step("coracle status", &["running"]),
];

/// The demo itself; this machine has a usable KVM.
pub(crate) fn inside() -> Result<()> {
    let started = Instant::now();
    let scratch = tempfile::Builder::new()
        .prefix("coracle-demo-")
        .tempdir()
        .context("cannot make a temporary folder")?;
    let demo = Demo::new(scratch.path())?;
    let outcome = demo.steps();
    if outcome.is_err() {
        demo.show_logs();
    }
    let down = demo.step(&step("coracle down", &[]));
    outcome.and(down)?;
    println!("\nThe demo is through, in {:.0} s.", started.elapsed().as_secs_f64());
    Ok(())
}

struct Demo<'a> {
    scratch: &'a Path,
    path: String,
}

impl<'a> Demo<'a> {
    fn new(scratch: &'a Path) -> Result<Self> {
        let mut random = fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
        let mut file = fs::File::create(scratch.join("random")).context("cannot write a temporary file")?;
        std::io::copy(&mut std::io::Read::take(&mut random, 16 << 20), &mut file)
            .context("cannot write a temporary file")?;
        let dist = workspace().join("target/dist");
        let path = format!("{}:{}", dist.display(), std::env::var("PATH").unwrap_or_default());
        Ok(Self { scratch, path })
    }

    fn steps(&self) -> Result<()> {
        self.step(&step("coracle doctor", &[]))?;
        self.step(&step("coracle up", &["export DOCKER_HOST=unix://"]))?;
        println!(
            "\n# The stock docker CLI ({})",
            shell::output(&mut shell::command("docker", ["--version"]))?.trim()
        );
        for step in DOCKER {
            self.step(step)?;
        }
        println!("\n# The same with our own words");
        for step in CORACLE {
            self.step(step)?;
        }
        println!(
            "\n# Where the time goes: a container in a machine that is not there yet, and in one that runs"
        );
        self.step(&step("coracle down", &[]))?;
        let cold = self.timed("cold")?;
        let warm = self.timed("warm")?;
        print!("{}", table(&cold, &warm)?);
        Ok(())
    }

    fn command(&self, script: &str) -> Command {
        let home = self.scratch.join("home");
        let mut command = shell::command("sh", ["-c", script]);
        command
            .env("PATH", &self.path)
            .env("CORACLE_HOME", &home)
            .env("DOCKER_HOST", format!("unix://{}", home.join("run/docker.sock").display()))
            .env("DOCKER_CONFIG", self.scratch.join("docker"))
            .env("IMAGES", workspace().join("target/images"))
            .env("SCRATCH", self.scratch)
            .env_remove("DOCKER_CONTEXT")
            .stdin(Stdio::null());
        command
    }

    fn step(&self, step: &Step) -> Result<()> {
        println!("\n$ {}", step.command);
        let output = self.command(step.command).output().context("cannot start a shell")?;
        let printed = String::from_utf8_lossy(&output.stdout);
        print!("{printed}{}", String::from_utf8_lossy(&output.stderr));
        std::io::stdout().flush()?;
        let code = output.status.code().unwrap_or(-1);
        if step.code != 0 {
            println!("[exit code {code}]");
        }
        ensure!(code == step.code, "`{}` ended with {code} instead of {}", step.command, step.code);
        for expected in step.prints {
            ensure!(printed.contains(expected), "`{}` did not print {expected:?}", step.command);
        }
        Ok(())
    }

    /// Runs a container and returns the moments on its way, as `coracle run` saw them.
    fn timed(&self, name: &str) -> Result<Value> {
        let trace = self.scratch.join(name);
        let mut command = self.command("coracle run --rm busybox echo hello");
        let output = command.env("CORACLE_TRACE", &trace).output().context("cannot start a shell")?;
        ensure!(
            output.stdout == b"hello\n",
            "the {name} run failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = fs::read_to_string(&trace).context("coracle wrote no trace")?;
        serde_json::from_str(&text).context("coracle's trace is not JSON")
    }

    fn show_logs(&self) {
        for log in ["daemon.log", "vms/default/vmm.log"] {
            if let Ok(text) = fs::read_to_string(self.scratch.join("home").join(log)) {
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- the end of {log}\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            }
        }
    }
}

/// The parts in the order in which they act.
const PARTS: [&str; 6] = ["CLI", "daemon", "VMM", "kernel", "agent", "container"];

/// Who a stretch of time belongs to, by the moment that ends it.
fn part(place: &str, name: &str, kernel_is_up: bool) -> Result<&'static str> {
    Ok(match (place, name) {
        (_, "first-byte") => "container",
        ("cli", _) => "CLI",
        ("daemon", _) => "daemon",
        ("vmm", "vsock-activated") => "kernel",
        ("vmm", "agent-ready") => "agent",
        ("vmm", _) => "VMM",
        ("guest", _) if kernel_is_up => "agent",
        ("guest", _) => "kernel",
        ("agent", _) => "container",
        _ => bail!("coracle's trace names an unknown part: {place}"),
    })
}

/// Milliseconds by part, up to the container's first byte.
fn shares(trace: &Value) -> Result<[f64; PARTS.len()]> {
    let mut shares = [0.0; PARTS.len()];
    let (mut before, mut kernel_is_up) = (0, false);
    for moment in trace["moments"].as_array().context("coracle's trace has no moments")? {
        let text = |key: &str| moment[key].as_str().context("a moment of coracle's trace is incomplete");
        let micros = moment["micros"].as_u64().context("a moment of coracle's trace has no time")?;
        let (place, name) = (text("part")?, text("name")?);
        let part = part(place, name, kernel_is_up)?;
        kernel_is_up |= place == "guest";
        let index = PARTS.iter().position(|known| *known == part).unwrap_or_default();
        shares[index] += micros.saturating_sub(before) as f64 / 1000.0;
        before = micros.max(before);
        if name == "first-byte" {
            break;
        }
    }
    Ok(shares)
}

fn table(cold: &Value, warm: &Value) -> Result<String> {
    use std::fmt::Write as _;
    let (cold, warm) = (shares(cold)?, shares(warm)?);
    let mut text = format!(
        "\nFrom the CLI's start to the container's first byte, in ms\n{:<12} {:>10} {:>10}\n",
        "", "cold", "warm"
    );
    for (index, name) in PARTS.iter().enumerate() {
        writeln!(text, "{name:<12} {:>10.1} {:>10.1}", cold[index], warm[index])?;
    }
    writeln!(text, "{:<12} {:>10.1} {:>10.1}", "all", cold.iter().sum::<f64>(), warm.iter().sum::<f64>())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stretch_belongs_to_whom_it_ends_with() {
        let moment = |part: &str, name: &str, micros: u64| serde_json::json!({ "part": part, "name": name, "micros": micros });
        let trace = serde_json::json!({ "moments": [
            moment("cli", "connected", 1000),
            moment("daemon", "create", 3000),
            moment("vmm", "vcpus-started", 6000),
            moment("guest", "agent-started", 10_000),
            moment("guest", "listening", 15_000),
            moment("agent", "exec", 21_000),
            moment("cli", "first-byte", 28_000),
            moment("cli", "ended", 90_000),
        ]});
        assert_eq!(shares(&trace).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 13.0]);
    }
}
