//! What a container's processes have used and what they are, from the cgroup's files and from /proc. Both change while they
//! are read; what is gone by the time it is looked at is left out.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use coracle_agent_api::{IoStats, MemoryStats, ProcessInfo, Processes, Stats};

use super::Cgroup;
use crate::clock;

/// The unit of time in /proc.
const TICKS_PER_SECOND: u64 = 100;
/// Processes that are told of at most.
const MAX_PROCESSES: usize = 10_000;
/// What is read of a command line.
const MAX_ARGUMENTS: u64 = 4096;
/// Groups below the container's own that are looked into.
const MAX_DEPTH: usize = 8;

impl Cgroup {
    /// What was used so far.
    pub(crate) fn stats(&self) -> io::Result<Stats> {
        let read = |name: &str| std::fs::read_to_string(self.path.join(name));
        let number = |name: &str| read(name).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let (system_cpu_nanos, online_cpus) = system_cpu()?;
        let memory = number("memory.current").map(|usage| MemoryStats {
            usage,
            limit: number("memory.max").unwrap_or(u64::MAX).min(all_memory()),
            stat: flat(&read("memory.stat").unwrap_or_default()),
        });
        let pids = match number("pids.current") {
            Some(pids) => pids,
            None => self.pids().len() as u64,
        };
        Ok(Stats {
            unix_nanos: clock::unix_nanos(),
            online_cpus,
            system_cpu_nanos,
            cpu: flat(&read("cpu.stat")?),
            memory,
            pids,
            pids_limit: number("pids.max"),
            io: read("io.stat").unwrap_or_default().lines().filter_map(io_line).collect(),
        })
    }

    /// Its processes.
    pub(crate) fn processes(&self) -> Processes {
        let booted = clock::unix_nanos().saturating_sub(clock::boot_micros().saturating_mul(1000));
        let mut pids = self.pids();
        pids.sort_unstable();
        let processes = pids.into_iter().filter_map(|pid| process(pid, booted)).collect();
        Processes { memory_bytes: all_memory(), processes }
    }

    fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        collect(&self.path, MAX_DEPTH, &mut pids);
        pids
    }
}

fn collect(group: &Path, depth: usize, pids: &mut Vec<u32>) {
    let text = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let room = MAX_PROCESSES.saturating_sub(pids.len());
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).take(room));
    // Only a container that may write to its cgroups has any below.
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, pids);
        }
    }
}

/// `name value` on each line.
fn flat(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// `major:minor rbytes=1 wbytes=2 …`.
fn io_line(line: &str) -> Option<IoStats> {
    let mut parts = line.split_whitespace();
    let (major, minor) = parts.next()?.split_once(':')?;
    let mut stats = IoStats { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IoStats::default() };
    for (name, value) in parts.filter_map(|part| part.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match name {
            "rbytes" => stats.read_bytes = value,
            "wbytes" => stats.write_bytes = value,
            "rios" => stats.reads = value,
            "wios" => stats.writes = value,
            _ => {}
        }
    }
    Some(stats)
}

/// Time of all processors, and how many there are.
fn system_cpu() -> io::Result<(u64, u32)> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let total = text.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or_default();
    // User, nice, system, idle, iowait, irq, softirq, as Docker adds them up.
    let ticks: u64 = total.split_whitespace().take(7).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    let cpus = text.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count();
    Ok((ticks.saturating_mul(1_000_000_000 / TICKS_PER_SECOND), cpus as u32))
}

pub(super) fn all_memory() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.mem_unit).saturating_mul(info.totalram)
}

fn process(pid: u32, booted: u64) -> Option<ProcessInfo> {
    let folder = Path::new("/proc").join(pid.to_string());
    let stat = std::fs::read(folder.join("stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat).into_owned();
    let mut info = parse_stat(&stat, booted)?;
    info.pid = pid;
    let status = std::fs::read(folder.join("status")).unwrap_or_default();
    let status = String::from_utf8_lossy(&status);
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let ids = |name: &str| -> [u32; 2] {
        let mut ids = line(name).unwrap_or_default().split_whitespace().map(|id| id.parse().unwrap_or(0));
        [ids.next().unwrap_or(0), ids.next().unwrap_or(0)]
    };
    let ([uid, euid], [gid, egid]) = (ids("Uid:"), ids("Gid:"));
    info.ids = [uid, gid, euid, egid];
    let kilobytes = |name: &str| -> u64 {
        line(name).and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    };
    info.resident_bytes = kilobytes("VmRSS:") * 1024;
    info.locked_bytes = kilobytes("VmLck:") * 1024;
    info.arguments = arguments(&folder).unwrap_or_default();
    Some(info)
}

fn arguments(folder: &Path) -> io::Result<Vec<String>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(folder.join("cmdline"))?.take(MAX_ARGUMENTS).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.trim_end_matches('\0').split('\0').map(str::to_owned).collect())
}

/// `pid (name) state …`; the name may hold anything, also `)`.
fn parse_stat(text: &str, booted: u64) -> Option<ProcessInfo> {
    let (head, tail) = text.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    // Field 3 of proc(5) is the first one here.
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or("0");
    let unsigned = |number: usize| field(number).parse::<u64>().unwrap_or(0);
    let signed = |number: usize| field(number).parse::<i64>().unwrap_or(0);
    let started = unsigned(22).saturating_mul(1_000_000_000 / TICKS_PER_SECOND);
    Some(ProcessInfo {
        state: field(3).to_owned(),
        name: name.to_owned(),
        parent: unsigned(4) as u32,
        group: unsigned(5) as u32,
        session: unsigned(6) as u32,
        terminal: signed(7) as u32,
        terminal_group: signed(8) as i32,
        cpu_micros: unsigned(14).saturating_add(unsigned(15)).saturating_mul(1_000_000 / TICKS_PER_SECOND),
        priority: signed(18),
        nice: signed(19),
        threads: unsigned(20) as u32,
        started_unix_nanos: booted.saturating_add(started),
        virtual_bytes: unsigned(23),
        processor: unsigned(39) as u32,
        ..ProcessInfo::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_have_any_name() {
        let stat = "7 (a) b (c)) S 1 7 7 34816 7 4194560 1 0 0 0 150 50 0 0 20 5 3 0 200 1048576 2 1 0";
        let info = parse_stat(stat, 1_000).unwrap();
        assert_eq!((info.name.as_str(), info.state.as_str(), info.parent), ("a) b (c)", "S", 1));
        assert_eq!((info.cpu_micros, info.nice, info.threads), (2_000_000, 5, 3));
        assert_eq!(info.started_unix_nanos, 2_000_001_000);
        assert!(parse_stat("nonsense", 0).is_none());
        assert_eq!(parse_stat("1 (x)", 0).unwrap().parent, 0);
    }

    #[test]
    fn lines_that_make_no_sense_are_left_out() {
        let lines = "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\nnonsense\n1:x rbytes=1\n";
        let read: Vec<_> = lines.lines().filter_map(io_line).collect();
        assert_eq!(
            read,
            [IoStats { major: 254, minor: 0, read_bytes: 10, write_bytes: 20, reads: 1, writes: 2 }]
        );
        assert_eq!(flat("a 1\nb\nc x\n"), BTreeMap::from([("a".to_owned(), 1)]));
    }
}
