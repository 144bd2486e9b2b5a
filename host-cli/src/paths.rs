//! Where things are on the host: `CORACLE_HOME`, the API socket, and what is kept for each VM.
//!
//! The paths come from the person's own environment and are trusted. Directories are made for the person alone.

use std::{
    env, fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// The longest path that fits into a unix socket's address.
const MAX_SOCKET_PATH: usize = 107;

/// The state directory and the API socket that belongs to it.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    root: PathBuf,
    socket: PathBuf,
}

impl Home {
    /// From `CORACLE_HOME`, `XDG_DATA_HOME`, `XDG_RUNTIME_DIR` and `HOME`.
    pub(crate) fn from_env() -> Result<Self> {
        Self::resolve(|name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
    }

    fn resolve(var: impl Fn(&str) -> Option<PathBuf>) -> Result<Self> {
        let named = var("CORACLE_HOME");
        let root = match (&named, var("XDG_DATA_HOME"), var("HOME")) {
            (Some(home), ..) => std::path::absolute(home).context("cannot tell where CORACLE_HOME is")?,
            (None, Some(data), _) if data.is_absolute() => data.join("coracle"),
            (None, _, Some(home)) => home.join(".local/share/coracle"),
            _ => bail!(
                "neither CORACLE_HOME, XDG_DATA_HOME nor HOME is set: there is no place for coracle's state"
            ),
        };
        let runtime = var("XDG_RUNTIME_DIR").filter(|dir| dir.is_absolute() && dir.is_dir());
        let socket = match runtime {
            Some(runtime) if named.is_none() => runtime.join("coracle/docker.sock"),
            _ => root.join("run/docker.sock"),
        };
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            bail!(
                "the socket's path {} is longer than the {MAX_SOCKET_PATH} bytes that Linux allows: choose a shorter CORACLE_HOME",
                socket.display()
            );
        }
        Ok(Self { root, socket })
    }

    /// A home in a folder, for tests.
    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.to_owned(), socket: root.join("run/docker.sock") }
    }

    /// The state directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The API socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The socket as `DOCKER_HOST` wants it.
    pub(crate) fn docker_host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Held by the daemon for as long as it lives.
    pub(crate) fn daemon_lock(&self) -> PathBuf {
        self.root.join("daemon.lock")
    }

    /// Held by whoever is starting a daemon.
    pub(crate) fn start_lock(&self) -> PathBuf {
        self.root.join("start.lock")
    }

    /// What the daemon says when it has no terminal.
    pub(crate) fn daemon_log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// The VM's size, as chosen by `coracle up`.
    pub(crate) fn settings(&self) -> PathBuf {
        self.root.join("config.json")
    }

    /// The images.
    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// What is kept for each VM.
    pub(crate) fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// Makes the state directory and the socket's directory, for this user alone.
    pub(crate) fn create(&self) -> Result<()> {
        private_dir(&self.root)
            .with_context(|| format!("cannot make the state directory {}", self.root.display()))?;
        let run = self.socket.parent().context("the socket has no directory")?;
        private_dir(run).with_context(|| format!("cannot make the socket's directory {}", run.display()))
    }
}

/// Makes a directory that only its owner can enter, and makes an existing one so.
pub(crate) fn private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let metadata = fs::metadata(path)?;
    if metadata.permissions().mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(vars: &[(&str, &str)]) -> Result<Home> {
        Home::resolve(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value)))
    }

    #[test]
    fn a_named_home_keeps_its_socket_to_itself() {
        let home = home(&[("CORACLE_HOME", "/x"), ("XDG_RUNTIME_DIR", "/tmp"), ("HOME", "/root")]).unwrap();
        assert_eq!((home.root(), home.socket()), (Path::new("/x"), Path::new("/x/run/docker.sock")));
    }

    #[test]
    fn the_default_home_follows_xdg() {
        let with_runtime = home(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/tmp")]).unwrap();
        assert_eq!(with_runtime.socket(), Path::new("/tmp/coracle/docker.sock"));
        let without =
            home(&[("HOME", "/h"), ("XDG_DATA_HOME", "/d"), ("XDG_RUNTIME_DIR", "/no/such/dir")]).unwrap();
        assert_eq!(
            (without.root(), without.socket()),
            (Path::new("/d/coracle"), Path::new("/d/coracle/run/docker.sock"))
        );
        assert!(home(&[]).is_err());
    }

    #[test]
    fn a_socket_path_that_linux_refuses_is_refused_early() {
        assert!(home(&[("CORACLE_HOME", &format!("/{}", "x".repeat(100)))]).is_err());
    }
}
