//! The host's side of a bind mount: what a client names is opened at each start, once, so that what is granted is what was looked at, whatever
//! happens to the path afterwards. Everything here blocks.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2},
    io::Errno,
};

use super::shown;
use crate::{
    container::record::Bind,
    error::{Error, Result},
    sandbox::TreeKind,
};

/// Where clients look for Docker's socket: the engine's own is meant, wherever that is.
const DOCKER_SOCKETS: [&str; 2] = ["/var/run/docker.sock", "/run/docker.sock"];

/// How often a way is walked that someone changes meanwhile: a container could go on with it for ever.
const ATTEMPTS: u32 = 1000;

/// What a bind mount mounts.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) kind: TreeKind,
    /// Opened with `O_PATH`.
    pub(crate) tree: OwnedFd,
}

/// Whether a path, cleaned, means the engine's own socket.
pub(super) fn is_engine_socket(path: &str) -> bool {
    DOCKER_SOCKETS.contains(&path)
}

/// What can be said of a source before its container is started: that it is there, if it must be, and that it can be mounted.
pub(crate) fn check(bind: &Bind, engine_sockets: &[PathBuf]) -> Result<()> {
    match find(bind) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && bind.create => Ok(()),
        found => examine(bind, found, engine_sockets).map(drop),
    }
}

/// Opens a source; makes it, if that is asked for and there is nothing.
pub(crate) fn open(bind: &Bind, engine_sockets: &[PathBuf]) -> Result<Source> {
    let found = match find(bind) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && bind.create => {
            make(bind).map_err(|error| {
                let path = shown(&bind.source);
                Error::internal(format!(
                    "error while creating mount source path '{path}': mkdir {path}: {}",
                    words(&error)
                ))
            })?;
            find(bind)
        }
        found => found,
    };
    examine(bind, found, engine_sockets)
}

fn examine(bind: &Bind, found: io::Result<OwnedFd>, engine_sockets: &[PathBuf]) -> Result<Source> {
    let tree = found.map_err(|error| not_there(bind, &error))?;
    let stat = fstat(&tree).map_err(|error| not_there(bind, &error.into()))?;
    let kind = kind(bind, FileType::from_raw_mode(stat.st_mode), (stat.st_dev, stat.st_ino), engine_sockets)?;
    Ok(Source { kind, tree })
}

/// A handle to what is there.
fn find(bind: &Bind) -> io::Result<OwnedFd> {
    match within(bind)? {
        None => open_path(&bind.source),
        Some((root, rest)) if rest.as_os_str().is_empty() => Ok(root),
        Some((root, rest)) => beneath(&root, rest),
    }
}

fn make(bind: &Bind) -> io::Result<()> {
    let Some((root, rest)) = within(bind)? else {
        return std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&bind.source);
    };
    let mut here = PathBuf::new();
    let mut directory = root.try_clone()?;
    for name in rest.components() {
        here.push(name);
        directory = match beneath(&root, &here) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                mkdirat(&directory, name.as_os_str(), Mode::from_raw_mode(0o755))?;
                beneath(&root, &here)?
            }
            found => found?,
        };
    }
    Ok(())
}

/// The innermost tree that a source must not lead out of, and the way in it.
fn within(bind: &Bind) -> io::Result<Option<(OwnedFd, &Path)>> {
    let Some((outermost, inner)) = bind.within.split_first() else { return Ok(None) };
    let (mut root, mut here) = (open_path(outermost)?, Path::new(outermost));
    for next in inner.iter().map(Path::new) {
        let rest = next.strip_prefix(here).map_err(io::Error::other)?;
        if !rest.as_os_str().is_empty() {
            root = beneath(&root, rest)?;
        }
        here = next;
    }
    let rest = Path::new(&bind.source).strip_prefix(here).map_err(io::Error::other)?;
    Ok(Some((root, rest)))
}

fn open_path(path: &str) -> io::Result<OwnedFd> {
    retried(|| openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))
}

/// Links are followed as far as they stay in the tree.
fn beneath(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    retried(|| openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve))
}

fn retried(open: impl Fn() -> rustix::io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    for _ in 0..ATTEMPTS {
        match open() {
            // The kernel saw a rename elsewhere while it walked; nothing is known yet.
            Err(Errno::INTR | Errno::AGAIN) => {}
            opened => return Ok(opened?),
        }
    }
    Err(Errno::AGAIN.into())
}

/// What a file can be mounted as; `id` is its device and its inode.
fn kind(bind: &Bind, found: FileType, id: (u64, u64), engine_sockets: &[PathBuf]) -> Result<TreeKind> {
    let (what, instead) = match found {
        FileType::Directory => return Ok(TreeKind::Directory),
        FileType::RegularFile => return Ok(TreeKind::File),
        FileType::Socket => {
            let is_same = |socket: &Path| {
                std::fs::metadata(socket).is_ok_and(|socket| (socket.dev(), socket.ino()) == id)
            };
            if let Some(socket) = engine_sockets.iter().find(|socket| is_same(socket)) {
                return Err(not_by_that_name(&bind.source, socket));
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

fn not_by_that_name(path: &str, socket: &Path) -> Error {
    Error::unsupported(format!(
        "{} is the engine's own socket: name it /var/run/docker.sock or {} to mount it",
        shown(path),
        socket.display()
    ))
}

fn not_there(bind: &Bind, error: &io::Error) -> Error {
    let path = shown(&bind.source);
    Error::invalid(match error.kind() {
        io::ErrorKind::NotFound => {
            format!("invalid mount config for type \"bind\": bind source path does not exist: {path}")
        }
        _ if error.raw_os_error() == Some(Errno::XDEV.raw_os_error()) => {
            format!(
                "invalid mount config for type \"bind\": {path} leads out of what the asking container has"
            )
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
    use std::os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixListener,
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
            engine: false,
            within: Vec::new(),
        }
    }

    #[test]
    fn what_a_container_asks_for_stays_in_what_it_has() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        symlink("sub", dir.path().join("inside")).unwrap();
        symlink(other.path(), dir.path().join("outside")).unwrap();
        symlink("../../../../..", dir.path().join("up")).unwrap();
        let within = vec![dir.path().to_str().unwrap().to_owned()];
        let bind = |path: &str| Bind { within: within.clone(), ..bind(&dir.path().join(path), true) };
        for good in ["", "sub", "inside", "inside/new/deep"] {
            assert_eq!(open(&bind(good), &[]).unwrap().kind, TreeKind::Directory, "{good}");
        }
        assert!(dir.path().join("sub/new/deep").is_dir());
        for bad in ["outside", "outside/new", "up", "up/etc"] {
            for error in [open(&bind(bad), &[]).unwrap_err(), check(&bind(bad), &[]).unwrap_err()] {
                assert_eq!(error.status(), 400, "{bad}");
                assert!(error.to_string().contains("leads out of"), "{bad}: {error}");
            }
        }
        assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 0, "nothing was made outside");

        // A container in a container: what the inner one has is less.
        std::fs::create_dir(dir.path().join("beside")).unwrap();
        symlink("../beside", dir.path().join("sub/out")).unwrap();
        let nested = |path: &str| {
            let mut bind = bind(path);
            bind.within.push(dir.path().join("sub").to_str().unwrap().to_owned());
            open(&bind, &[])
        };
        assert!(nested("sub/new").is_ok() && nested("sub").is_ok() && open(&bind("sub/out"), &[]).is_ok());
        assert!(nested("sub/out").unwrap_err().to_string().contains("leads out of"));
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
        assert!(error.contains("is the engine's own socket"), "{error}");
    }
}
