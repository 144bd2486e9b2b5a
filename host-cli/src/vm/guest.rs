//! The guest's kernel, initramfs and data disk template: from the folder that `CORACLE_GUEST_DIR` names, or from the
//! executable itself. Both are the person's own and trusted; lengths are checked all the same.

use std::{fs::File, io::Read, os::unix::fs::FileExt, path::Path};

use anyhow::{Context, Result, bail};
use coracle_vmm::control::FileRegion;

use crate::bundle;

/// An open artifact of the guest.
#[derive(Debug)]
pub(crate) struct Artifact {
    /// The file that it is in.
    pub(crate) file: File,
    /// Where in the file.
    pub(crate) region: FileRegion,
}

/// Everything that a guest is made of.
#[derive(Debug)]
pub(crate) struct Guest {
    /// An uncompressed vmlinux.
    pub(crate) kernel: Artifact,
    /// An uncompressed cpio archive.
    pub(crate) initramfs: Artifact,
    /// A small ext4 image, compressed with zstd.
    pub(crate) data: Artifact,
}

impl Guest {
    /// Finds the guest and opens it.
    pub(crate) fn open() -> Result<Self> {
        match std::env::var_os("CORACLE_GUEST_DIR").filter(|folder| !folder.is_empty()) {
            Some(folder) => Self::from_folder(Path::new(&folder)),
            None => Self::from_executable(),
        }
    }

    fn from_folder(folder: &Path) -> Result<Self> {
        let open = |name: &str| {
            let path = folder.join(name);
            let cannot =
                || format!("cannot open the guest's {name} in CORACLE_GUEST_DIR ({})", folder.display());
            let file = File::open(&path).with_context(cannot)?;
            let len = file.metadata().with_context(cannot)?.len();
            Ok::<_, anyhow::Error>(Artifact { file, region: FileRegion { offset: 0, len } })
        };
        Ok(Self {
            kernel: open("vmlinux")?,
            initramfs: open("initramfs.cpio")?,
            data: open("data.ext4.zst")?,
        })
    }

    fn from_executable() -> Result<Self> {
        let file = File::open("/proc/self/exe").context("cannot open coracle's own file")?;
        let Some(index) = bundle::read(&file)? else {
            bail!(
                "this coracle carries no guest (kernel and initramfs): it was built without `cargo xtask dist`, and \
                 CORACLE_GUEST_DIR names no folder that has one"
            );
        };
        let part = |part: bundle::Part| {
            let file = file.try_clone().context("cannot open coracle's own file")?;
            Ok::<_, anyhow::Error>(Artifact {
                file,
                region: FileRegion { offset: part.offset, len: part.len },
            })
        };
        Ok(Self { kernel: part(index.kernel)?, initramfs: part(index.initramfs)?, data: part(index.data)? })
    }
}

impl Artifact {
    /// The artifact's bytes from the first to the last.
    pub(crate) fn reader(&self) -> impl Read + '_ {
        RegionReader { file: &self.file, at: self.region.offset, left: self.region.len }
    }
}

struct RegionReader<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for RegionReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}
