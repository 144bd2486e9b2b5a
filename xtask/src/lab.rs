//! The lab: runs a command on a machine that has a usable KVM. That is this machine, or else one that QEMU emulates, with one AMD
//! processor that virtualizes and with this machine's files, where changes to them stay in memory. The command's output streams,
//! its exit code is ours, and nothing is left behind when it ends or is interrupted.

mod machine;
mod system;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::probe;

/// Where and how the command runs.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Options {
    /// Memory of the emulated machine, in MiB.
    #[arg(long, default_value_t = 4096, env = "CORACLE_LAB_MEMORY", value_parser = clap::value_parser!(u32).range(512..=262_144))]
    pub(crate) memory: u32,
    /// Emulate even where this machine's KVM is usable.
    #[arg(long, env = "CORACLE_LAB_EMULATE")]
    pub(crate) emulate: bool,
    /// A folder that the command may write to; it finds its path in CORACLE_LAB_OUT.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory: 4096,
            emulate: std::env::var_os("CORACLE_LAB_EMULATE").is_some_and(|value| value == "true"),
            out: None,
        }
    }
}

/// Whether the command would run on this machine itself; if not, why.
pub(crate) fn native(options: &Options) -> std::result::Result<(), String> {
    if options.emulate {
        return Err("emulation was asked for".to_owned());
    }
    probe::probe().map_err(|error| error.to_string())
}

/// Runs `arguments` as a command in the lab and returns its exit code.
pub(crate) fn run(options: &Options, arguments: &[String]) -> Result<ExitCode> {
    let Some((program, rest)) = arguments.split_first() else { bail!("no command was given") };
    if let Some(out) = &options.out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    }
    match native(options) {
        Ok(()) => run_here(options, program, rest),
        Err(_) => {
            let system = system::get()?;
            machine::run(&system, options, arguments)
        }
    }
}

/// Makes everything ready for a run, so that one starts at once.
pub(crate) fn prepare(options: &Options) -> Result<()> {
    if native(options).is_err() {
        system::get()?;
    }
    Ok(())
}

fn run_here(options: &Options, program: &str, arguments: &[String]) -> Result<ExitCode> {
    use std::os::unix::process::ExitStatusExt as _;
    let mut command = crate::shell::command(program, arguments);
    let temporary;
    let out = match &options.out {
        Some(out) => out.canonicalize()?,
        None => {
            temporary = tempfile::tempdir().context("cannot make a temporary folder")?;
            temporary.path().to_owned()
        }
    };
    command.env("CORACLE_LAB_OUT", out);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("{program}: {error}");
            return Ok(ExitCode::from(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 }));
        }
    };
    // The terminal sends its interrupts to the command as well; the command decides what they mean.
    let _held = machine::Signals::hold()?;
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
