//! Points in time as the Docker API and the guest write them.
//!
//! Times from a guest may be anything that fits their type; none of them makes a conversion here panic.

use std::{fmt, str::FromStr, time::SystemTime};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

const NANOS: i64 = 1_000_000_000;

/// Nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct UnixNanos(pub(crate) i64);

/// Why a text is no point in time.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is neither a Unix time (seconds, with or without a fraction) nor an RFC 3339 time")]
pub(crate) struct TimeError(String);

impl UnixNanos {
    /// This moment.
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }

    /// From the guest's unsigned form; what is too large becomes the largest.
    pub(crate) fn from_u64(nanos: u64) -> Self {
        Self(i64::try_from(nanos).unwrap_or(i64::MAX))
    }

    pub(crate) fn seconds(self) -> i64 {
        self.0.div_euclid(NANOS)
    }

    pub(crate) fn timestamp(self) -> Timestamp {
        Timestamp::from_nanosecond(i128::from(self.0)).unwrap_or_default()
    }

    /// RFC 3339 with the fraction's trailing zeros cut off, as in log files and `inspect`.
    pub(crate) fn rfc3339(self) -> String {
        self.timestamp().to_string()
    }

    /// RFC 3339 with nine digits of fraction, as in front of lines from `docker logs --timestamps`.
    pub(crate) fn rfc3339_fixed(self) -> String {
        format!("{:.9}", self.timestamp())
    }

    /// Reads the `since` and `until` of queries: `1700000000`, `1700000000.123456789` or RFC 3339.
    pub(crate) fn parse_query(text: &str) -> Result<Self, TimeError> {
        let error = || TimeError(text.chars().take(80).collect());
        if text.contains(['T', ':']) {
            return text.parse();
        }
        let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (seconds, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return Err(error());
        }
        let seconds: i64 = seconds.parse().map_err(|_| error())?;
        let nanos: i64 = format!("{fraction:0<9}").parse().map_err(|_| error())?;
        let value = seconds.checked_mul(NANOS).and_then(|n| n.checked_add(nanos)).ok_or_else(error)?;
        Ok(Self(if negative { -value } else { value }))
    }
}

impl FromStr for UnixNanos {
    type Err = TimeError;

    fn from_str(text: &str) -> Result<Self, TimeError> {
        let error = || TimeError(text.chars().take(80).collect());
        let timestamp: Timestamp = text.parse().map_err(|_| error())?;
        i64::try_from(timestamp.as_nanosecond()).map(Self).map_err(|_| error())
    }
}

impl fmt::Display for UnixNanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.rfc3339())
    }
}

/// What Docker writes for a time that has not come.
pub(crate) const NEVER: &str = "0001-01-01T00:00:00Z";

/// A time, or [`NEVER`].
pub(crate) fn or_never(time: Option<UnixNanos>) -> String {
    time.map_or_else(|| NEVER.to_owned(), UnixNanos::rfc3339)
}

/// A span as `docker ps` writes it: `5 seconds`, `About a minute`, `3 hours`.
pub(crate) fn human_span(nanos: i64) -> String {
    let seconds = nanos / NANOS;
    let (minutes, hours) = (seconds / 60, (seconds + 1800) / 3600);
    match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_times_are_read_as_docker_clients_write_them() {
        assert_eq!(UnixNanos::parse_query("12").unwrap().0, 12 * NANOS);
        assert_eq!(UnixNanos::parse_query("12.000000005").unwrap().0, 12 * NANOS + 5);
        assert_eq!(UnixNanos::parse_query("12.5").unwrap().0, 12 * NANOS + NANOS / 2);
        assert_eq!(UnixNanos::parse_query("1970-01-01T00:00:01Z").unwrap().0, NANOS);
        for bad in ["", "x", "1.x", "99999999999999999999", "1.0000000001"] {
            assert!(UnixNanos::parse_query(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_written_in_both_of_dockers_forms() {
        let time = UnixNanos(1_700_000_000 * NANOS + 120_000_000);
        assert_eq!(time.rfc3339(), "2023-11-14T22:13:20.12Z");
        assert_eq!(time.rfc3339_fixed(), "2023-11-14T22:13:20.120000000Z");
        assert_eq!(UnixNanos(0).rfc3339(), "1970-01-01T00:00:00Z");
        assert_eq!(time.rfc3339().parse::<UnixNanos>().unwrap(), time);
    }

    #[test]
    fn spans_read_like_dockers() {
        for (seconds, text) in
            [(0, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute")]
        {
            assert_eq!(human_span(seconds * NANOS), text);
        }
        assert_eq!(human_span(3600 * NANOS), "About an hour");
        assert_eq!(human_span(50 * 3600 * NANOS), "2 days");
    }
}
