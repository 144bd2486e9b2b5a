//! Container names: which are legal, and made-up ones for containers that were given none.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Error, Result};

/// Longer names are refused: they appear in paths of logs and in host names.
const MAX_LEN: usize = 255;

const LEFT: &[&str] = &[
    "amber", "ample", "bold", "brave", "bright", "brisk", "calm", "clever", "cosy", "crisp", "daring",
    "deft", "eager", "early", "easy", "fair", "fleet", "fond", "gentle", "glad", "golden", "grand", "happy",
    "hardy", "honest", "humble", "jolly", "keen", "kind", "light", "lively", "loyal", "lucid", "mellow",
    "merry", "mild", "modest", "neat", "nimble", "noble", "patient", "placid", "plucky", "proud", "quick",
    "quiet", "ready", "rosy", "sage", "serene", "sharp", "silent", "sleek", "smooth", "snug", "sober",
    "solid", "spry", "stable", "steady", "still", "stout", "sunny", "swift", "tidy", "trim", "trusty",
    "upbeat", "vivid", "warm", "wise", "witty", "young", "zesty",
];
const RIGHT: &[&str] = &[
    "amundsen",
    "anning",
    "bell",
    "bering",
    "blackwell",
    "boole",
    "cabot",
    "cartier",
    "chalmers",
    "clapham",
    "columba",
    "cook",
    "cousteau",
    "curie",
    "dampier",
    "davis",
    "drake",
    "earhart",
    "ericson",
    "euler",
    "faraday",
    "fermat",
    "flinders",
    "franklin",
    "frobisher",
    "galvani",
    "gauss",
    "germain",
    "hamilton",
    "heyerdahl",
    "hooke",
    "hopper",
    "hudson",
    "huygens",
    "johnson",
    "kelvin",
    "kepler",
    "knuth",
    "lamarr",
    "lovelace",
    "magellan",
    "markham",
    "maury",
    "maxwell",
    "meitner",
    "mercator",
    "nansen",
    "newton",
    "noether",
    "nordenskjold",
    "pascal",
    "peary",
    "polo",
    "ride",
    "ross",
    "scoresby",
    "shackleton",
    "slocum",
    "somerville",
    "tasman",
    "tereshkova",
    "thomson",
    "torvalds",
    "turing",
    "vancouver",
    "vespucci",
    "watt",
    "weddell",
    "wegener",
    "zheng",
];

/// Checks a name that a client gave; a leading slash is Docker's and is dropped.
pub(crate) fn check(name: &str) -> Result<&str> {
    let bare = name.strip_prefix('/').unwrap_or(name);
    let first = bare.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = bare.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if first && rest && (2..=MAX_LEN).contains(&bare.len()) {
        return Ok(bare);
    }
    let shown: String = name.chars().take(80).collect();
    Err(Error::invalid(format!(
        "Invalid container name ({shown}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
    )))
}

/// Makes up a name; later attempts add a number.
pub(crate) fn make_up(attempt: u32) -> String {
    let mut random = [0; 4];
    fill_random(&mut random);
    let [a, b, c, d] = random.map(usize::from);
    let left = LEFT[(a * 256 + b) % LEFT.len()];
    let right = RIGHT[(c * 256 + d) % RIGHT.len()];
    if attempt == 0 { format!("{left}_{right}") } else { format!("{left}_{right}{attempt}") }
}

/// A new id: 64 hexadecimal digits, never all decimal in the first twelve (they would look like a number).
pub(crate) fn new_id() -> coracle_agent_api::ProcessId {
    loop {
        let mut random = [0; 32];
        fill_random(&mut random);
        let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        if text[..12].bytes().any(|b| b.is_ascii_alphabetic()) {
            return text.parse().expect("64 hexadecimal digits are an id");
        }
    }
}

fn fill_random(bytes: &mut [u8]) {
    // Up to 256 bytes come whole or not at all.
    getrandom(bytes, GetRandomFlags::empty()).expect("the kernel has random numbers");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_dockers_rule() {
        for good in ["ab", "web-1", "/web", "A.b_c-d", "0a"] {
            assert!(check(good).is_ok(), "{good}");
        }
        assert_eq!(check("/web").unwrap(), "web");
        for bad in ["", "a", "-a", ".a", "a b", "a/b", "//a", "ü2", &"a".repeat(256)] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn made_up_names_and_ids_are_legal() {
        for attempt in 0..50 {
            assert!(check(&make_up(attempt)).is_ok());
            assert_eq!(new_id().as_str().len(), 64);
        }
    }
}
