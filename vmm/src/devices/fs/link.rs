//! The conversation with a vhost-user back end, from the front end's side (QEMU, docs/interop/vhost-user.rst). One request is under way at a time.
//! Every step has a deadline, and what comes back must be the answer to what was asked; otherwise the back end is not spoken to again.
//!
//! The messages' layout is the `vhost` crate's. Its front end is not used: it takes a time limit of the socket for a reason to try again.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion, VhostUserProtocolFeatures,
    VhostUserU64, VhostUserVirtioFeatures, VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use virtio_queue::QueueT;
use vm_memory::{ByteValued, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::ledger::Ledger;
use crate::devices::Activation;
use crate::memory::Memory;
use crate::sys::borrow_event;

/// From the VMM's start to a server that says what it can. Nobody waits for that but a driver's first request.
const INTRODUCTION: Duration = Duration::from_secs(60);
/// To take the rings into service.
const START: Duration = Duration::from_secs(20);
/// To let go of them. The driver gives up sooner, see [`super::RESET_LIMIT`].
const STOP: Duration = Duration::from_secs(20);
/// Message, version 1.
const VERSION: u32 = 1;
const HEADER: usize = 12;
/// The most descriptors with one message: one for each region of memory.
const MAX_FDS: usize = 4;

/// Why a back end is not spoken to any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("it has hung up")]
    Closed,
    #[error("it does not answer")]
    TimedOut,
    #[error("its socket failed")]
    Socket(#[from] Errno),
    #[error("it answers something else than it was asked")]
    Nonsense,
    #[error("it refuses {0:?}")]
    Refused(FrontendReq),
    #[error("it lacks {0}")]
    Lacks(&'static str),
    #[error("guest memory cannot be shared")]
    Memory(#[source] io::Error),
}

/// One end of the conversation.
#[derive(Debug)]
pub(super) struct Link {
    socket: Arc<OwnedFd>,
    /// What the back end offers of the device's features.
    features: u64,
}

impl Link {
    /// Makes the acquaintance of a back end, which must serve this many queues.
    pub(super) fn introduce(socket: Arc<OwnedFd>, queues: usize) -> Result<Self, LinkError> {
        let mut link = Self { socket, features: 0 };
        let talk = link.talk(INTRODUCTION);
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = talk.ask::<VhostUserU64>(FrontendReq::GET_FEATURES, &[])?.value;
        if features & protocol == 0 {
            return Err(LinkError::Lacks("protocol features"));
        }
        let offered = talk.ask::<VhostUserU64>(FrontendReq::GET_PROTOCOL_FEATURES, &[])?.value;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        if offered & wanted.bits() != wanted.bits() {
            return Err(LinkError::Lacks("several queues, answers to all requests, or a ledger"));
        }
        // From here on all requests are answered.
        let wanted = VhostUserU64::new(wanted.bits());
        talk.send(FrontendReq::SET_PROTOCOL_FEATURES, 0, wanted.as_slice(), &[])?;
        let most = talk.ask::<VhostUserU64>(FrontendReq::GET_QUEUE_NUM, &[])?.value;
        if most < queues as u64 {
            return Err(LinkError::Lacks("a queue for each processor"));
        }
        talk.tell(FrontendReq::SET_OWNER, &[], &[])?;
        link.features = features;
        Ok(link)
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Gives the back end guest memory and the rings. It says by `complaints` that one is broken, and keeps the ledger.
    pub(super) fn start(
        &self,
        activation: &Activation,
        complaints: &EventFd,
        ledger: &Ledger,
    ) -> Result<(), LinkError> {
        let Activation { memory, queues, features, signals } = activation;
        if features & !self.features != 0 {
            return Err(LinkError::Lacks("features that the driver was offered"));
        }
        let talk = self.talk(START);
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        talk.tell_number(FrontendReq::SET_FEATURES, features | protocol, &[])?;
        talk.share(memory)?;
        ledger.clear();
        if let Some((request, memory)) = ledger.describe(queues.len()) {
            talk.tell(FrontendReq::SET_INFLIGHT_FD, request.as_slice(), &[memory])?;
        }
        let line = borrow_event(signals.lend_line());
        for (index, active) in (0u32..).zip(queues) {
            let queue = &active.queue;
            let state = VhostUserVringState::new(index, u32::from(queue.size()));
            talk.tell(FrontendReq::SET_VRING_NUM, state.as_slice(), &[])?;
            let address = VhostUserVringAddr::new(
                index,
                VhostUserVringAddrFlags::empty(),
                queue.desc_table(),
                queue.used_ring(),
                queue.avail_ring(),
                0,
            );
            talk.tell(FrontendReq::SET_VRING_ADDR, address.as_slice(), &[])?;
            let state = VhostUserVringState::new(index, u32::from(queue.next_avail()));
            talk.tell(FrontendReq::SET_VRING_BASE, state.as_slice(), &[])?;
            let events = [
                (FrontendReq::SET_VRING_ERR, borrow_event(complaints)),
                (FrontendReq::SET_VRING_CALL, line),
                (FrontendReq::SET_VRING_KICK, borrow_event(&active.kick)),
            ];
            for (request, event) in events {
                talk.tell_number(request, u64::from(index), &[event])?;
            }
        }
        for index in (0u32..).take(queues.len()) {
            let state = VhostUserVringState::new(index, 1);
            talk.tell(FrontendReq::SET_VRING_ENABLE, state.as_slice(), &[])?;
        }
        Ok(())
    }

    /// Has it let go of so many rings.
    pub(super) fn stop(&self, queues: usize) -> Result<(), LinkError> {
        let talk = self.talk(STOP);
        for index in (0u32..).take(queues) {
            let state = VhostUserVringState::new(index, 0);
            let base: VhostUserVringState = talk.ask(FrontendReq::GET_VRING_BASE, state.as_slice())?;
            if { base.index } != index {
                return Err(LinkError::Nonsense);
            }
        }
        Ok(())
    }

    fn talk(&self, limit: Duration) -> Talk<'_> {
        Talk { socket: self.socket(), deadline: Instant::now() + limit }
    }
}

/// A few requests with one deadline.
struct Talk<'a> {
    socket: BorrowedFd<'a>,
    deadline: Instant,
}

impl Talk<'_> {
    /// Addresses are given as the guest's: the back end learns nothing of where things are in this process.
    fn share(&self, memory: &Memory) -> Result<(), LinkError> {
        let private = || LinkError::Memory(io::ErrorKind::Unsupported.into());
        let mut body = VhostUserMemory::new(memory.num_regions() as u32).as_slice().to_vec();
        let mut files = Vec::new();
        for region in memory.iter() {
            let place = region.file_offset().ok_or_else(private)?;
            let (address, len) = (region.start_addr().0, region.len());
            body.extend_from_slice(
                VhostUserMemoryRegion::new(address, len, address, place.start()).as_slice(),
            );
            files.push(place.file().as_fd());
        }
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &files)
    }

    /// A request with a number as its body.
    fn tell_number(
        &self,
        request: FrontendReq,
        number: u64,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        self.tell(request, VhostUserU64::new(number).as_slice(), fds)
    }

    /// A request that is answered by whether it was done.
    fn tell(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        self.send(request, VhostUserHeaderFlag::NEED_REPLY.bits(), body, fds)?;
        match self.answer::<VhostUserU64>(request)?.value {
            0 => Ok(()),
            _ => Err(LinkError::Refused(request)),
        }
    }

    /// A request that has an answer of its own.
    fn ask<T: ByteValued + Default>(&self, request: FrontendReq, body: &[u8]) -> Result<T, LinkError> {
        self.send(request, 0, body, &[])?;
        self.answer(request)
    }

    fn send(
        &self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        let header = [request as u32, VERSION | flags, body.len() as u32].map(u32::to_ne_bytes);
        let message = [header.as_flattened(), body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(LinkError::Memory(io::ErrorKind::OutOfMemory.into()));
        }
        let mut left = &message[..];
        while !left.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(self.socket, &[IoSlice::new(left)], &mut control, flags) {
                Ok(sent) => {
                    left = &left[sent.min(left.len())..];
                    // The descriptors went with the first byte.
                    control.clear();
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn answer<T: ByteValued + Default>(&self, request: FrontendReq) -> Result<T, LinkError> {
        let mut header = [0; HEADER];
        self.receive(&mut header)?;
        let words = header.as_chunks::<4>().0;
        let [code, flags, size] = [words[0], words[1], words[2]].map(u32::from_ne_bytes);
        let known = VhostUserHeaderFlag::VERSION.bits() | VhostUserHeaderFlag::REPLY.bits();
        if code != request as u32
            || flags & known != VERSION | VhostUserHeaderFlag::REPLY.bits()
            || size as usize != size_of::<T>()
        {
            return Err(LinkError::Nonsense);
        }
        let mut body = T::default();
        self.receive(body.as_mut_slice())?;
        Ok(body)
    }

    /// Fills the buffer. Descriptors, which no answer here has, are closed by the kernel.
    fn receive(&self, buffer: &mut [u8]) -> Result<(), LinkError> {
        let mut done = 0;
        while done < buffer.len() {
            let mut slices = [IoSliceMut::new(&mut buffer[done..])];
            let mut nothing = RecvAncillaryBuffer::new(&mut []);
            match recvmsg(self.socket, &mut slices, &mut nothing, RecvFlags::DONTWAIT) {
                Ok(message) if message.bytes == 0 => return Err(LinkError::Closed),
                Ok(message) => done += message.bytes,
                Err(Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn wait(&self, what: PollFlags) -> Result<(), LinkError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| LinkError::TimedOut)?;
        match poll(&mut [PollFd::from_borrowed_fd(self.socket, what)], Some(&left)) {
            Ok(0) => Err(LinkError::TimedOut),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzz(activation: &Activation, answers: &[u8]) {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    theirs.write_all(&answers[..answers.len().min(1 << 12)]).expect("a socket's buffer takes that much");
    // Nothing more comes, so that nothing is waited for; what is asked is not read.
    theirs.shutdown(std::net::Shutdown::Write).expect("a socket can be shut down");
    if let Ok(link) = Link::introduce(Arc::new(ours.into()), 2) {
        let complaints = EventFd::new(EFD_NONBLOCK).expect("an event");
        let ledger = Ledger::new().expect("memory");
        let _ = link.start(activation, &complaints, &ledger);
        let _ = link.stop(2);
    }
}
