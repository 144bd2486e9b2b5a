//! The bench of the VMM, run in the lab by `cargo xtask bench vmm`: memory, streams, disks and idleness, against QEMU's microvm machine
//! with the same kernel and initramfs, and against the host's loopback TCP. One program plays all parts, as in the VMM's own tests: the
//! bench, the VMM, and the guest's first process.
//!
//! Everything that is compared is written as a time, so that a ratio above 1 is ahead.

#[path = "../../../../vmm/tests/machine/guest.rs"]
mod guest;
#[allow(dead_code)]
#[path = "../../../../vmm/tests/machine/host.rs"]
mod host;
#[path = "../../../../vmm/tests/machine/initramfs.rs"]
mod initramfs;
mod process;
mod qemu;
mod work;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use coracle_tests::report::{self, Row, median};

use host::{Options, Vm};
use qemu::Qemu;

const MEMORY_MIB: u64 = 512;
const VCPUS: u32 = 2;
const QEMU: &str = "QEMU microvm";
const VHOST: &str = "vhost-vsock";
const TCP: &str = "loopback TCP";
const PLACE: &str = "the lab (emulated: ratios and counts only)";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::main();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == host::VMM_ROLE) {
        return host::be_the_vmm();
    }
    match bench(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

/// One value of ours and its peer's, a pair for each round.
struct Pairs {
    metric: String,
    unit: &'static str,
    peer: &'static str,
    goal: Option<f64>,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

#[derive(Default)]
struct Measured(Vec<Pairs>);

impl Measured {
    fn add(
        &mut self,
        metric: &str,
        unit: &'static str,
        peer: &'static str,
        goal: Option<f64>,
        pair: (f64, f64),
    ) {
        eprintln!("  {metric}: {:.1} {unit}, {peer} {:.1}", pair.0, pair.1);
        let found = self.0.iter_mut().find(|pairs| pairs.metric == metric && pairs.peer == peer);
        match found {
            Some(pairs) => {
                pairs.ours.push(pair.0);
                pairs.theirs.push(pair.1);
            }
            None => self.0.push(Pairs {
                metric: metric.to_owned(),
                unit,
                peer,
                goal,
                ours: vec![pair.0],
                theirs: vec![pair.1],
            }),
        }
    }

    fn rows(&self) -> Vec<Row> {
        let row = |pairs: &Pairs| Row {
            metric: pairs.metric.clone(),
            value: median(&pairs.ours),
            unit: pairs.unit,
            peer: Some((pairs.peer.to_owned(), median(&pairs.theirs))),
            goal: pairs.goal,
        };
        self.0.iter().map(row).collect()
    }
}

fn bench(arguments: &[String]) -> Result<()> {
    let (mut json, mut rounds) = (false, 3);
    // The first one is the bench's name.
    for argument in arguments.iter().skip(1) {
        match (argument.as_str(), argument.strip_prefix("--rounds=")) {
            ("--json", _) => json = true,
            (_, Some(count)) => rounds = count.parse()?,
            _ => bail!("`{argument}` is not an option: --json and --rounds=N are"),
        }
    }
    let kernel = host::kernel().context("there is no guest kernel: `cargo xtask guest` builds it")?;
    let options = Options { vcpus: VCPUS, memory_mib: MEMORY_MIB, serial: false, keep: false, files: false };
    let ours = Vm::boot(&kernel, &options);
    let theirs = Qemu::start(&kernel, &initramfs::build(), VCPUS, MEMORY_MIB)?;
    let server = work::TcpServer::start()?;
    let (to_ours, to_theirs) = (|| File::from(OwnedFd::from(ours.connect(guest::PORT))), || theirs.connect());
    let to_host = || server.connect();

    let mut measured = Measured::default();
    let resident =
        (process::own_memory(ours.child.id(), MEMORY_MIB)?, process::own_memory(theirs.pid(), MEMORY_MIB)?);
    measured.add("the VMM's memory beyond the guest's; 5 is the goal", "MiB", QEMU, Some(1.0), resident);
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for (streams, mib) in [(1, 8), (8, 8), (64, 8)] {
            let bytes = mib << 20;
            let in_ours =
                (work::to_guest(&to_ours, streams, bytes)?, work::to_host(&to_ours, streams, bytes)?);
            let in_theirs =
                (work::to_guest(&to_theirs, streams, bytes)?, work::to_host(&to_theirs, streams, bytes)?);
            let in_tcp = work::to_guest(&to_host, streams, bytes)?;
            let name = |way: &str| format!("{mib} MiB {way}, streams: {streams}");
            measured.add(&name("to the guest"), "ms", VHOST, Some(1.0), (in_ours.0, in_theirs.0));
            measured.add(&name("to the host"), "ms", VHOST, Some(1.0), (in_ours.1, in_theirs.1));
            measured.add(&name("to the guest"), "ms", TCP, None, (in_ours.0, in_tcp));
            measured.add(&name("to the host"), "ms", TCP, None, (in_ours.1, in_tcp));
            let ways = (in_ours.0.max(in_ours.1), in_ours.0.min(in_ours.1));
            measured.add(&name("the slower way"), "ms", "other way", Some(0.8), ways);
        }
        let trips = (work::trips(&to_ours, 300)?, work::trips(&to_theirs, 300)?, work::trips(&to_host, 300)?);
        measured.add("a byte there and back", "µs", VHOST, Some(1.0), (trips.0, trips.1));
        measured.add("a byte there and back", "µs", TCP, None, (trips.0, trips.2));
        let connects = (
            work::connects(&to_ours, 150)?,
            work::connects(&to_theirs, 150)?,
            work::connects(&to_host, 150)?,
        );
        measured.add(
            "a connection with a question and an answer",
            "µs",
            VHOST,
            Some(1.0),
            (connects.0, connects.1),
        );
        measured.add("a connection with a question and an answer", "µs", TCP, None, (connects.0, connects.2));
        for (metric, command) in [
            ("disk: 64 MiB read in order", "disk read"),
            ("disk: 64 MiB written in order", "disk write"),
            ("disk: 4 KiB read at random, one at a time", "disk random 1"),
            ("disk: 4 KiB read at random, 16 at a time", "disk random 16"),
            ("disk: 4 KiB written and flushed", "disk flush"),
        ] {
            let pair = (work::ask_number(&to_ours, command)?, work::ask_number(&to_theirs, command)?);
            measured.add(metric, "µs", QEMU, Some(1.0), pair);
        }
        let idle = (process::wakeups(ours.child.id(), "vcpu")?, process::wakeups(theirs.pid(), "CPU")?);
        measured.add("wake-ups of an idle VMM in 5 s; 0 is the goal", "", QEMU, None, idle);
    }
    let returned = (
        work::memory_back(&to_ours, ours.child.id(), MEMORY_MIB)?,
        work::memory_back(&to_theirs, theirs.pid(), MEMORY_MIB)?,
    );
    measured.add("of 75 % of the memory, still held 10 s after it was freed", "%", QEMU, Some(1.0), returned);
    report::print("vmm", PLACE, false, &measured.rows(), json)
}
