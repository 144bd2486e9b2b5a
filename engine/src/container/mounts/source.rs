//! The host's side of a bind mount: what a client names is opened at each start, once, so that what is granted is what was looked at, whatever
//! happens to the path afterwards. Everything here blocks.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::PathBuf,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    io::Errno,
};

use super::shown;
use crate::{
    container::record::Bind,
    error::{Error, Result},
    sandbox::TreeKind,
};

/// Where clients look for Docker's socket. What is there is no matter: as a directory that is made for want of anything, it would be in the
/// way of a daemon later.
const DOCKER_SOCKETS: [&str; 2] = ["/var/run/docker.sock", "/run/docker.sock"];

/// What a bind mount mounts.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) kind: TreeKind,
    /// Opened with `O_PATH`.
    pub(crate) tree: OwnedFd,
}

/// Refuses what has a meaning of its own by its name, cleaned.
pub(super) fn check_name(path: &str) -> Result<()> {
    if DOCKER_SOCKETS.contains(&path) { Err(no_engine_socket(path)) } else { Ok(()) }
}

/// What can be said of a source before its container is started: that it is there, if it must be, and that it can be mounted.
pub(crate) fn check(bind: &Bind, engine_sockets: &[PathBuf]) -> Result<()> {
    match std::fs::metadata(&bind.source) {
        Ok(found) => {
            kind(bind, FileType::from_raw_mode(found.mode()), (found.dev(), found.ino()), engine_sockets)
                .map(drop)
        }
        Err(_) if bind.create => Ok(()),
        Err(error) => Err(not_there(bind, &error)),
    }
}

/// Opens a source; makes it, if that is asked for and there is nothing.
pub(crate) fn open(bind: &Bind, engine_sockets: &[PathBuf]) -> Result<Source> {
    let tree = match open_path(&bind.source) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && bind.create => {
            make(&bind.source)?;
            open_path(&bind.source)
        }
        opened => opened,
    };
    let tree = tree.map_err(|error| not_there(bind, &error))?;
    let found = fstat(&tree).map_err(|error| not_there(bind, &error.into()))?;
    let kind =
        kind(bind, FileType::from_raw_mode(found.st_mode), (found.st_dev, found.st_ino), engine_sockets)?;
    Ok(Source { kind, tree })
}

fn open_path(path: &str) -> io::Result<OwnedFd> {
    loop {
        match openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::INTR) => {}
            opened => return Ok(opened?),
        }
    }
}

fn make(path: &str) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(|error| {
        let path = shown(path);
        Error::internal(format!(
            "error while creating mount source path '{path}': mkdir {path}: {}",
            words(&error)
        ))
    })
}

/// What a file can be mounted as; `id` is its device and its inode.
fn kind(bind: &Bind, found: FileType, id: (u64, u64), engine_sockets: &[PathBuf]) -> Result<TreeKind> {
    let (what, instead) = match found {
        FileType::Directory => return Ok(TreeKind::Directory),
        FileType::RegularFile => return Ok(TreeKind::File),
        FileType::Socket => {
            let is_same = |socket: &PathBuf| {
                std::fs::metadata(socket).is_ok_and(|socket| (socket.dev(), socket.ino()) == id)
            };
            if engine_sockets.iter().any(is_same) {
                return Err(no_engine_socket(&bind.source));
            }
            ("a socket", "let the service listen on a TCP port, and reach it as host.docker.internal")
        }
        FileType::Fifo => ("a named pipe", "use a file, or the container's own standard input and output"),
        FileType::CharacterDevice | FileType::BlockDevice => {
            ("a device", "mount a file or a directory, or use a volume")
        }
        _ => ("neither a file nor a directory", "mount a file or a directory"),
    };
    Err(Error::unsupported(format!(
        "a bind mount of {} is not supported by Coracle: it is {what} of the host, which has no use in a container with a kernel of its own: {instead}",
        shown(&bind.source)
    )))
}

fn no_engine_socket(path: &str) -> Error {
    Error::unsupported(format!(
        "a bind mount of the engine's socket ({}) is not supported by Coracle yet: run what is to drive the engine on the host",
        shown(path)
    ))
}

fn not_there(bind: &Bind, error: &io::Error) -> Error {
    let path = shown(&bind.source);
    Error::invalid(match error.kind() {
        io::ErrorKind::NotFound => {
            format!("invalid mount config for type \"bind\": bind source path does not exist: {path}")
        }
        _ => format!("invalid mount config for type \"bind\": stat {path}: {}", words(error)),
    })
}

/// The system's words, as Go has them.
fn words(error: &io::Error) -> String {
    let text = error.to_string().to_lowercase();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
        path::Path,
    };

    use super::*;

    fn bind(source: &Path, create: bool) -> Bind {
        Bind {
            source: source.to_str().unwrap().to_owned(),
            path: "/x".to_owned(),
            readonly: false,
            create,
            mode: String::new(),
            propagation: "rprivate".to_owned(),
        }
    }

    #[test]
    fn links_are_followed_to_what_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, loose) =
            (dir.path().join("file"), dir.path().join("link"), dir.path().join("loose"));
        std::fs::write(&file, "").unwrap();
        symlink("file", &link).unwrap();
        symlink("nowhere", &loose).unwrap();
        let opened = open(&bind(&link, true), &[]).unwrap();
        assert_eq!(opened.kind, TreeKind::File);
        assert_eq!(fstat(&opened.tree).unwrap().st_ino, std::fs::metadata(&file).unwrap().ino());
        assert_eq!(open(&bind(dir.path(), false), &[]).unwrap().kind, TreeKind::Directory);
        assert_eq!(
            open(&bind(&loose, true), &[]).unwrap_err().status(),
            500,
            "what a link names is not made"
        );
    }

    #[test]
    fn what_is_missing_is_made_or_missed() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        let missed = open(&bind(&deep, false), &[]).unwrap_err();
        let words = format!(
            "invalid mount config for type \"bind\": bind source path does not exist: {}",
            deep.display()
        );
        assert_eq!((missed.status().as_u16(), missed.to_string()), (400, words.clone()));
        assert_eq!(check(&bind(&deep, false), &[]).unwrap_err().to_string(), words);
        check(&bind(&deep, true), &[]).unwrap();
        assert!(!deep.exists(), "a check makes nothing");
        assert_eq!(open(&bind(&deep, true), &[]).unwrap().kind, TreeKind::Directory);
        assert_eq!(std::fs::metadata(&deep).unwrap().permissions().mode() & 0o7022, 0);
        std::fs::write(dir.path().join("file"), "").unwrap();
        let below = dir.path().join("file/below");
        assert_eq!(open(&bind(&below, true), &[]).unwrap_err().status(), 400);
    }

    #[test]
    fn what_is_no_tree_is_refused_with_what_to_do_instead() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, pipe) = (dir.path().join("socket"), dir.path().join("pipe"));
        let _listener = UnixListener::bind(&socket).unwrap();
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        for (path, what) in
            [(&socket, "a socket"), (&pipe, "a named pipe"), (&"/dev/null".into(), "a device")]
        {
            for error in
                [open(&bind(path, true), &[]).unwrap_err(), check(&bind(path, false), &[]).unwrap_err()]
            {
                assert_eq!(error.status(), 501);
                assert!(error.to_string().contains(what), "{error}");
            }
        }
        let link = dir.path().join("link");
        symlink(&socket, &link).unwrap();
        let error = open(&bind(&link, true), &[socket]).unwrap_err().to_string();
        assert!(error.contains("the engine's socket"), "{error}");
    }
}
