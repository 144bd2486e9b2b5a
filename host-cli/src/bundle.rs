//! The guest inside the executable: kernel, initramfs and data disk template stand behind the program's own bytes.
//!
//! ```text
//! program │ pad │ kernel │ pad │ initramfs │ pad │ data disk │ pad │ index (JSON) │ trailer
//! trailer = index offset, u64 LE │ index length, u64 LE │ magic, 16 bytes
//! ```
//!
//! Parts begin at multiples of 4096, so that the VMM can map them. Offsets and lengths are checked against the file before
//! they are used, since a download may be cut short.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::files;

const MAGIC: &[u8; 16] = b"coracle-bundle-1";
const TRAILER_LEN: u64 = 32;
const ALIGNMENT: u64 = 4096;
const MAX_INDEX_LEN: u64 = 64 * 1024;

/// A part of the executable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    /// First byte; a multiple of 4096.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
}

/// Where the parts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Index {
    /// Length of the program itself.
    program: u64,
    /// The guest's kernel.
    pub(crate) kernel: Part,
    /// The guest's initramfs.
    pub(crate) initramfs: Part,
    /// The data disk's template, compressed.
    pub(crate) data: Part,
}

/// Reads the index of an executable; `None` if it carries no guest.
pub(crate) fn read(file: &File) -> Result<Option<Index>> {
    let length = file.metadata().context("cannot tell the executable's length")?.len();
    let Some(trailer_at) = length.checked_sub(TRAILER_LEN) else { return Ok(None) };
    let mut trailer = [0; TRAILER_LEN as usize];
    file.read_exact_at(&mut trailer, trailer_at).context("cannot read the executable")?;
    let (offset, rest) = trailer.split_at(8);
    let (index_len, magic) = rest.split_at(8);
    if magic != MAGIC {
        return Ok(None);
    }
    let offset = u64::from_le_bytes(offset.try_into()?);
    let index_len = u64::from_le_bytes(index_len.try_into()?);
    if index_len > MAX_INDEX_LEN || offset.checked_add(index_len) != Some(trailer_at) {
        bail!("the guest in the executable is damaged: its index is not where it should be");
    }
    let mut bytes = vec![0; usize::try_from(index_len)?];
    file.read_exact_at(&mut bytes, offset).context("cannot read the executable")?;
    let index: Index = serde_json::from_slice(&bytes).context("the guest in the executable is damaged")?;
    index.check(offset)?;
    Ok(Some(index))
}

impl Index {
    fn check(&self, end: u64) -> Result<()> {
        let mut from = self.program;
        for part in [self.kernel, self.initramfs, self.data] {
            let after = part.offset.checked_add(part.len).filter(|after| *after <= end);
            let (true, Some(after)) =
                (part.offset >= from && part.offset % ALIGNMENT == 0 && part.len > 0, after)
            else {
                bail!("the guest in the executable is damaged: a part is not where it should be");
            };
            from = after;
        }
        Ok(())
    }
}

/// Writes an executable at `output` that is `base` with a guest inside. A guest that is in `base` already is left out.
pub(crate) fn write(base: &File, parts: [&Path; 3], output: &Path) -> Result<()> {
    let temporary = files::temporary(output);
    let cannot = || format!("cannot write {}", output.display());
    let written = write_parts(base, parts, &temporary).and_then(|()| {
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755)).with_context(cannot)?;
        files::commit(&temporary, output).with_context(cannot)
    });
    written.inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

fn write_parts(base: &File, parts: [&Path; 3], temporary: &Path) -> Result<()> {
    let program = match read(base)? {
        Some(index) => index.program,
        None => base.metadata().context("cannot tell the executable's length")?.len(),
    };
    let mut source = base;
    source.seek(SeekFrom::Start(0)).context("cannot read the executable")?;
    let mut out = files::create(temporary).with_context(|| format!("cannot make {}", temporary.display()))?;
    if io::copy(&mut source.take(program), &mut out).context("cannot copy the executable")? != program {
        bail!("the executable became shorter while it was copied");
    }
    let [kernel, initramfs, data] = parts;
    let index = Index {
        program,
        kernel: append(&mut out, kernel)?,
        initramfs: append(&mut out, initramfs)?,
        data: append(&mut out, data)?,
    };
    let offset = out.stream_position().context("cannot write the index")?;
    let bytes = serde_json::to_vec(&index).context("cannot write the index")?;
    let mut trailer = bytes.clone();
    trailer.extend(offset.to_le_bytes());
    trailer.extend((bytes.len() as u64).to_le_bytes());
    trailer.extend(MAGIC);
    out.write_all(&trailer).context("cannot write the index")?;
    out.sync_all().context("cannot write the executable")
}

