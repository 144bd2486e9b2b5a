//! The host's ends of connections: sockets, ends of pipes or terminals, used without ever waiting for them, each with a bounded
//! backlog of what it did not take yet.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};

use super::super::buffers::Buffers;
use super::super::nowait::{self, Kind};
use super::core::{Id, ReadResult};

/// Which directions a descriptor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Directions {
    pub(super) gives: bool,
    pub(super) takes: bool,
}

#[derive(Debug)]
struct Stream {
    fd: OwnedFd,
    kind: Kind,
    directions: Directions,
    backlog: VecDeque<u8>,
    /// Whether the thread wakes when there is room to write. It does only while something waits for that.
    waits_for_room: bool,
}

impl Stream {
    /// Waits for room exactly while there is a backlog. Room that is there already is reported at once.
    fn watch(&mut self, epoll: &OwnedFd, id: Id) -> io::Result<()> {
        let room = !self.backlog.is_empty();
        if room != self.waits_for_room {
            epoll::modify(epoll, &self.fd, epoll::EventData::new_u64(id.0), interest(room))?;
            self.waits_for_room = room;
        }
        Ok(())
    }
}

/// What every stream is watched for.
fn interest(room: bool) -> epoll::EventFlags {
    let always = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    if room { always | epoll::EventFlags::OUT } else { always }
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

    /// Takes a stream that was made elsewhere, and says what can be done with it.
    pub(super) fn add(&mut self, id: Id, fd: OwnedFd) -> io::Result<Directions> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let kind = nowait::kind_of(fd.as_fd())?;
        let access = flags & OFlags::RWMODE;
        let directions = match kind {
            Kind::Socket => Directions { gives: true, takes: true },
            Kind::Pipe | Kind::Other => {
                Directions { gives: access != OFlags::WRONLY, takes: access != OFlags::RDONLY }
            }
        };
        epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(id.0), interest(false))?;
        self.streams
            .insert(id, Stream { fd, kind, directions, backlog: VecDeque::new(), waits_for_room: false });
        Ok(directions)
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

    /// Closes the stream so that the other end of a network connection sees a reset and not an orderly end.
    pub(super) fn abort(&mut self, id: Id) {
        if let Some(stream) = self.streams.get(&id).filter(|stream| stream.kind == Kind::Socket) {
            // It means nothing to a socket of the Unix family, and a connection that is over is over.
            let _ = set_socket_linger(&stream.fd, Some(Duration::ZERO));
        }
        self.close(id);
    }

    /// Ends a direction. A descriptor that is not a socket and has only this one is closed, so that its other end sees it;
    /// one that has both keeps them until it is closed.
    pub(super) fn shut(&mut self, id: Id, how: Shutdown) {
        let Some(stream) = self.streams.get(&id) else { return };
        let Directions { gives, takes } = stream.directions;
        match (stream.kind, how) {
            // Fails only when the other end is gone already.
            (Kind::Socket, _) => drop(shutdown(&stream.fd, how)),
            (_, Shutdown::Write) if !gives => self.close(id),
            (_, Shutdown::Read) if !takes => self.close(id),
            _ => {}
        }
    }

    /// Reads straight into guest memory.
    pub(super) fn read(&self, id: Id, into: &Buffers<'_>) -> ReadResult {
        let Some(stream) = self.streams.get(&id) else { return ReadResult::Failed };
        match into.receive(stream.fd.as_fd(), stream.kind) {
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
            match from.send(stream.fd.as_fd(), stream.kind) {
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
        stream.watch(&self.epoll, id)?;
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Writes as much of the backlog as the stream takes. Returns how much that was.
    pub(super) fn flush(&mut self, id: Id) -> io::Result<u32> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(0) };
        let mut written = 0;
        while !stream.backlog.is_empty() {
            let (first, second) = stream.backlog.as_slices();
            let parts = [IoSlice::new(first), IoSlice::new(second)];
            match nowait::send_slices(stream.fd.as_fd(), stream.kind, &parts) {
                Ok(len) => {
                    stream.backlog.drain(..len);
                    written += len;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if stream.backlog.is_empty() && stream.backlog.capacity() > 64 * 1024 {
            stream.backlog = VecDeque::new();
        }
        stream.watch(&self.epoll, id)?;
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Forgets what is buffered for a stream that takes nothing any more.
    pub(super) fn forget_backlog(&mut self, id: Id) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.backlog = VecDeque::new();
        }
    }
}
