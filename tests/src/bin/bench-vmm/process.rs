//! What a VMM's process shows of itself in /proc.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// The process's resident memory without the guest's, in MiB: the guest's is the mapping that is at least half as large as its memory.
pub(crate) fn own_memory(pid: u32, guest_mib: u64) -> Result<f64> {
    let (_, own) = resident(pid, guest_mib)?;
    Ok(own as f64 / 1024.0)
}

/// The guest's resident memory in MiB.
pub(crate) fn guest_memory(pid: u32, guest_mib: u64) -> Result<f64> {
    let (guest, _) = resident(pid, guest_mib)?;
    Ok(guest as f64 / 1024.0)
}

/// Resident KiB of the guest's mappings and of all others.
fn resident(pid: u32, guest_mib: u64) -> Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("the VMM has no memory map")?;
    let number = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    let (mut size, mut guest, mut own) = (0, 0, 0);
    for line in text.lines() {
        if line.starts_with("Size:") {
            size = number(line).context("a mapping without a size")?;
        } else if line.starts_with("Rss:") {
            let rss = number(line).context("a mapping without a resident size")?;
            *(if size >= guest_mib * 1024 / 2 { &mut guest } else { &mut own }) += rss;
        }
    }
    Ok((guest, own))
}

/// How often the threads that are not processors woke up in 5 s.
pub(crate) fn wakeups(pid: u32, processors: &str) -> Result<f64> {
    let before = switches(pid, processors)?;
    std::thread::sleep(Duration::from_secs(5));
    Ok(switches(pid, processors)?.saturating_sub(before) as f64)
}

fn switches(pid: u32, processors: &str) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        if fs::read_to_string(path.join("comm"))?.starts_with(processors) {
            continue;
        }
        let status = fs::read_to_string(path.join("status"))?;
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        sum += lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>();
    }
    Ok(sum)
}
