//! Records of pax extended headers: `<length> <key>=<value>\n`. Values may hold any byte, because extended attributes
//! travel in them. Unknown keys are skipped, malformed records are errors.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::{Mtime, acl};

const XATTR: &[u8] = b"SCHILY.xattr.";
/// libarchive's form: names as in URLs, values in base64.
const ENCODED_XATTR: &[u8] = b"LIBARCHIVE.xattr.";
/// Writers differ in whether they pad.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What an extended header says about the next entry.
#[derive(Debug, Default)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Mtime>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseKeys,
}

/// GNU tar's sparse formats 0.0, 0.1 and 1.0 in pax keys.
#[derive(Debug, Default)]
pub(super) struct SparseKeys {
    pub(super) version: (u64, u64),
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Offsets and lengths, alternating.
    pub(super) pairs: Vec<u64>,
    seen: bool,
}

impl SparseKeys {
    pub(super) fn is_used(&self) -> bool {
        self.seen
    }
}

impl PaxRecords {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, &'static str> {
        let mut records = Self::default();
        while !bytes.is_empty() {
            let (key, value, rest) = split_record(bytes).ok_or("a malformed pax record")?;
            records.apply(key, value)?;
            bytes = rest;
        }
        Ok(records)
    }

    /// An empty value takes an earlier one back, as POSIX says.
    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let bytes = || (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = bytes(),
            b"linkpath" => self.linkpath = bytes(),
            b"size" => self.size = optional(value, decimal, "a malformed size in a pax record")?,
            b"uid" => self.uid = optional(value, decimal_u32, "user id is not a 32-bit number")?,
            b"gid" => self.gid = optional(value, decimal_u32, "group id is not a 32-bit number")?,
            b"mtime" => self.mtime = optional(value, timestamp, "a malformed mtime in a pax record")?,
            b"SCHILY.acl.access" => self.acl(b"system.posix_acl_access", value),
            b"SCHILY.acl.default" => self.acl(b"system.posix_acl_default", value),
            _ if key.starts_with(ENCODED_XATTR) => {
                let name =
                    url_decoded(&key[ENCODED_XATTR.len()..]).ok_or("a malformed name of an attribute")?;
                let value = BASE64.decode(value).map_err(|_| "a malformed value of an attribute")?;
                self.xattrs.push((name, value));
            }
            _ if key.starts_with(XATTR) => self.xattrs.push((key[XATTR.len()..].to_vec(), value.to_vec())),
            _ if key.starts_with(b"GNU.sparse.") => self.sparse.apply(&key[b"GNU.sparse.".len()..], value)?,
            _ => {}
        }
        Ok(())
    }
}

impl PaxRecords {
    fn acl(&mut self, name: &[u8], text: &[u8]) {
        self.xattrs.extend(acl::from_text(text).map(|value| (name.to_vec(), value)));
    }

    /// What a global header says holds unless the entry's own says otherwise. Names and sizes of all entries at once
    /// make no sense and are not taken.
    pub(super) fn or_global(mut self, global: &Self) -> Self {
        self.uid = self.uid.or(global.uid);
        self.gid = self.gid.or(global.gid);
        self.mtime = self.mtime.or(global.mtime);
        let own = std::mem::take(&mut self.xattrs);
        self.xattrs = global.xattrs.iter().cloned().chain(own).collect();
        self
    }

    /// A further global header.
    pub(super) fn add_global(&mut self, newer: Self) {
        *self = newer.or_global(self);
        // However many headers there are, they say no more than one can.
        let said: usize = self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        if said > super::MAX_EXTENSION as usize {
            self.xattrs.clear();
        }
    }
}

