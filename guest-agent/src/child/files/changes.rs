//! What a container changed in its root file system, read from its writable layer: which paths, as a layer of its own, and how
//! much. The layer may change meanwhile; what is gone by the time it is looked at was deleted.

use std::os::fd::{AsFd, OwnedFd};

use coracle_agent_api::files::{ChangeKind, FileChange, FilesKind, FilesOperation};
use coracle_agent_api::{ApiError, ErrorKind};
use rustix::fs::{FileType, OFlags, Stat};
use rustix::mount::MountAttrFlags;

use super::read::Packer;
use super::{Frames, MAX_DEPTH, names, open_in, too_deep};
use crate::error::{AtStep, Result};
use crate::mounts;

/// Places that every container's start makes, which are no change of the container's; Docker has them in a layer of its own.
const MADE_BY_START: [&[u8]; 8] = [
    b"/dev",
    b"/dev/console",
    b"/dev/pts",
    b"/dev/shm",
    b"/dev/mqueue",
    b"/proc",
    b"/sys",
    b"/sys/fs/cgroup",
];
/// How many changes go into one frame.
const BATCH: usize = 200;

/// A change, with the path as it is.
struct Change {
    path: Vec<u8>,
    kind: ChangeKind,
}

/// Does what is asked of the writable layer above the lower directories (highest first).
pub(super) fn run(
    operation: &FilesOperation,
    upper: OwnedFd,
    lower: &[String],
    frames: &mut Frames,
) -> Result<()> {
    let upper = open_in(&upper, b".", OFlags::RDONLY | OFlags::DIRECTORY).at("open the writable layer")?;
    match operation {
        FilesOperation::Size => {
            let size = Sizes::default().of(&upper, 0)?;
            frames.send_json(FilesKind::Size, &size).at_kind(ErrorKind::Internal, "answer")
        }
        FilesOperation::Changes { injected } => tell(&find(&upper, lower, injected)?, frames),
        FilesOperation::Diff { injected } => {
            let changes = find(&upper, lower, injected)?;
            pack(&upper, &changes, frames)
        }
        _ => Err(ApiError::new(ErrorKind::Internal, "this is not asked of the writable layer")),
    }
}

fn tell(changes: &[Change], frames: &mut Frames) -> Result<()> {
    for batch in changes.chunks(BATCH) {
        let batch: Vec<FileChange> = batch
            .iter()
            .map(|change| FileChange {
                path: String::from_utf8_lossy(&change.path).into_owned(),
                kind: change.kind,
            })
            .collect();
        // Even the longest paths of a batch may not fit into one frame together.
        if frames.send_json(FilesKind::Changes, &batch).is_err() {
            for change in &batch {
                frames
                    .send_json(FilesKind::Changes, &std::slice::from_ref(change))
                    .at_kind(ErrorKind::Internal, "answer")?;
            }
        }
    }
    Ok(())
}

fn pack(upper: &OwnedFd, changes: &[Change], frames: &mut Frames) -> Result<()> {
    let mut packer = Packer::new(frames);
    for Change { path, kind } in changes {
        let relative = &path[1..];
        if *kind == ChangeKind::Deleted {
            packer.whiteout(relative)?;
            continue;
        }
        let (parent, name) = match relative.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&relative[..at], &relative[at + 1..]),
            None => (b".".as_slice(), relative),
        };
        match open_below(upper, parent) {
            Ok(parent) => drop(packer.pack_one(parent.as_fd(), name, relative)?),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error).at(format!("read {}", String::from_utf8_lossy(path))),
        }
    }
    packer.finish()
}

/// A directory of the writable layer, part by part: a link in it leads nowhere.
fn open_below(upper: &OwnedFd, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let mut here = open_in(upper, b".", OFlags::PATH | OFlags::DIRECTORY)?;
    for part in path.split(|byte| *byte == b'/') {
        here = open_in(&here, part, OFlags::PATH | OFlags::DIRECTORY)?;
    }
    Ok(here)
}

fn find(upper: &OwnedFd, lower: &[String], injected: &[String]) -> Result<Vec<Change>> {
    let lower = lower_view(lower)?;
    let lower = open_in(&lower, b".", OFlags::RDONLY | OFlags::DIRECTORY).at("open the image's files")?;
    let mut found = Vec::new();
    Differ { injected }.compare(upper, Some(&lower), b"", 0, &mut found)?;
    Ok(found)
}

/// The image alone: its one layer, or an overlay of all of them.
fn lower_view(lower: &[String]) -> Result<OwnedFd> {
    let step = "mount the image's files";
    if let [only] = lower {
        return super::super::open_directory(only).at(step);
    }
    let mut options: Vec<(&str, &str)> = lower.iter().map(|path| ("lowerdir+", path.as_str())).collect();
    options.extend([("redirect_dir", "off"), ("metacopy", "off"), ("index", "off"), ("xino", "off")]);
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_RDONLY;
    mounts::new("overlay", &options, attributes).at(step)
}

