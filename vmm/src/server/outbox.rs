//! What waits to be sent to a client. The VMM never waits for a client; one that reads nothing is dropped.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::control::{FromVmm, SocketError, send};

/// More messages than this do not wait.
const MAX_PENDING: usize = 1024;

/// Why a client was dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutboxError {
    #[error("it does not read its messages")]
    Full,
    #[error("a message could not be encoded")]
    Encode(#[from] serde_json::Error),
    #[error("a message could not be sent")]
    Socket(#[from] SocketError),
}

pub(super) struct Outbox {
    socket: OwnedFd,
    pending: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
}

impl Outbox {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, pending: VecDeque::new() }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Sends the message, or keeps it until the client has room.
    pub(super) fn push(&mut self, message: &FromVmm, fd: Option<OwnedFd>) -> Result<(), OutboxError> {
        if self.pending.len() >= MAX_PENDING {
            return Err(OutboxError::Full);
        }
        self.pending.push_back((serde_json::to_vec(message)?, fd));
        self.flush()
    }

    /// Sends what the client has room for.
    pub(super) fn flush(&mut self) -> Result<(), OutboxError> {
        while let Some((bytes, fd)) = self.pending.front() {
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            match send(&self.socket, bytes, &fds) {
                Ok(()) => {
                    self.pending.pop_front();
                }
                Err(SocketError::WouldBlock) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
