//! Extended attributes as EROFS stores them after an inode: a 12-byte header, then entries with a numbered prefix,
//! each padded to 4 bytes, sorted so that equal sets give equal bytes.

use super::format::{MAX_NAME, MAX_XATTR_BYTES, XATTR_ENTRY, XATTR_HEADER, XATTR_PREFIXES};

/// A set of attributes, encoded.
pub(super) type Encoded = Box<[u8]>;

/// An attribute by the number of its prefix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Xattr {
    index: u8,
    suffix: Vec<u8>,
    value: Vec<u8>,
}

/// Overlay's own attributes: a layer must not bring them along, because they decide what overlay shows.
pub(super) const OVERLAY: &[u8] = b"trusted.overlay.";

/// From a full name. `Ok(None)` for a name space which Linux's file systems do not store (Docker skips these too).
pub(super) fn from_name(name: &[u8], value: Vec<u8>) -> Result<Option<Xattr>, &'static str> {
    if name.starts_with(OVERLAY) {
        return Ok(None);
    }
    let Some((index, prefix)) = XATTR_PREFIXES.iter().find(|(_, prefix)| name.starts_with(prefix)) else {
        return Ok(None);
    };
    let suffix = &name[prefix.len()..];
    let is_whole_name = !prefix.ends_with(b".");
    if is_whole_name != suffix.is_empty() || suffix.contains(&0) {
        return Err("an extended attribute with a malformed name");
    }
    if name.len() > MAX_NAME {
        return Err("the name of an extended attribute is longer than 255 bytes");
    }
    if value.len() > usize::from(u16::MAX) {
        return Err("the value of an extended attribute is longer than 65535 bytes");
    }
    Ok(Some(Xattr { index: *index, suffix: suffix.to_vec(), value }))
}

/// One of overlay's marks, which only we set.
pub(super) fn overlay_mark(name: &str, value: &[u8]) -> Xattr {
    Xattr { index: 4, suffix: format!("overlay.{name}").into_bytes(), value: value.to_vec() }
}

/// Sorts, keeps the last of equal names, and encodes. Empty for no attributes.
pub(super) fn encode(mut attributes: Vec<Xattr>) -> Result<Encoded, &'static str> {
    if attributes.is_empty() {
        return Ok(Box::default());
    }
    attributes.reverse();
    attributes.sort_by(|a, b| (a.index, &a.suffix).cmp(&(b.index, &b.suffix)));
    attributes.dedup_by(|a, b| (a.index, &a.suffix) == (b.index, &b.suffix));
    let mut bytes = vec![0; XATTR_HEADER];
    for attribute in &attributes {
        push_entry(&mut bytes, attribute);
    }
    if bytes.len() > MAX_XATTR_BYTES {
        return Err("its extended attributes do not fit into an inode");
    }
    Ok(bytes.into_boxed_slice())
}

/// Adds marks to an encoded set that has none of that name.
pub(super) fn append(encoded: &mut Encoded, marks: &[Xattr]) -> Result<(), &'static str> {
    let mut bytes = std::mem::take(encoded).into_vec();
    bytes.resize(bytes.len().max(XATTR_HEADER), 0);
    for mark in marks {
        push_entry(&mut bytes, mark);
    }
    if bytes.len() > MAX_XATTR_BYTES {
        return Err("its extended attributes do not fit into an inode");
    }
    *encoded = bytes.into_boxed_slice();
    Ok(())
}

/// Lengths were checked when the attribute was made.
fn push_entry(bytes: &mut Vec<u8>, attribute: &Xattr) {
    bytes.push(attribute.suffix.len() as u8);
    bytes.push(attribute.index);
    bytes.extend((attribute.value.len() as u16).to_le_bytes());
    bytes.extend(&attribute.suffix);
    bytes.extend(&attribute.value);
    bytes.resize(bytes.len().next_multiple_of(XATTR_ENTRY), 0);
}
