//! What a bench prints: a table for people, or one JSON object per line; and the file that keeps what was printed last.

use std::{fmt::Write as _, fs};

use anyhow::Result;
use serde_json::json;

use crate::workspace;

/// One measured value, beside a peer's from the same run.
#[derive(Debug, Clone)]
pub struct Row {
    /// What was measured.
    pub metric: String,
    /// Ours.
    pub value: f64,
    /// Of both values.
    pub unit: &'static str,
    /// Who else was measured, and what came out; absent where there is no peer, or it could not run (say so in `metric`).
    pub peer: Option<(String, f64)>,
    /// The ratio to reach (the peer's value over ours).
    pub goal: Option<f64>,
}

impl Row {
    /// The peer's value over ours: above 1 is ahead.
    pub fn ratio(&self) -> Option<f64> {
        self.peer.as_ref().map(|(_, value)| value / self.value)
    }

    /// Whether the goal was reached; unknown without a peer or a goal.
    pub fn ok(&self) -> Option<bool> {
        Some(self.ratio()? >= self.goal?)
    }
}

/// The middle one of some measurements.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// What the row's ratio was in a table that was printed before, or its value where there is no peer.
fn last(table: &str, row: &Row) -> Option<f64> {
    let metric = format!("{} [{}]", row.metric, row.unit);
    let peer = row.peer.as_ref().map_or("", |(name, _)| name.as_str());
    let line = table.lines().find(|line| {
        line.strip_prefix(&metric).is_some_and(|rest| rest.starts_with(' ') && rest.contains(peer))
    })?;
    let words: Vec<&str> = line[metric.len()..].split_whitespace().collect();
    let ratio_at = match words.last()? {
        _ if row.peer.is_none() => Some(0),
        // After it come the goal and whether it was reached.
        &"yes" | &"no" => words.len().checked_sub(3),
        _ => words.len().checked_sub(1),
    };
    words.get(ratio_at?)?.parse().ok()
}

/// Prints the rows of a bench, with what they were when they were kept last, and keeps them. `place` says what kind of machine it was, `seconds_count` whether a time measured
/// there means anything by itself (in the lab only ratios do).
pub fn print(bench: &str, place: &str, seconds_count: bool, rows: &[Row], as_json: bool) -> Result<()> {
    if as_json {
        for row in rows {
            let (peer, peer_value) = row.peer.clone().unzip();
            let line = json!({
                "bench": bench, "metric": row.metric, "value": row.value, "unit": row.unit,
                "peer": peer, "peer_value": peer_value, "ratio": row.ratio(), "goal": row.goal, "ok": row.ok(),
            });
            println!("{line}");
        }
        return Ok(());
    }
    let hidden = |row: &Row| !seconds_count && matches!(row.unit, "ms" | "µs");
    let kept = workspace().join("tests/bench/results").join(format!("{bench}.txt"));
    let before = fs::read_to_string(kept).unwrap_or_default();
    let mut changes = String::new();
    let mut table = format!("{bench}, {} on {place}\n\n", jiff::Zoned::now().date());
    writeln!(
        table,
        "{:<68} {:>10} {:>12} {:>10} {:>7} {:>6}  ok",
        "metric", "ours", "peer", "", "ratio", "goal"
    )?;
    for row in rows {
        let number = |value: f64| if hidden(row) { "-".to_owned() } else { format!("{value:.2}") };
        let (peer, peer_value) = row
            .peer
            .as_ref()
            .map_or((String::new(), String::new()), |(name, value)| (name.clone(), number(*value)));
        let ratio = row.ratio().map_or(String::new(), |ratio| format!("{ratio:.2}"));
        let goal = row.goal.map_or(String::new(), |goal| format!("{goal:.2}"));
        let ok = row.ok().map_or("", |ok| if ok { "yes" } else { "no" });
        let metric = format!("{} [{}]", row.metric, row.unit);
        writeln!(
            table,
            "{metric:<68} {:>10} {peer:>12} {peer_value:>10} {ratio:>7} {goal:>6}  {ok}",
            number(row.value)
        )?;
        let now = if row.peer.is_some() { row.ratio() } else { (!hidden(row)).then_some(row.value) };
        if let (Some(now), Some(was)) = (now, last(&before, row)) {
            writeln!(changes, "{metric:<68} {was:>10.2} -> {now:.2}")?;
        }
    }
    print!("{table}");
    if !changes.is_empty() {
        print!("\nthe ratio (or the value, without a peer) that was kept last, and now\n\n{changes}");
    }
    if let Some(folder) = std::env::var_os("CORACLE_BENCH_RESULTS") {
        fs::write(std::path::Path::new(&folder).join(format!("{bench}.txt")), &table)?;
    } else {
        let folder = workspace().join("tests/bench/results");
        if fs::create_dir_all(&folder).is_ok() {
            // In the lab the tree is read-only; `cargo xtask bench` says where to write instead.
            fs::write(folder.join(format!("{bench}.txt")), &table)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn what_was_printed_last_is_found_again() {
        let table = "start [ms]       -  QEMU microvm    -   1.50   1.00  yes\nstart [ms]    -  TCP    -   0.70\nsize [MiB]    4.25\n";
        let row = |metric: &str, unit, peer: Option<&str>| Row {
            metric: metric.into(),
            value: 1.0,
            unit,
            peer: peer.map(|name| (name.to_owned(), 1.0)),
            goal: None,
        };
        assert_eq!(last(table, &row("start", "ms", Some("QEMU microvm"))), Some(1.5));
        assert_eq!(last(table, &row("start", "ms", Some("TCP"))), Some(0.7));
        assert_eq!(last(table, &row("size", "MiB", None)), Some(4.25));
        assert_eq!(last(table, &row("sta", "ms", Some("TCP"))), None);
        assert_eq!(last("", &row("start", "ms", Some("TCP"))), None);
    }

    #[test]
    fn a_ratio_above_one_is_ahead() {
        let row = Row {
            metric: "start".into(),
            value: 2.0,
            unit: "ms",
            peer: Some(("crun".into(), 3.0)),
            goal: Some(1.0),
        };
        assert_eq!((row.ratio(), row.ok()), (Some(1.5), Some(true)));
    }
}
