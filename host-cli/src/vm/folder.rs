//! A machine's folder on the host: its control socket, its disk, its logs, and what one daemon leaves for the next.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use coracle_agent_api::Hello;
use coracle_engine::sandbox::BootPhase;
use coracle_vmm::control;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::layers::Layers;
use crate::{files, paths::private_dir};

/// The VMM's control socket.
const CONTROL: &str = "control.sock";
/// The file server's.
const FILES_CONTROL: &str = "fsd.sock";

/// `vms/<name>/`.
#[derive(Debug, Clone)]
pub(crate) struct Folder(PathBuf);

/// How a machine came up: kept for a daemon that takes it over.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct BootRecord {
    /// The VMM's process id.
    pub(crate) pid: u32,
    /// The file server's.
    #[serde(default)]
    pub(crate) file_server_pid: Option<u32>,
    /// When the start was asked for, in microseconds of CLOCK_MONOTONIC.
    pub(crate) started_micros: u64,
    /// The agent's first words, once it has said them.
    pub(crate) hello: Option<Hello>,
    /// What happened when, in microseconds since then.
    pub(crate) boot: Vec<(String, u64)>,
}

impl BootRecord {
    /// The moments as the engine wants them.
    pub(crate) fn phases(&self) -> Vec<BootPhase> {
        self.boot.iter().map(|(name, micros)| BootPhase { name: name.clone(), micros: *micros }).collect()
    }
}

impl Folder {
    /// The folder of this path; it need not exist yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Makes it, for its owner only.
    pub(crate) fn create(&self) -> Result<()> {
        private_dir(&self.0).with_context(|| format!("cannot make the machine's folder {}", self.0.display()))
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The data disk.
    pub(crate) fn data_disk(&self) -> PathBuf {
        self.0.join("data.img")
    }

    /// What the VMM says.
    pub(crate) fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// What the file server says.
    pub(crate) fn file_server_log(&self) -> PathBuf {
        self.0.join("fsd.log")
    }

    /// What the guest's kernel says on its serial port, where one was asked for.
    pub(crate) fn serial_log(&self) -> PathBuf {
        self.0.join("serial.log")
    }

    /// Opens a log anew; the last machine's is kept under another name.
    pub(crate) fn open_log(&self, path: &Path) -> Result<fs::File> {
        let cannot = || format!("cannot open the log {}", path.display());
        let old = path.with_extension("log.old");
        match fs::rename(path, old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(cannot),
            _ => {}
        }
        files::create(path).with_context(cannot)
    }

    /// Binds the VMM's control socket; one that an ended machine left behind goes.
    pub(crate) fn listen(&self) -> Result<OwnedFd> {
        self.listen_at(CONTROL)
    }

    /// The same for the file server's.
    pub(crate) fn listen_for_files(&self) -> Result<OwnedFd> {
        self.listen_at(FILES_CONTROL)
    }

    fn listen_at(&self, name: &str) -> Result<OwnedFd> {
        let cannot = || format!("cannot make the socket {name} in {}", self.0.display());
        match fs::remove_file(self.0.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(cannot),
            _ => {}
        }
        let folder = self.open().with_context(cannot)?;
        control::listen(&short_path(&folder, name)).with_context(cannot)
    }

    /// Connects to the VMM's control socket; `None` if no machine is behind it.
    pub(crate) fn connect(&self) -> Result<Option<OwnedFd>> {
        self.connect_at(CONTROL)
    }

    /// The same for the file server's.
    pub(crate) fn connect_to_files(&self) -> Result<Option<OwnedFd>> {
        self.connect_at(FILES_CONTROL)
    }

    fn connect_at(&self, name: &str) -> Result<Option<OwnedFd>> {
        let cannot = || format!("cannot connect to the socket {name} in {}", self.0.display());
        let folder = match self.open() {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(cannot),
        };
        match control::connect(&short_path(&folder, name)) {
            Ok(socket) => Ok(Some(socket)),
            Err(control::SocketError::System { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).with_context(cannot),
        }
    }

    /// Keeps how the machine came up.
    pub(crate) fn save_boot(&self, record: &BootRecord) -> Result<()> {
        let bytes = serde_json::to_vec(record).context("cannot write the boot record as JSON")?;
        files::replace_unsynced(&self.boot_record(), &bytes).context("cannot write the boot record")
    }

    /// How the running machine came up, if that was kept.
    pub(crate) fn load_boot(&self) -> Option<BootRecord> {
        serde_json::from_slice(&fs::read(self.boot_record()).ok()?).ok()
    }

    /// Removes what belonged to a machine that has ended. Disk and logs stay.
    pub(crate) fn forget_machine(&self) {
        let sockets = [CONTROL, FILES_CONTROL].map(|name| self.0.join(name));
        for path in sockets.into_iter().chain([self.boot_record(), Layers::record_in(&self.0)]) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove what an ended machine left");
                }
                _ => {}
            }
        }
    }

    fn boot_record(&self) -> PathBuf {
        self.0.join("boot.json")
    }

    fn open(&self) -> io::Result<OwnedFd> {
        Ok(rustix::fs::open(&self.0, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

/// A socket by a path that fits into a socket's address, however long the folder's own is.
fn short_path(folder: &OwnedFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_socket_works_in_a_folder_with_a_long_path() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(root.path().join("x".repeat(200)));
        assert!(folder.connect().unwrap().is_none());
        folder.create().unwrap();
        assert!(folder.connect().unwrap().is_none());
        let listener = folder.listen().unwrap();
        assert!(folder.connect().unwrap().is_some());
        drop(listener);
        assert!(folder.connect().unwrap().is_none());
        folder.listen().unwrap();
    }

    #[test]
    fn the_last_machines_log_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(root.path().to_owned());
        fs::write(folder.vmm_log(), "old").unwrap();
        folder.open_log(&folder.vmm_log()).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("vmm.log.old")).unwrap(), "old");
    }
}
