//! What a path in a container is, by Docker's rules: links on the way are followed, a link at the end is not, unless the path
//! goes on behind it with `/` or `/.`.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use coracle_agent_api::files::PathStat;
use coracle_agent_api::{ApiError, ErrorKind};
use rustix::fs::{FileType, OFlags, Stat};

use super::super::root_dir::RootDir;
use crate::error::{Result, from_io};

/// The kernel's limit, as Docker has it.
const MAX_LINKS: u32 = 255;

/// A path taken apart.
pub(super) struct Split {
    /// Everything up to and with the last slash.
    pub parent: PathBuf,
    /// What follows; `.` if nothing does.
    pub last: Vec<u8>,
    /// What archives call it.
    pub name: Vec<u8>,
}

/// Takes a path apart as Go's `filepath.Join("/", path)`, `Split` and `Base` do, a `/` or `/.` at its end kept.
pub(super) fn split(path: &str) -> Split {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.as_bytes().split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let dot = path.ends_with("/.") || path == ".";
    let whole = [b"/".as_slice(), &parts.join(&b'/')].concat();
    let through = dot || path.ends_with('/') || parts.is_empty();
    let name = match (dot, parts.last()) {
        (true, _) => b".".to_vec(),
        (false, Some(last)) => last.to_vec(),
        (false, None) => b"/".to_vec(),
    };
    let (parent, last) = match parts.split_last() {
        Some((last, before)) if !through => ([b"/".as_slice(), &before.join(&b'/')].concat(), last.to_vec()),
        _ => (whole, b".".to_vec()),
    };
    Split { parent: PathBuf::from(OsStr::from_bytes(&parent)), last, name }
}

/// A handle to what a path names.
pub(super) fn find(root: &RootDir, path: &str, split: &Split) -> Result<OwnedFd> {
    let failed = |error: std::io::Error| failure(path, &error);
    let parent = root.find_directory(&split.parent).map_err(failed)?;
    super::open_in(parent, &split.last, OFlags::PATH).map_err(|error| failed(error.into()))
}

/// Says what is at a path.
pub(super) fn describe(root: &RootDir, path: &str) -> Result<PathStat> {
    let split = split(path);
    let found = find(root, path, &split)?;
    let stat = rustix::fs::fstat(&found).map_err(|error| failure(path, &error.into()))?;
    let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
    let link_target = if is_link { resolve(root, path) } else { String::new() };
    Ok(of(&split, &stat, link_target))
}

pub(super) fn of(split: &Split, stat: &Stat, link_target: String) -> PathStat {
    let nanos = stat.st_mtime.saturating_mul(1_000_000_000);
    PathStat {
        name: String::from_utf8_lossy(&split.name).into_owned(),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode,
        modified_unix_nanos: nanos.saturating_add(i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
        link_target,
    }
}

/// What is said of a path that cannot be used.
pub(super) fn failure(path: &str, error: &std::io::Error) -> ApiError {
    let kind = match error.raw_os_error() {
        Some(libc::ENOENT) => ErrorKind::NotFound,
        Some(libc::ENOTDIR | libc::ELOOP | libc::ENAMETOOLONG) => ErrorKind::Invalid,
        _ => ErrorKind::Internal,
    };
    from_io(kind, path, error)
}

/// Where a path leads when all links are followed within the root, whether or not anything is there. For people and clients:
/// nothing is opened by the answer.
fn resolve(root: &RootDir, path: &str) -> String {
    let mut links = 0;
    let mut here = PathBuf::from("/");
    let mut ahead: Vec<Vec<u8>> = path.as_bytes().split(|b| *b == b'/').rev().map(<[u8]>::to_vec).collect();
    while let Some(part) = ahead.pop() {
        match part.as_slice() {
            b"" | b"." => continue,
            b".." => {
                here.pop();
                continue;
            }
            _ => {}
        }
        let next = here.join(OsStr::from_bytes(&part));
        match root.read_link(&next) {
            Ok(target) if links < MAX_LINKS => {
                links += 1;
                if target.first() == Some(&b'/') {
                    here = PathBuf::from("/");
                }
                ahead.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
            }
            _ => here = next,
        }
    }
    Path::new(&here).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::super::root_dir::open_directory;
    use super::*;

    #[test]
    fn paths_are_taken_apart_as_docker_does() {
        for (path, parent, last, name) in [
            ("/a/b", "/a", "b", "b"),
            ("a/b", "/a", "b", "b"),
            ("/a/b/", "/a/b", ".", "b"),
            ("/a/b/.", "/a/b", ".", "."),
            ("/", "/", ".", "/"),
            ("", "/", ".", "/"),
            (".", "/", ".", "."),
            ("/../../a", "/", "a", "a"),
            ("/a/../b", "/", "b", "b"),
            ("/a//b/./c", "/a/b", "c", "c"),
        ] {
            let split = split(path);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let got = (split.parent.to_str().unwrap(), text(&split.last), text(&split.name));
            assert_eq!(got, (parent, last.to_owned(), name.to_owned()), "{path}");
        }
    }

    #[test]
    fn links_are_resolved_within_the_root_also_to_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("../../../etc/shadow", dir.path().join("out")).unwrap();
        std::os::unix::fs::symlink("circle", dir.path().join("circle")).unwrap();
        let root = RootDir::new(open_directory(dir.path()).unwrap());
        assert_eq!(describe(&root, "/out").unwrap().link_target, "/etc/shadow");
        assert_eq!(describe(&root, "/circle").unwrap().link_target, "/circle");
        assert_eq!(describe(&root, "/out/").unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(describe(&root, "/circle/").unwrap_err().kind, ErrorKind::Invalid);
        assert_eq!(describe(&root, "/").unwrap().name, "/");
    }
}
