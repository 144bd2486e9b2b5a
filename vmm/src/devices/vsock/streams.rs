//! The host's ends of connections: descriptors that never block, each with a bounded backlog of what it did not take yet.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};

use super::super::buffers::Buffers;
use super::core::{Id, ReadResult};

#[derive(Debug)]
struct Stream {
    fd: OwnedFd,
    backlog: VecDeque<u8>,
}

/// All streams, registered edge-triggered: nothing wakes the thread that it cannot act on.
#[derive(Debug)]
pub(super) struct Streams {
    epoll: OwnedFd,
    streams: HashMap<Id, Stream>,
}

impl Streams {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, streams: HashMap::new() })
    }

    pub(super) fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    pub(super) fn add(&mut self, id: Id, fd: OwnedFd) -> io::Result<()> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let interest =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(id.0), interest)?;
        self.streams.insert(id, Stream { fd, backlog: VecDeque::new() });
        Ok(())
    }

    /// Makes a stream, keeps one end and returns the other.
    pub(super) fn make(&mut self, id: Id) -> io::Result<OwnedFd> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        self.add(id, ours)?;
        Ok(theirs)
    }

    /// Closes the stream. A descriptor that others hold too is not watched any longer either.
    pub(super) fn close(&mut self, id: Id) {
        if let Some(stream) = self.streams.remove(&id) {
            // Fails only if it was never added.
            let _ = epoll::delete(&self.epoll, &stream.fd);
        }
    }

    /// Ends a direction. What is not a socket has only one, which ends when it is closed.
    pub(super) fn shut(&self, id: Id, how: Shutdown) {
        if let Some(stream) = self.streams.get(&id) {
            let _ = shutdown(&stream.fd, how);
        }
    }

    /// Reads straight into guest memory.
    pub(super) fn read(&self, id: Id, into: &Buffers<'_>) -> ReadResult {
        let Some(stream) = self.streams.get(&id) else { return ReadResult::Failed };
        match into.receive(stream.fd.as_fd()) {
            Ok(0) => ReadResult::EndOfFile,
            Ok(len) => ReadResult::Bytes(u32::try_from(len).unwrap_or(u32::MAX)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ReadResult::WouldBlock,
            Err(_) => ReadResult::Failed,
        }
    }

    /// Writes straight from guest memory, and keeps what the stream does not take. Returns how much was written.
    pub(super) fn write(&mut self, id: Id, mut from: Buffers<'_>) -> io::Result<u32> {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let mut written = 0;
        while stream.backlog.is_empty() && from.len() > 0 {
            match from.send(stream.fd.as_fd()) {
                Ok(len) => {
                    written += len;
                    from.split_front(len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if from.len() > 0 {
            let mut rest = vec![0; from.len()];
            from.copy_to(&mut rest);
            stream.backlog.extend(rest);
        }
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Writes as much of the backlog as the stream takes. Returns how much that was.
    pub(super) fn flush(&mut self, id: Id) -> io::Result<u32> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(0) };
        let mut written = 0;
        while !stream.backlog.is_empty() {
            let (first, second) = stream.backlog.as_slices();
            match rustix::io::writev(&stream.fd, &[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(len) => {
                    stream.backlog.drain(..len);
                    written += len;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        if stream.backlog.is_empty() && stream.backlog.capacity() > 64 * 1024 {
            stream.backlog = VecDeque::new();
        }
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Forgets what is buffered for a stream that takes nothing any more.
    pub(super) fn forget_backlog(&mut self, id: Id) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.backlog = VecDeque::new();
        }
    }
}
