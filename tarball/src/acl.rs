//! Access control lists as GNU tar writes them (`SCHILY.acl.*`): text, which becomes the value of the extended attribute
//! in which Linux keeps them. Who has an entry must be a number, as names mean nothing outside the machine that
//! wrote them.

/// The attribute's version.
const VERSION: u32 = 2;
const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;
/// More entries do not fit into an attribute.
const MAX_ENTRIES: usize = 8000;

/// The attribute's value; `None` if the text is malformed, names someone by name only, or says no more than a mode does.
pub(super) fn from_text(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    let lines = text.split([',', '\n']).map(|line| line.split('#').next().unwrap_or_default().trim());
    let mut entries = Vec::new();
    for line in lines.filter(|line| !line.is_empty()) {
        entries.push(entry(line)?);
        if entries.len() > MAX_ENTRIES {
            return None;
        }
    }
    entries.sort_unstable();
    let count = |tag| entries.iter().filter(|(found, ..)| *found == tag).count();
    let is_complete = [USER_OBJ, GROUP_OBJ, OTHER].into_iter().all(|tag| count(tag) == 1);
    let has_more = entries.len() > 3;
    let is_unique = entries.windows(2).all(|pair| (pair[0].0, pair[0].1) != (pair[1].0, pair[1].1));
    if !is_complete || !has_more || !is_unique || (count(USER) + count(GROUP) > 0 && count(MASK) != 1) {
        return None;
    }
    let mut value = VERSION.to_le_bytes().to_vec();
    for (tag, id, permissions) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    Some(value)
}

/// `user:1000:r-x`, `user:lisa:r-x:1000`, `mask::rwx`: tag, id, permissions.
fn entry(line: &str) -> Option<(u16, u32, u16)> {
    let parts: Vec<&str> = line.split(':').collect();
    let (kind, who, permissions) = match *parts.as_slice() {
        // Solaris leaves the empty field away.
        [kind @ ("mask" | "m" | "other" | "o"), permissions] => (kind, "", permissions),
        [kind, who, permissions] => (kind, who, permissions),
        [kind, _, permissions, id] => (kind, id, permissions),
        _ => return None,
    };
    let tag = match (kind, who.is_empty()) {
        ("user" | "u", true) => USER_OBJ,
        ("user" | "u", false) => USER,
        ("group" | "g", true) => GROUP_OBJ,
        ("group" | "g", false) => GROUP,
        ("mask" | "m", true) => MASK,
        ("other" | "o", true) => OTHER,
        _ => return None,
    };
    let id = if who.is_empty() { u32::MAX } else { who.parse().ok()? };
    let mut bits = 0;
    for c in permissions.chars() {
        bits |= match c {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    Some((tag, id, bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_what_linux_keeps() {
        let value =
            from_text(b"user::rwx,user:lisa:r--:1000\ngroup::r-x,mask::rwx,other::--x # all").unwrap();
        let expected = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x07\0\xff\xff\xff\xff\x20\0\x01\0\xff\xff\xff\xff";
        assert_eq!(value, expected);
    }

    #[test]
    fn what_is_malformed_or_says_nothing_is_left_away() {
        for text in [
            "",
            "user::rwx,group::r-x,other::r-x",
            "user::rwx,user:lisa:r--,group::r-x,mask::rwx,other::r-x",
            "user::rwx,user:1:r--,group::r-x,other::r-x",
            "user::rwx,user:1:r--,user:1:rw-,group::r-x,mask::rwx,other::r-x",
            "user::rwz,user:1:r--,group::r-x,mask::rwx,other::r-x",
            "user:1:r--",
            "what::rwx",
            ":::::",
        ] {
            assert_eq!(from_text(text.as_bytes()), None, "{text}");
        }
    }
}