impl SparseKeys {
    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        const BAD: &str = "a malformed sparse record";
        self.seen = true;
        match key {
            b"major" => self.version.0 = decimal(value).ok_or(BAD)?,
            b"minor" => self.version.1 = decimal(value).ok_or(BAD)?,
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.real_size = Some(decimal(value).ok_or(BAD)?),
            b"offset" | b"numbytes" => self.pairs.push(decimal(value).ok_or(BAD)?),
            b"map" if !value.is_empty() => {
                self.pairs =
                    value.split(|byte| *byte == b',').map(decimal).collect::<Option<_>>().ok_or(BAD)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// The first record's key and value, and what follows it.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let record = bytes.get(space + 1..length)?;
    let record = record.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let key = &record[..equals];
    (!key.is_empty()).then_some((key, &record[equals + 1..], &bytes[length..]))
}

fn url_decoded(text: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'%' {
            decoded.push(*byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        decoded.push((digit(digits[0])? << 4 | digit(digits[1])?) as u8);
        rest = after;
    }
    Some(decoded)
}

fn optional<T>(
    value: &[u8],
    parse: impl Fn(&[u8]) -> Option<T>,
    reason: &'static str,
) -> Result<Option<T>, &'static str> {
    if value.is_empty() { Ok(None) } else { parse(value).map(Some).ok_or(reason) }
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

fn decimal_u32(digits: &[u8]) -> Option<u32> {
    decimal(digits).and_then(|value| u32::try_from(value).ok())
}

/// Decimal seconds with an optional sign and fraction; digits below nanoseconds are cut off.
fn timestamp(text: &[u8]) -> Option<Mtime> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or(b"");
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanoseconds = (0..9)
        .fold(0, |value, place| value * 10 + u32::from(fraction.get(place).map_or(0, |digit| digit - b'0')));
    Some(match (negative, nanoseconds) {
        (false, _) => Mtime { seconds, nanoseconds },
        (true, 0) => Mtime { seconds: -seconds, nanoseconds: 0 },
        (true, _) => Mtime { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_parsed_with_binary_values() {
        let records =
            PaxRecords::parse(b"12 path=a/b\n28 SCHILY.xattr.user.x=\x00\n=\xff\n13 size=1234\n6 z=1\n");
        let records = records.unwrap();
        assert_eq!(records.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(records.xattrs, [(b"user.x".to_vec(), b"\x00\n=\xff".to_vec())]);
        assert_eq!(records.size, Some(1234));
    }

    #[test]
    fn attributes_come_in_libarchives_form_and_lists_as_text() {
        let record = |text: &str| {
            let length =
                (1..).find(|length| length.to_string().len() + 1 + text.len() + 1 == *length).unwrap();
            format!("{length} {text}\n")
        };
        let text = record("LIBARCHIVE.xattr.user.a%20b%3D=AP8")
            + &record("SCHILY.acl.default=user::rwx,user:7:r-x,group::r-x,mask::rwx,other::---");
        let records = PaxRecords::parse(text.as_bytes()).unwrap();
        assert_eq!(records.xattrs[0], (b"user.a b=".to_vec(), b"\x00\xff".to_vec()));
        assert_eq!(records.xattrs[1].0, b"system.posix_acl_default");
        for bad in ["LIBARCHIVE.xattr.user.%4=AA", "LIBARCHIVE.xattr.user.a=*"] {
            assert!(PaxRecords::parse(record(bad).as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"x"[..],
            b"5 a=b",
            b"99 path=a\n",
            b"0 a=b\n",
            b"2 a=b\n",
            b"6 =ab\n",
            b"6 abc\n",
            b"18446744073709551616 a=b\n",
            b"10 size=x\n",
            b"19 uid=4294967296\n",
        ] {
            assert!(PaxRecords::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn timestamps_have_nanoseconds_and_signs() {
        for (text, expected) in [
            ("1", Some((1, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.1234567899", Some((1, 123_456_789))),
            ("-1", Some((-1, 0))),
            ("-0.25", Some((-1, 750_000_000))),
            ("", None),
            (".5", None),
            ("1.x", None),
            ("99999999999999999999", None),
        ] {
            let parsed = timestamp(text.as_bytes()).map(|time| (time.seconds, time.nanoseconds));
            assert_eq!(parsed, expected, "{text}");
        }
    }
}
