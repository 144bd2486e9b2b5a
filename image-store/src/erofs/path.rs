//! Paths of tar entries, made safe: relative to the layer's root whatever they start with, without `..`, without NUL,
//! of components and length that Linux accepts. An entry's path is whatever the image's author wrote.

use super::format::MAX_NAME;

/// The longest path (Linux's PATH_MAX with its NUL).
const MAX_PATH: usize = 4095;

/// A path beneath the layer's root; empty for the root itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LayerPath<'a>(Vec<&'a [u8]>);

impl<'a> LayerPath<'a> {
    pub(super) fn parse(raw: &'a [u8]) -> Result<Self, &'static str> {
        if raw.is_empty() {
            return Err("its path is empty");
        }
        if raw.contains(&0) {
            return Err("its path contains a NUL byte");
        }
        if raw.len() > MAX_PATH {
            return Err("its path is longer than 4095 bytes");
        }
        let components: Vec<_> =
            raw.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
        if components.contains(&&b".."[..]) {
            return Err("its path contains `..`");
        }
        if components.iter().any(|part| part.len() > MAX_NAME) {
            return Err("a name in its path is longer than 255 bytes");
        }
        Ok(Self(components))
    }

    pub(super) fn components(&self) -> &[&'a [u8]] {
        &self.0
    }
}

/// A path as a person can read it in an error message, shortened.
pub(crate) fn display(raw: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(raw).chars().take(200).flat_map(char::escape_debug).collect();
    if raw.len() > 800 { format!("{text}…") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_root() {
        for (raw, expected) in [
            (&b"a/b"[..], &[&b"a"[..], b"b"][..]),
            (b"/a//./b/", &[b"a", b"b"]),
            (b"./", &[]),
            (b"/", &[]),
            (b"...", &[b"..."]),
            (b"..a/b..", &[b"..a", b"b.."]),
        ] {
            assert_eq!(LayerPath::parse(raw).unwrap().components(), expected);
        }
    }

    #[test]
    fn paths_that_escape_or_do_not_fit_are_refused() {
        let long_name = [b'a'; 256];
        let long_path = b"a/".repeat(2048);
        for raw in [&b""[..], b"..", b"a/../b", b"/..", b"a\0b", &long_name, &long_path] {
            assert!(LayerPath::parse(raw).is_err(), "{}", display(raw));
        }
    }
}
