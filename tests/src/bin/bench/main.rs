//! Benches against peers, run by `cargo xtask bench NAME`: `agent` on this machine as root, `boot` and `run` in the lab. The
//! bench `vmm` is a program of its own.

mod agent;
mod machine;
mod microvm;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let mut json = false;
    let mut rounds = None;
    for arg in args {
        match (arg.as_str(), arg.strip_prefix("--rounds=")) {
            ("--json", _) => json = true,
            (_, Some(count)) => rounds = Some(count.parse()?),
            _ => bail!("`{arg}` is not an option: --json and --rounds=N are"),
        }
    }
    match name.as_str() {
        "agent" => agent::bench(rounds.unwrap_or(50), json),
        "boot" => machine::boot(rounds.unwrap_or(20), json),
        "run" => machine::warm(rounds.unwrap_or(20), json),
        other => bail!("`{other}` is not a bench: `agent`, `boot` and `run` are"),
    }
}
