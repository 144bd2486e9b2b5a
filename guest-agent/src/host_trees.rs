//! Trees of the host that containers may use: entries in the root of one file system that the host exports. It is mounted when the first
//! container needs it, where no container can reach it; what a container gets is a bind mount of one entry. Which entries there are, and
//! what lies beneath them, is the host's to decide. Everything here blocks and is called off the event loop.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use coracle_agent_api::{ApiError, BindMount, ErrorKind, HOST_TAG, TreeSource};
use rustix::mount::MountAttrFlags;

use crate::error::{AtStep, Result};
use crate::{child, mounts};

/// The file system that the host exports.
pub(crate) struct HostTrees {
    /// Where it is mounted; none where there is no host.
    directory: Option<PathBuf>,
    mounted: Mutex<bool>,
}

impl HostTrees {
    /// To be mounted at `directory`.
    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        Self { directory, mounted: Mutex::default() }
    }

    /// Where the trees are in the agent's mount namespace, in the order of the mounts; `engine` is the socket of the daemon's API.
    pub(crate) fn locate(&self, binds: &[BindMount], engine: Option<&Path>) -> Result<Vec<String>> {
        let locate = |bind: &BindMount| match &bind.source {
            TreeSource::Path { path } => Ok(path.clone()),
            TreeSource::Engine => match engine {
                Some(socket) => Ok(socket.to_string_lossy().into_owned()),
                None => Err(ApiError::new(ErrorKind::Internal, "the engine's socket was not made")),
            },
            TreeSource::Shared { name } => {
                let entry = self.root()?.join(name.as_str());
                Ok(entry.to_string_lossy().into_owned())
            }
        };
        binds.iter().map(locate).collect()
    }

    /// The mounted file system.
    fn root(&self) -> Result<&Path> {
        let Some(directory) = &self.directory else {
            return Err(ApiError::new(ErrorKind::Unsupported, "there is no host that could share its files"));
        };
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if !*mounted {
            mount(directory).at_kind(ErrorKind::Internal, "mount the file system that the host exports")?;
            *mounted = true;
        }
        Ok(directory)
    }
}

fn mount(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    // Its own mounts give a container what it needs of these.
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let made = mounts::new("virtiofs", &[("source", HOST_TAG)], attributes)?;
    mounts::attach(made, child::open_directory(directory)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(source: TreeSource) -> BindMount {
        BindMount { source, path: "/x".to_owned(), readonly: false }
    }

    #[test]
    fn without_a_host_only_own_paths_are_found() {
        let trees = HostTrees::new(None);
        let own = bind(TreeSource::Path { path: "/own".to_owned() });
        assert_eq!(trees.locate(&[own], None).unwrap(), ["/own"]);
        let shared = bind(TreeSource::Shared { name: "entry".parse().unwrap() });
        assert_eq!(trees.locate(&[shared], None).unwrap_err().kind, ErrorKind::Unsupported);
    }
}
