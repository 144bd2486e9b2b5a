//! Where the time went, from the CLI's start to the container's first byte.
//!
//! The CLI's own moments, the daemon's, the VMM's and the guest's are brought onto one axis: microseconds since the CLI
//! started, by CLOCK_MONOTONIC. The guest counts from its kernel's start, which is taken to be when its processors were
//! started.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    args::TimingsFormat,
    client::{ClientError, Docker, escape},
    clock::monotonic_micros,
    files,
    paths::Home,
    table::printable,
    terminal, vm,
};

/// A file that the moments are written to as JSON, whatever the options say.
const TRACE_VARIABLE: &str = "CORACLE_TRACE";

/// Collects moments, if somebody wants them.
#[derive(Debug)]
pub(crate) struct Timings {
    format: Option<TimingsFormat>,
    file: Option<PathBuf>,
    /// The CLI's start.
    started: u64,
    /// Unix time minus monotonic time, in microseconds.
    unix_offset: i128,
    moments: Vec<Moment>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Moment {
    /// Who saw it.
    part: &'static str,
    /// What happened.
    name: String,
    /// Microseconds since the CLI's start.
    micros: u64,
}

/// Everything, as JSON.
#[derive(Debug, Serialize)]
struct Trace<'a> {
    /// The CLI's start, in microseconds of CLOCK_MONOTONIC.
    started_monotonic_micros: u64,
    /// The container's first byte of output, in microseconds since then.
    first_byte_micros: Option<u64>,
    /// The machine was started for this container.
    booted: bool,
    moments: &'a [Moment],
}

/// The daemon's answer.
#[derive(Debug, Deserialize)]
struct DaemonTimings {
    phases: Vec<DaemonPhase>,
    #[serde(default)]
    agent: Vec<DaemonPhase>,
    unix_nanos: i128,
}

#[derive(Debug, Deserialize)]
struct DaemonPhase {
    name: String,
    micros: u64,
}

impl Timings {
    /// Begins; `started` is the CLI's start in microseconds of CLOCK_MONOTONIC.
    pub(crate) fn new(started: u64, format: Option<TimingsFormat>) -> Result<Self> {
        let file = std::env::var_os(TRACE_VARIABLE).filter(|file| !file.is_empty()).map(PathBuf::from);
        let unix = i128::from(jiff::Timestamp::now().as_microsecond());
        let unix_offset = unix - i128::from(monotonic_micros());
        Ok(Self { format, file, started, unix_offset, moments: Vec::new() })
    }

    fn wanted(&self) -> bool {
        self.format.is_some() || self.file.is_some()
    }

    /// Notes something that the CLI sees.
    pub(crate) fn now(&mut self, name: &str) {
        if self.wanted() {
            self.add("cli", name, monotonic_micros());
        }
    }

    fn add(&mut self, part: &'static str, name: &str, at: u64) {
        let micros = at.saturating_sub(self.started);
        self.moments.push(Moment { part, name: printable(name), micros });
    }

    /// Asks the daemon for its moments; it knows them for a while after the container is gone.
    async fn ask(&mut self, home: &Home, docker: &Docker, id: &str) -> Result<()> {
        let answer: Result<DaemonTimings, ClientError> =
            docker.get(&format!("/coracle/timings/{}", escape(id))).await;
        let answer = answer.context("cannot ask the daemon where the time went")?;
        let base = i128::from(self.unix_offset_free(answer.unix_nanos));
        let mut started_at = None;
        for phase in &answer.phases {
            let at = u64::try_from(base + i128::from(phase.micros)).unwrap_or(0);
            self.add("daemon", &phase.name, at);
            if phase.name == "layers-attached" {
                started_at = Some(at);
            }
        }
        if let Some(started_at) = started_at {
            for phase in &answer.agent {
                self.add("agent", &phase.name, started_at.saturating_add(phase.micros));
            }
        }
        self.add_boot(home);
        Ok(())
    }

    /// A daemon's Unix time as monotonic microseconds.
    fn unix_offset_free(&self, unix_nanos: i128) -> u64 {
        u64::try_from(unix_nanos / 1000 - self.unix_offset).unwrap_or(0)
    }

    /// The boot of the machine, if it was booted for this container.
    fn add_boot(&mut self, home: &Home) {
        let Some(record) = vm::Folder::new(home.vms().join("default")).load_boot() else { return };
        if record.started_micros < self.started {
            return;
        }
        self.add("vmm", "start-asked", record.started_micros);
        for (name, micros) in &record.boot {
            self.add("vmm", name, record.started_micros.saturating_add(*micros));
        }
        let kernel = record.boot.iter().find(|(name, _)| name == "vcpus-started");
        if let Some((_, micros)) = kernel {
            let kernel_start = record.started_micros.saturating_add(*micros);
            for phase in record.hello.iter().flat_map(|hello| &hello.phases) {
                self.add("guest", &phase.name, kernel_start.saturating_add(phase.guest_micros));
            }
        }
    }

    /// Prints and writes what was collected.
    pub(crate) async fn report(
        &mut self,
        home: &Home,
        docker: &Docker,
        id: &str,
        first_byte: Option<u64>,
    ) -> Result<()> {
        if !self.wanted() {
            return Ok(());
        }
        self.ask(home, docker, id).await?;
        if let Some(at) = first_byte {
            self.add("cli", "first-byte", at);
        }
        self.moments.sort_by_key(|moment| moment.micros);
        let trace = Trace {
            started_monotonic_micros: self.started,
            first_byte_micros: first_byte.map(|at| at.saturating_sub(self.started)),
            booted: self.moments.iter().any(|moment| moment.part == "vmm"),
            moments: &self.moments,
        };
        let json = serde_json::to_string(&trace).context("cannot write the timings as JSON")?;
        if let Some(file) = &self.file {
            let contents = format!("{json}\n");
            files::replace(file, contents.as_bytes())
                .with_context(|| format!("cannot write the timings to {}", file.display()))?;
        }
        match self.format {
            Some(TimingsFormat::Json) => terminal::complain(&format!("{json}\n")),
            Some(TimingsFormat::Table) => terminal::complain(&table(&self.moments)),
            None => {}
        }
        Ok(())
    }
}

/// One line for each moment: when, how long since the one before, who, what.
fn table(moments: &[Moment]) -> String {
    let mut text = format!("{:>10}  {:>10}  {:<7} {}\n", "at", "after", "where", "what");
    let mut before = 0;
    for moment in moments {
        let (at, after) = (millis(moment.micros), millis(moment.micros - before));
        text += &format!("{at:>10}  {after:>10}  {:<7} {}\n", moment.part, moment.name);
        before = moment.micros;
    }
    text
}

fn millis(micros: u64) -> String {
    format!("{:.2} ms", micros as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_stand_in_a_table() {
        let moment = |part, name: &str, micros| Moment { part, name: name.to_owned(), micros };
        let text = table(&[moment("cli", "daemon-connected", 1500), moment("daemon", "created", 2000)]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "   1.50 ms     1.50 ms  cli     daemon-connected");
        assert_eq!(lines[2], "   2.00 ms     0.50 ms  daemon  created");
    }

    #[test]
    fn a_daemons_time_is_brought_onto_our_axis() {
        let mut timings = Timings::new(1_000, Some(TimingsFormat::Table)).unwrap();
        timings.unix_offset = 5_000_000;
        assert_eq!(timings.unix_offset_free(5_002_000_000), 2_000);
        timings.add("daemon", "created", 2_000);
        assert_eq!(timings.moments[0].micros, 1_000);
    }
}
