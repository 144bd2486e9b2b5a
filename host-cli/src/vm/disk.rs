//! The data disk: a sparse file that begins as a small formatted template and is grown by the guest.
//!
//! It appears whole or not at all. Whoever opens it holds a lock that goes with the descriptor to the VMM, so that two
//! machines can never write to one disk, whatever happened to the daemon in between.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::guest::Artifact;
use crate::{files, units::human_binary_size};

const BLOCK: usize = 64 * 1024;
/// What a template may decompress to, at most.
const MAX_TEMPLATE: u64 = 4 << 30;

/// Opens the disk, making it from the template if it is not there and enlarging it to `size`; waits until no other machine
/// has it.
pub(crate) fn open(path: &Path, template: &Artifact, size: u64) -> Result<File> {
    let cannot = || format!("cannot open the data disk {}", path.display());
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(path, template, size)
            .with_context(|| format!("cannot make the data disk {}", path.display()))?,
        Err(error) => return Err(error).with_context(cannot),
    };
    flock(&file, FlockOperation::LockExclusive)
        .with_context(|| format!("cannot lock the data disk {}", path.display()))?;
    let length = file.metadata().with_context(cannot)?.len();
    if length < size {
        file.set_len(size)
            .with_context(|| format!("cannot enlarge the data disk to {}", human_binary_size(size)))?;
    }
    Ok(file)
}

/// The disk's size, if there is one.
pub(crate) fn size(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.len())
}

fn create(path: &Path, template: &Artifact, size: u64) -> Result<File> {
    let temporary = files::temporary(path);
    let made = fill(&temporary, template, size).and_then(|file| {
        files::commit(&temporary, path)?;
        Ok(file)
    });
    made.inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

fn fill(temporary: &Path, template: &Artifact, size: u64) -> Result<File> {
    let file = files::create(temporary)?;
    let decoder = zstd::stream::read::Decoder::new(template.reader()).context("the template is damaged")?;
    let mut decoder = decoder.take(MAX_TEMPLATE);
    let (mut block, zeros) = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut at = 0;
    loop {
        let length = read_block(&mut decoder, &mut block).context("the template is damaged")?;
        let part = &block[..length];
        if part != &zeros[..length] {
            file.write_all_at(part, at)?;
        }
        at += length as u64;
        if length < BLOCK {
            break;
        }
    }
    if at == 0 || at >= MAX_TEMPLATE {
        bail!("the template is damaged: it has {at} bytes");
    }
    file.set_len(size.max(at))?;
    file.sync_all()?;
    Ok(file)
}

/// Fills the block as far as there are bytes.
fn read_block(reader: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match reader.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use coracle_vmm::control::FileRegion;

    use super::*;

    fn template(folder: &Path, contents: &[u8]) -> Artifact {
        let path = folder.join("template");
        fs::write(&path, zstd::encode_all(contents, 1).unwrap()).unwrap();
        let file = File::open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        Artifact { file, region: FileRegion { offset: 0, len } }
    }

    #[test]
    fn a_new_disk_is_the_template_and_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let mut contents = vec![0; 3 * BLOCK + 10];
        contents[BLOCK + 5] = 7;
        contents[3 * BLOCK + 9] = 8;
        let path = folder.path().join("data.img");
        let file = open(&path, &template(folder.path(), &contents), 1 << 30).unwrap();
        let mut found = vec![1; contents.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == contents);
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 1 << 30);
        assert!(metadata.blocks() * 512 < 1 << 20);
        assert!(!files::temporary(&path).exists());
    }

    #[test]
    fn a_disk_keeps_its_contents_and_only_grows() {
        let folder = tempfile::tempdir().unwrap();
        let template = template(folder.path(), b"fresh");
        let path = folder.path().join("data.img");
        open(&path, &template, 1 << 20).unwrap().write_all_at(b"used!", 0).unwrap();
        let file = open(&path, &template, 1 << 21).unwrap();
        let mut found = [0; 5];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!((&found, file.metadata().unwrap().len()), (b"used!", 1 << 21));
        drop(file);
        assert_eq!(open(&path, &template, 1 << 20).unwrap().metadata().unwrap().len(), 1 << 21);
    }

    #[test]
    fn a_damaged_template_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let mut damaged = template(folder.path(), &[9; 100_000]);
        damaged.region.len -= 4;
        let path = folder.path().join("data.img");
        assert!(open(&path, &damaged, 1 << 20).is_err());
        assert!(!path.exists() && !files::temporary(&path).exists());
    }
}
