//! Sizes and ages as Docker's CLI writes and reads them.

use anyhow::{Result, bail};

/// `4.27MB`: decimal units, three significant digits.
pub(crate) fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{}{}", significant(value), UNITS[unit])
}

/// `512MiB`: binary units, for memory.
pub(crate) fn human_binary_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{}{}", significant(value), UNITS[unit])
}

/// Three significant digits without trailing zeros, as C's `%.3g` writes numbers below 1024.
fn significant(value: f64) -> String {
    let decimals = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// `About an hour`, `3 days`: how long something has been, in words.
pub(crate) fn human_duration(seconds: i64) -> String {
    let minutes = seconds / 60;
    let hours = (seconds + 1800) / 3600;
    match () {
        () if seconds < 1 => "Less than a second".into(),
        () if seconds == 1 => "1 second".into(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".into(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".into(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

/// Reads `512m`, `2GiB`, `1.5g`, `4096`: binary units, as Docker reads memory sizes.
pub(crate) fn parse_size(text: &str) -> Result<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => bail!("`{text}` is no size: expected a number with an optional b, k, m, g or t"),
    };
    let Ok(value) = number.parse::<f64>() else {
        bail!("`{text}` is no size: expected a number with an optional b, k, m, g or t");
    };
    let bytes = value * (1u64 << shift) as f64;
    if !bytes.is_finite() || bytes >= (1u64 << 62) as f64 {
        bail!("`{text}` is too large");
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(0, "0B")]
    #[case(999, "999B")]
    #[case(1_000, "1kB")]
    #[case(4_268_000, "4.27MB")]
    #[case(45_600_000, "45.6MB")]
    #[case(123_456_789_000, "123GB")]
    fn sizes_are_written_as_docker_writes_them(#[case] bytes: u64, #[case] text: &str) {
        assert_eq!(human_size(bytes), text);
    }

    #[rstest]
    #[case(0, "Less than a second")]
    #[case(1, "1 second")]
    #[case(59, "59 seconds")]
    #[case(60, "About a minute")]
    #[case(3_599, "59 minutes")]
    #[case(3_600, "About an hour")]
    #[case(86_400, "24 hours")]
    #[case(86_400 * 3, "3 days")]
    #[case(86_400 * 365, "12 months")]
    fn ages_are_written_as_docker_writes_them(#[case] seconds: i64, #[case] text: &str) {
        assert_eq!(human_duration(seconds), text);
    }

    #[rstest]
    #[case("4096", 4096)]
    #[case("512m", 512 << 20)]
    #[case("1.5G", 3 << 29)]
    #[case("2GiB", 2 << 30)]
    fn sizes_are_read_as_docker_reads_them(#[case] text: &str, #[case] bytes: u64) {
        assert_eq!(parse_size(text).unwrap(), bytes);
    }

    #[rstest]
    #[case("")]
    #[case("m")]
    #[case("-1")]
    #[case("1x")]
    #[case("1e400g")]
    #[case("99999999999999t")]
    fn what_is_no_size_is_refused(#[case] text: &str) {
        assert!(parse_size(text).is_err());
    }
}
