//! Directory data: blocks of 12-byte entries followed by their names, sorted by name as unsigned bytes, `.` and `..`
//! in their sorted places, so that the kernel finds a name by binary search.

use super::format::{BLOCK, DIRENT};

/// One entry.
pub(super) struct Dirent<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// The size of a directory with these sorted names; whole blocks, and what the last one uses.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut full = 0;
    let mut used = 0;
    for name in names {
        let needed = (DIRENT + name.len()) as u64;
        if used + needed > BLOCK {
            full += BLOCK;
            used = 0;
        }
        used += needed;
    }
    full + used
}

/// The data for sorted entries, as long as [`size`] says.
pub(super) fn encode(entries: &[Dirent<'_>]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fitting = rest
            .iter()
            .take_while(|entry| {
                used += DIRENT + entry.name.len();
                used <= BLOCK as usize
            })
            .count();
        let (block, following) = rest.split_at(fitting);
        encode_block(&mut data, block);
        rest = following;
        if !rest.is_empty() {
            data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
        }
    }
    data
}

fn encode_block(data: &mut Vec<u8>, entries: &[Dirent<'_>]) {
    let mut name_offset = entries.len() * DIRENT;
    for entry in entries {
        data.extend(entry.nid.to_le_bytes());
        data.extend((name_offset as u16).to_le_bytes());
        data.extend([entry.file_type, 0]);
        name_offset += entry.name.len();
    }
    entries.iter().for_each(|entry| data.extend(entry.name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_what_encoding_gives() {
        for count in [1usize, 2, 10, 15, 16, 17, 300, 5000] {
            let names: Vec<_> = (0..count).map(|n| format!("{n:0width$}", width = 1 + n % 255)).collect();
            let entries: Vec<_> =
                names.iter().map(|name| Dirent { name: name.as_bytes(), nid: 7, file_type: 1 }).collect();
            assert_eq!(
                encode(&entries).len() as u64,
                size(names.iter().map(|name| name.as_bytes())),
                "{count}"
            );
        }
    }
}
