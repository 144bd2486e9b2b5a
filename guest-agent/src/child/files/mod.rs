//! Work on a container's files, in a process of its own that the fork server made: it enters the container's file system and
//! nothing else of it, so that no process in the container sees it, and whatever a hostile tree or tar stream does to it
//! stays with it. It answers in the frames of [`coracle_agent_api::files`] on its standard output.

mod changes;
mod read;
mod stat;
mod write;

use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd, OwnedFd};

use coracle_agent_api::files::{self, FilesKind, FilesOperation};
use coracle_agent_api::{ApiError, ErrorKind};
use rustix::fs::{Mode, OFlags, RawMode};
use rustix::process::Resource;
use rustix::thread::ThreadNameSpaceType;
use serde::{Deserialize, Serialize};

use super::root_dir::RootDir;
use crate::error::{AtStep, Result};
use crate::mounts;

/// What the process may take of memory; a hostile stream that wants more ends it.
const MEMORY: u64 = 1 << 30;
/// Trees that are deeper than this are refused: each level holds descriptors.
const MAX_DEPTH: usize = 2000;

/// What such a process is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FilesTask {
    /// The work itself.
    pub operation: FilesOperation,
    /// Where it is done.
    pub place: FilesPlace,
    /// Die when the agent dies (only where the agent is not PID 1).
    pub die_with_agent: bool,
}

/// What the descriptor that comes with the task is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FilesPlace {
    /// The pidfd of a running container's first process.
    Running,
    /// The detached mount of a stopped container's root.
    Stopped,
    /// The writable layer alone, above these directories (highest first).
    Upper(Vec<String>),
}

/// Does the work; the exit code.
pub(super) fn run(task: FilesTask, place: OwnedFd, stdio: [OwnedFd; 3]) -> u8 {
    let [input, output, _] = stdio;
    let mut frames = Frames::new(output.into());
    let result = work(task, place, input.into(), &mut frames);
    let ended = match &result {
        Ok(()) => frames.send(FilesKind::Done, &[]),
        Err(error) => frames.send_json(FilesKind::Failed, error),
    };
    // Whoever does not listen any more needs no answer.
    let flushed = ended.and_then(|()| frames.flush());
    u8::from(result.is_err() || flushed.is_err())
}

fn work(task: FilesTask, place: OwnedFd, input: std::fs::File, frames: &mut Frames) -> Result<()> {
    // While /proc is still the agent's. It shall be the first to go if memory is short.
    let _ = std::fs::write("/proc/self/oom_score_adj", "500");
    if task.die_with_agent {
        let kill = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(kill).at("tie the process to the agent")?;
    }
    bound_resources().at_kind(ErrorKind::Internal, "bound the process")?;
    rustix::process::umask(Mode::empty());
    if let FilesPlace::Upper(lower) = &task.place {
        return changes::run(&task.operation, place, lower, frames);
    }
    let running = task.place == FilesPlace::Running;
    let root = if running {
        rustix::thread::move_into_thread_name_spaces(place.as_fd(), ThreadNameSpaceType::MOUNT)
            .at_kind(ErrorKind::Conflict, "enter the container's file system")?;
        RootDir::current().at("open the container's root")?
    } else {
        RootDir::new(place)
    };
    match &task.operation {
        FilesOperation::Stat { path } => {
            let stat = stat::describe(&root, path)?;
            frames.send_json(FilesKind::Stat, &stat).at_kind(ErrorKind::Internal, "answer")
        }
        FilesOperation::Read { path } => read::archive(&root, path, frames),
        FilesOperation::Export if running => {
            // What is mounted in it is no part of it.
            let bare = mounts::bind(root.as_fd()).at("look below the container's mounts")?;
            read::export(&RootDir::new(bare), frames)
        }
        FilesOperation::Export => read::export(&root, frames),
        FilesOperation::Write { path, keep_kinds, owner } => {
            let wanted = write::Wanted { path, keep_kinds: *keep_kinds, owner: owner.as_deref() };
            write::unpack(&root, &wanted, input)
        }
        FilesOperation::Changes { .. } | FilesOperation::Diff { .. } | FilesOperation::Size => {
            Err(ApiError::new(ErrorKind::Internal, "this is asked of the writable layer"))
        }
    }
}

fn bound_resources() -> io::Result<()> {
    let memory = rustix::process::Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
    rustix::process::setrlimit(Resource::As, memory)?;
    let mut files = rustix::process::getrlimit(Resource::Nofile);
    files.current = files.maximum;
    Ok(rustix::process::setrlimit(Resource::Nofile, files)?)
}

/// The answer.
struct Frames {
    output: BufWriter<std::fs::File>,
}

impl Frames {
    fn new(output: std::fs::File) -> Self {
        Self { output: BufWriter::with_capacity(64 * 1024, output) }
    }

    fn send(&mut self, kind: FilesKind, payload: &[u8]) -> io::Result<()> {
        let len = u32::try_from(payload.len()).ok().filter(|len| *len <= files::MAX_PAYLOAD);
        let len = len.ok_or(io::ErrorKind::InvalidInput)?;
        self.output.write_all(&files::encode_header(kind, len))?;
        self.output.write_all(payload)
    }

    fn send_json(&mut self, kind: FilesKind, value: &impl Serialize) -> io::Result<()> {
        self.send(kind, &serde_json::to_vec(value)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// A tar stream as data frames.
struct Data<'a>(&'a mut Frames);

impl Write for Data<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(files::MAX_PAYLOAD as usize)];
        self.0.send(FilesKind::Data, part)?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A tar writer over frames that are not tiny.
fn tar_writer(frames: &mut Frames) -> coracle_tarball::TarWriter<BufWriter<Data<'_>>> {
    coracle_tarball::TarWriter::new(BufWriter::with_capacity(64 * 1024, Data(frames)))
}

/// Opens what a directory holds without following a link.
fn open_in(directory: impl std::os::fd::AsFd, name: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(directory, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// The names in a directory, sorted.
fn names(directory: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn permissions(mode: RawMode) -> u16 {
    (mode & 0o7777) as u16
}

fn too_deep() -> ApiError {
    ApiError::new(ErrorKind::Invalid, format!("the tree is deeper than {MAX_DEPTH} directories"))
}
