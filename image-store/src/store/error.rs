//! What can go wrong in the store, and what kind of answer it deserves.

use std::io;
use std::path::{Path, PathBuf};

use crate::archive::ArchiveError;
use crate::config::ChangeError;
use crate::layer::LayerError;
use crate::reference::InvalidReference;

/// Why an operation on the store failed. The texts say one level each; causes are in `source()`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing has this name or id.
    #[error("No such image: {name}")]
    NotFound {
        /// The name as normalised.
        name: String,
    },
    /// Several images' ids start like this.
    #[error("multiple images have an id that starts with `{name}`")]
    Ambiguous {
        /// What was asked for.
        name: String,
    },
    /// A malformed name.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// A name that cannot be used for this.
    #[error("{0}")]
    InvalidName(String),
    /// The image's state forbids it.
    #[error("conflict: {0}")]
    Conflict(String),
    /// The archive is no good.
    #[error("the archive cannot be loaded")]
    Archive(#[source] ArchiveError),
    /// A file system's tar stream is no good.
    #[error("the tar stream cannot be used")]
    Layer(#[source] LayerError),
    /// A change to a config is no good.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// A stream from the store broke.
    #[error("cannot {action}")]
    Stream {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another process has the store open.
    #[error("the image store in `{path}` is in use by another process")]
    Locked {
        /// The database.
        path: PathBuf,
    },
    /// The disk is full.
    #[error("no space left on the disk that holds the images")]
    NoSpace(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A file operation failed.
    #[error("cannot {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The database failed.
    #[error("the image database failed")]
    Database(#[source] Box<redb::Error>),
    /// The store lacks something or it cannot be read; someone else changed its files.
    #[error("the image store is damaged: {what} is missing or unreadable")]
    Corrupt {
        /// What.
        what: String,
    },
}

/// What kind of answer an error deserves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The image does not exist.
    NotFound,
    /// Its state forbids the operation.
    Conflict,
    /// The caller's input is bad: a name, or an archive.
    InvalidInput,
    /// The disk is full.
    NoSpace,
    /// The store or the machine failed.
    Internal,
}

impl Error {
    /// What kind of answer it deserves.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Conflict(_) => ErrorKind::Conflict,
            Self::Ambiguous { .. } | Self::Reference(_) | Self::InvalidName(_) => ErrorKind::InvalidInput,
            Self::Archive(error) if error.is_local() => ErrorKind::Internal,
            Self::Layer(error) if error.is_local() => ErrorKind::Internal,
            Self::Archive(_) | Self::Layer(_) | Self::Change(_) => ErrorKind::InvalidInput,
            Self::NoSpace(_) => ErrorKind::NoSpace,
            Self::Locked { .. }
            | Self::Io { .. }
            | Self::Stream { .. }
            | Self::Database(_)
            | Self::Corrupt { .. } => ErrorKind::Internal,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        match is_full(&source) {
            true => Self::NoSpace(Box::new(source)),
            false => Self::Io { action, path: path.to_owned(), source },
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<ArchiveError> for Error {
    fn from(error: ArchiveError) -> Self {
        if error.is_no_space() { Self::NoSpace(Box::new(error)) } else { Self::Archive(error) }
    }
}

impl From<LayerError> for Error {
    fn from(error: LayerError) -> Self {
        if error.is_no_space() { Self::NoSpace(Box::new(error)) } else { Self::Layer(error) }
    }
}

impl From<redb::Error> for Error {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::Io(source) if is_full(&source) => Self::NoSpace(Box::new(source)),
            other => Self::Database(Box::new(other)),
        }
    }
}

macro_rules! from_redb {
    ($($error:ident),*) => {
        $(impl From<redb::$error> for Error {
            fn from(error: redb::$error) -> Self {
                redb::Error::from(error).into()
            }
        })*
    };
}

from_redb!(TransactionError, TableError, StorageError, CommitError);