struct Differ<'a> {
    injected: &'a [String],
}

impl Differ<'_> {
    /// Finds the changes below a directory, which both have; sorted, a directory before what is in it.
    fn compare(
        &self,
        upper: &OwnedFd,
        lower: Option<&OwnedFd>,
        path: &[u8],
        depth: usize,
        found: &mut Vec<Change>,
    ) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        let mut seen = names(upper).at("read the writable layer")?;
        if let Some(lower) = lower.filter(|_| is_opaque(upper)) {
            let mine: std::collections::HashSet<_> = seen.iter().cloned().collect();
            let hidden = names(lower).at("read the image's files")?;
            seen.extend(hidden.into_iter().filter(|name| !mine.contains(name)));
            seen.sort_unstable();
        }
        for name in seen {
            let path = [path, b"/", name.as_slice()].concat();
            self.compare_one(upper, lower, &name, path, depth, found)?;
        }
        Ok(())
    }

    fn compare_one(
        &self,
        upper: &OwnedFd,
        lower: Option<&OwnedFd>,
        name: &[u8],
        path: Vec<u8>,
        depth: usize,
        found: &mut Vec<Change>,
    ) -> Result<()> {
        let shown = || format!("compare {}", String::from_utf8_lossy(&path));
        let below = match lower {
            Some(lower) => look(lower, name).at(shown())?,
            None => None,
        };
        let above = look(upper, name).at(shown())?;
        let Some((handle, stat)) = above.filter(|(_, stat)| !is_whiteout(stat)) else {
            if below.is_some() {
                found.push(Change { path, kind: ChangeKind::Deleted });
            }
            return Ok(());
        };
        let is_directory = is_directory(&stat);
        let at = found.len();
        if is_directory {
            let opened = open_in(&handle, b".", OFlags::RDONLY | OFlags::DIRECTORY).at(shown())?;
            let beside = match &below {
                Some((handle, stat)) if self::is_directory(stat) => {
                    Some(open_in(handle, b".", OFlags::RDONLY | OFlags::DIRECTORY).at(shown())?)
                }
                _ => None,
            };
            self.compare(&opened, beside.as_ref(), &path, depth + 1, found)?;
        }
        let kind = match &below {
            None if self.is_made_by_start(&path, &stat) && found.len() == at => return Ok(()),
            None => ChangeKind::Added,
            Some((_, before)) if differs(before, &stat) || found.len() > at => ChangeKind::Modified,
            Some(_) => return Ok(()),
        };
        found.insert(at, Change { path, kind });
        Ok(())
    }

    fn is_made_by_start(&self, path: &[u8], stat: &Stat) -> bool {
        let injected = self.injected.iter().map(String::as_bytes);
        if is_directory(stat) {
            // Also the directories on the way to what is mounted.
            return MADE_BY_START.contains(&path)
                || injected
                    .clone()
                    .any(|file| file.strip_prefix(path).is_some_and(|rest| rest.starts_with(b"/")));
        }
        stat.st_size == 0 && (MADE_BY_START.contains(&path) || injected.clone().any(|file| file == path))
    }
}

fn look(directory: &OwnedFd, name: &[u8]) -> rustix::io::Result<Option<(OwnedFd, Stat)>> {
    match open_in(directory, name, OFlags::PATH) {
        Ok(handle) => {
            let stat = rustix::fs::fstat(&handle)?;
            Ok(Some((handle, stat)))
        }
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn is_opaque(directory: &OwnedFd) -> bool {
    let mut value = [0; 1];
    let len = rustix::fs::fgetxattr(directory, "trusted.overlay.opaque", value.as_mut_slice());
    len == Ok(1) && value == *b"y"
}

/// Docker's rule: size and time say nothing of a directory.
fn differs(before: &Stat, after: &Stat) -> bool {
    let owner = |stat: &Stat| (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev);
    let contents = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec);
    owner(before) != owner(after) || !is_directory(after) && contents(before) != contents(after)
}

/// Adds up files, each once.
#[derive(Default)]
struct Sizes {
    linked: std::collections::HashSet<(u64, u64)>,
}

impl Sizes {
    fn of(&mut self, directory: &OwnedFd, depth: usize) -> Result<u64> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        let mut total: u64 = 0;
        for name in names(directory).at("read the writable layer")? {
            let Some((handle, stat)) = look(directory, &name).at("measure the writable layer")? else {
                continue;
            };
            if is_directory(&stat) {
                let opened = open_in(&handle, b".", OFlags::RDONLY | OFlags::DIRECTORY);
                total = total.saturating_add(self.of(&opened.at("measure the writable layer")?, depth + 1)?);
            } else if stat.st_nlink < 2 || self.linked.insert((stat.st_dev, stat.st_ino)) {
                total = total.saturating_add(u64::try_from(stat.st_size).unwrap_or(0));
            }
        }
        Ok(total)
    }
}
