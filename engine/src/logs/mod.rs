//! A container's log: what it wrote, in Docker's json-file format, on the host.
//!
//! The writer is in this process, so that a follower is woken by it and needs neither polling nor inotify. Lines are handed to
//! the kernel before the agent may forget them, so a killed daemon loses nothing and, on the next start, continues where
//! the file ends. A log can be read whether or not its sandbox runs.

mod format;
mod reader;
mod splitter;
mod writer;

pub(crate) use format::Entry;
pub(crate) use reader::{ReadOptions, read};
pub(crate) use writer::{Limits, Log, Position};

/// One of a process's two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Why a log could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the log file {path}")]
pub(crate) struct LogError {
    path: String,
    #[source]
    source: std::io::Error,
}

impl LogError {
    fn new(path: &std::path::Path, source: std::io::Error) -> Self {
        Self { path: path.display().to_string(), source }
    }
}