fn append(out: &mut File, path: &Path) -> Result<Part> {
    let cannot = || format!("cannot put {} into the executable", path.display());
    let end = out.stream_position().with_context(cannot)?;
    let offset = end.next_multiple_of(ALIGNMENT);
    out.seek(SeekFrom::Start(offset)).with_context(cannot)?;
    let mut part = File::open(path).with_context(cannot)?;
    let len = io::copy(&mut part, out).with_context(cannot)?;
    if len == 0 {
        bail!("cannot put {} into the executable: it is empty", path.display());
    }
    Ok(Part { offset, len })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        folder: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (name, length) in [("base", 5000), ("kernel", 4096), ("initramfs", 1), ("data", 9000)] {
                fs::write(folder.path().join(name), name.bytes().cycle().take(length).collect::<Vec<u8>>())
                    .unwrap();
            }
            Self { folder }
        }

        fn bundle(&self, base: &str, output: &str) -> File {
            let path = |name: &str| self.folder.path().join(name);
            let parts = [path("kernel"), path("initramfs"), path("data")];
            write(
                &File::open(path(base)).unwrap(),
                parts.each_ref().map(|part| part.as_path()),
                &path(output),
            )
            .unwrap();
            File::options().read(true).write(true).open(path(output)).unwrap()
        }
    }

    fn part(file: &File, part: Part) -> Vec<u8> {
        let mut bytes = vec![0; part.len as usize];
        file.read_exact_at(&mut bytes, part.offset).unwrap();
        bytes
    }

    #[test]
    fn what_was_put_in_comes_out() {
        let fixture = Fixture::new();
        let file = fixture.bundle("base", "out");
        let index = read(&file).unwrap().unwrap();
        for (found, name) in [(index.kernel, "kernel"), (index.initramfs, "initramfs"), (index.data, "data")]
        {
            assert_eq!(found.offset % ALIGNMENT, 0);
            assert_eq!(part(&file, found), fs::read(fixture.folder.path().join(name)).unwrap());
        }
        assert_eq!(
            part(&file, Part { offset: 0, len: 5000 }),
            fs::read(fixture.folder.path().join("base")).unwrap()
        );
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[test]
    fn a_second_guest_takes_the_place_of_the_first() {
        let fixture = Fixture::new();
        let first = fixture.bundle("base", "out");
        let second = fixture.bundle("out", "again");
        assert_eq!(first.metadata().unwrap().len(), second.metadata().unwrap().len());
    }

    #[test]
    fn a_program_without_a_guest_is_just_that() {
        let fixture = Fixture::new();
        assert_eq!(read(&File::open(fixture.folder.path().join("base")).unwrap()).unwrap(), None);
        assert_eq!(read(&File::open(fixture.folder.path().join("initramfs")).unwrap()).unwrap(), None);
    }

    #[test]
    fn a_damaged_bundle_is_refused() {
        let fixture = Fixture::new();
        let file = fixture.bundle("base", "out");
        let length = file.metadata().unwrap().len();
        let index = read(&file).unwrap().unwrap();
        for damaged in [
            Index { kernel: Part { offset: index.kernel.offset + 1, ..index.kernel }, ..index },
            Index { data: Part { len: u64::MAX, ..index.data }, ..index },
            Index { initramfs: Part { offset: 0, len: 1 }, ..index },
            Index { kernel: Part { len: 0, ..index.kernel }, ..index },
        ] {
            assert!(damaged.check(length).is_err(), "{damaged:?}");
        }
        file.write_all_at(&u64::MAX.to_le_bytes(), length - TRAILER_LEN).unwrap();
        assert!(read(&file).is_err());
    }
}
