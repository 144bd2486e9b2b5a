//! One line of a json-file log: `{"log":…,"stream":…,"attrs":…,"time":…}`, byte for byte as Docker writes it.
//!
//! A container's output may be any bytes; what is no UTF-8 becomes U+FFFD. A line of a file that cannot be read as an entry
//! is reported as such and never stops a reader.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Stream;
use crate::time::UnixNanos;

/// A piece of output with its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) stream: Stream,
    pub(crate) time: UnixNanos,
    /// Ends with a newline unless the line goes on in the next entry or the output ended without one.
    pub(crate) text: String,
    /// What the container's log options say is to be noted with each line.
    pub(crate) attributes: BTreeMap<String, String>,
}

/// Appends an entry's line to a buffer.
pub(super) fn encode(
    out: &mut Vec<u8>,
    stream: Stream,
    time: UnixNanos,
    bytes: &[u8],
    attributes: &BTreeMap<String, String>,
) {
    out.extend_from_slice(b"{\"log\":\"");
    escape(out, bytes);
    out.extend_from_slice(b"\",\"stream\":\"");
    out.extend_from_slice(stream.name().as_bytes());
    out.push(b'"');
    if !attributes.is_empty() {
        out.extend_from_slice(b",\"attrs\":{");
        for (number, (name, value)) in attributes.iter().enumerate() {
            out.extend_from_slice(if number == 0 { b"\"" } else { b",\"" });
            escape(out, name.as_bytes());
            out.extend_from_slice(b"\":\"");
            escape(out, value.as_bytes());
            out.push(b'"');
        }
        out.push(b'}');
    }
    out.extend_from_slice(b",\"time\":\"");
    out.extend_from_slice(time.rfc3339().as_bytes());
    out.extend_from_slice(b"\"}\n");
}

fn escape(out: &mut Vec<u8>, bytes: &[u8]) {
    for chunk in bytes.utf8_chunks() {
        escape_text(out, chunk.valid());
        for _ in chunk.invalid() {
            out.extend_from_slice(b"\\ufffd");
        }
    }
}

fn escape_text(out: &mut Vec<u8>, text: &str) {
    let plain =
        |c: char| !matches!(c, '\0'..='\x1f' | '"' | '\\' | '<' | '>' | '&' | '\u{2028}' | '\u{2029}');
    let mut rest = text;
    while let Some(at) = rest.find(|c| !plain(c)) {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        let c = rest[at..].chars().next().expect("find gave the place of a character");
        match c {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            other => out.extend_from_slice(format!("\\u{:04x}", u32::from(other)).as_bytes()),
        }
        rest = &rest[at + c.len_utf8()..];
    }
    out.extend_from_slice(rest.as_bytes());
}

/// Reads a line of a file, without its newline.
pub(super) fn decode(line: &[u8]) -> Option<Entry> {
    #[derive(Deserialize)]
    struct Line {
        log: String,
        stream: String,
        #[serde(default)]
        attrs: BTreeMap<String, String>,
        time: String,
    }
    let line: Line = serde_json::from_slice(line).ok()?;
    let stream = match line.stream.as_str() {
        "stdout" => Stream::Stdout,
        "stderr" => Stream::Stderr,
        _ => return None,
    };
    Some(Entry { stream, time: line.time.parse().ok()?, text: line.log, attributes: line.attrs })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(bytes: &[u8]) -> String {
        let mut out = Vec::new();
        encode(&mut out, Stream::Stderr, UnixNanos(1_500_000_000), bytes, &BTreeMap::new());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_line_looks_as_docker_writes_it() {
        assert_eq!(
            line(b"a <b> & \"c\"\t\\\r\n"),
            "{\"log\":\"a \\u003cb\\u003e \\u0026 \\\"c\\\"\\u0009\\\\\\r\\n\",\"stream\":\"stderr\",\"time\":\"1970-01-01T00:00:01.5Z\"}\n"
        );
        assert!(line(b"\xff\xfe").starts_with("{\"log\":\"\\ufffd\\ufffd\","));
        assert!(line("\u{2028}é".as_bytes()).starts_with("{\"log\":\"\\u2028é\","));
    }

    proptest! {
        #[test]
        fn text_survives_the_file(
            text: String,
            attributes in proptest::collection::btree_map(any::<String>(), any::<String>(), 0..3),
            nanos in 0i64..=4_000_000_000_000_000_000,
        ) {
            let mut out = Vec::new();
            encode(&mut out, Stream::Stdout, UnixNanos(nanos), text.as_bytes(), &attributes);
            prop_assert_eq!(out.iter().filter(|b| **b == b'\n').count(), 1);
            let entry = decode(&out[..out.len() - 1]).unwrap();
            prop_assert_eq!(entry, Entry { stream: Stream::Stdout, time: UnixNanos(nanos), text, attributes });
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}
