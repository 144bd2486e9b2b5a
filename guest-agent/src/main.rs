//! The agent's program: as PID 1 it is the guest's init, otherwise a process for tests.

use std::path::PathBuf;
use std::process::ExitCode;

use coracle_guest_agent::{as_init, as_process};

const USAGE: &str =
    "usage: coracle-guest-agent --listen-unix PATH --ready-unix PATH [--streams-unix PATH] --data-dir DIR";

fn main() -> ExitCode {
    start_log();
    let result = if as_init::is_init() {
        as_init::run()
    } else {
        match parse(std::env::args_os().skip(1)) {
            Some(options) => as_process::run(&options),
            None => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the agent failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut args: impl Iterator<Item = std::ffi::OsString>) -> Option<as_process::Options> {
    let (mut listen, mut ready, mut streams, mut data) = (None, None, None, None);
    while let Some(name) = args.next() {
        let value = PathBuf::from(args.next()?);
        match name.to_str()? {
            "--listen-unix" => listen = Some(value),
            "--ready-unix" => ready = Some(value),
            "--streams-unix" => streams = Some(value),
            "--data-dir" => data = Some(value),
            _ => return None,
        }
    }
    Some(as_process::Options { listen: listen?, ready: ready?, streams, data: data? })
}

/// Logs to the kernel's log as PID 1, otherwise to standard error.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CORACLE_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    if as_init::is_init() {
        builder.with_ansi(false).without_time().with_writer(KernelLog::open).init();
    } else {
        builder.with_writer(std::io::stderr).init();
    }
}

/// A line for the kernel's log; nothing where that cannot be written to.
struct KernelLog(Option<std::fs::File>);

impl KernelLog {
    fn open() -> Self {
        Self(std::fs::OpenOptions::new().write(true).open("/dev/kmsg").ok())
    }
}

impl std::io::Write for KernelLog {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        if let Some(log) = &mut self.0 {
            let line: Vec<u8> = [b"coracle-agent: ".as_slice(), line].concat();
            log.write_all(&line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
