//! Signals by name and number, as `docker kill` and `STOPSIGNAL` write them.

use crate::error::{Error, Result};

pub(crate) const SIGKILL: u8 = 9;
pub(crate) const SIGTERM: u8 = 15;
const RTMIN: u8 = 34;
const RTMAX: u8 = 64;

const NAMES: &[(&str, u8)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", RTMIN),
    ("RTMAX", RTMAX),
];

/// Reads `TERM`, `SIGTERM`, `15`, `RTMIN+3` and the like.
pub(crate) fn parse(text: &str) -> Result<u8> {
    lookup(text).ok_or_else(|| {
        Error::invalid(format!("invalid signal: {}", text.chars().take(40).collect::<String>()))
    })
}

fn lookup(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let in_range = |number: u8| (RTMIN..=RTMAX).contains(&number).then_some(number);
    if let Some(offset) = name.strip_prefix("RTMIN+") {
        return in_range(RTMIN.checked_add(offset.parse().ok()?)?);
    }
    if let Some(offset) = name.strip_prefix("RTMAX-") {
        return in_range(RTMAX.checked_sub(offset.parse().ok()?)?);
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_as_docker_reads_them() {
        for (text, number) in
            [("TERM", 15), ("SIGKILL", 9), ("sigint", 2), ("9", 9), ("RTMIN+3", 37), ("SIGRTMAX-1", 63)]
        {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for bad in ["", "0", "65", "-1", "SIG", "SIGFOO", "RTMIN+40", "RTMAX-200", "RTMIN+"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
