//! Netlink: messages of attributes, and a socket that sends them and waits for the kernel's answers (netlink(7),
//! Documentation/userspace-api/netlink/intro.rst). Only the kernel is spoken to; what it answers is still read with checks.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, socket_with};

/// The kernel's answers fit into this: a page, or 8 KiB where pages are smaller.
const ANSWER: usize = 32 * 1024;
const HEADER: usize = 16;
const NESTED: u16 = 1 << 15;
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;
const DUMP: u16 = libc::NLM_F_DUMP as u16;
/// Make it; without [`EXCLUSIVE`], also change it.
pub(crate) const CREATE: u16 = libc::NLM_F_CREATE as u16;
/// Fail if there is one.
pub(crate) const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
/// Put what is in place of what was.
pub(crate) const REPLACE: u16 = libc::NLM_F_REPLACE as u16;
/// After those that are there.
pub(crate) const APPEND: u16 = libc::NLM_F_APPEND as u16;

/// A message: a header of the family's own, then attributes.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    kind: u16,
    flags: u16,
    bytes: Vec<u8>,
}

impl Message {
    /// One of a kind, with the family's header.
    pub(crate) fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes.extend(header);
        Self { kind, flags, bytes }
    }

    /// A list of attributes that is part of another message.
    pub(crate) fn list() -> Self {
        Self { kind: 0, flags: 0, bytes: Vec::new() }
    }

    /// Adds an attribute.
    pub(crate) fn with(mut self, kind: u16, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        let len = u16::try_from(value.len() + 4).expect("no attribute of ours is that long");
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.pad();
        self
    }

    /// Adds an attribute that is a string with its zero.
    pub(crate) fn with_text(self, kind: u16, text: &str) -> Self {
        self.with(kind, [text.as_bytes(), &[0]].concat())
    }

    /// Adds an attribute that has attributes in it.
    pub(crate) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self = fill(self);
        let len = u16::try_from(self.bytes.len() - start).expect("no attribute of ours is that long");
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
        self
    }

    /// Adds bytes as they are: the header that some attributes begin with, or a finished list.
    pub(crate) fn raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.bytes.extend(bytes.as_ref());
        self.pad();
        self
    }

    /// The attributes of a list.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The bytes of a request that the kernel does not acknowledge.
    pub(crate) fn unacknowledged(self) -> Vec<u8> {
        self.finish(REQUEST, 0)
    }

    fn finish(mut self, flags: u16, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).expect("no message of ours is that long");
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[4..6].copy_from_slice(&self.kind.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&(self.flags | flags).to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A netlink socket of the network namespace that its maker was in. Calls block, for as long as the kernel works.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// For links, addresses, routes and rules.
    pub(crate) fn route() -> io::Result<Self> {
        // Which is protocol 0.
        Self::open(None)
    }

    /// For the packet filter.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::open(Some(netlink::NETFILTER))
    }

    fn open(protocol: Option<rustix::net::Protocol>) -> io::Result<Self> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends a request and waits for the kernel's yes or no.
    pub(crate) fn request(&mut self, message: Message) -> io::Result<()> {
        let sequence = self.next();
        let bytes = message.finish(REQUEST | ACK, sequence);
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        self.answer(sequence, |_, _| {})
    }

    /// Sends a request for a list: the kind of each message and what follows the header.
    pub(crate) fn dump(&mut self, message: Message) -> io::Result<Vec<(u16, Vec<u8>)>> {
        let sequence = self.next();
        let bytes = message.finish(REQUEST | DUMP, sequence);
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        let mut all = Vec::new();
        self.answer(sequence, |kind, body| all.push((kind, body.to_vec())))?;
        Ok(all)
    }

    /// Sends messages that count as one: between a begin and an end, as the packet filter wants it. All of them are done, or
    /// none; the first error is what comes back.
    pub(crate) fn transaction(
        &mut self,
        begin: Message,
        messages: Vec<Message>,
        end: Message,
    ) -> io::Result<()> {
        let mut bytes = begin.finish(REQUEST, self.next());
        let first = self.sequence + 1;
        for message in messages {
            let sequence = self.next();
            bytes.extend(message.finish(REQUEST | ACK, sequence));
        }
        let last = self.sequence;
        bytes.extend(end.finish(REQUEST, self.next()));
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        let mut failure = None;
        for sequence in first..=last {
            match self.answer(sequence, |_, _| {}) {
                Ok(()) => {}
                // Nothing more is answered after a failure of the whole.
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        match failure {
            None => Ok(()),
            Some(error) => {
                // Answers to the rest may still come: a fresh sequence tells them from those to later requests.
                self.drain()?;
                Err(error)
            }
        }
    }

    /// For what the kernel sends without being asked.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn drain(&self) -> io::Result<()> {
        let mut buffer = vec![0; ANSWER];
        loop {
            match rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads until the request of this number is answered to the end.
    fn answer(&mut self, sequence: u32, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0; ANSWER];
        loop {
            let (len, _) = match rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let mut rest = &buffer[..len];
            while let Some((kind, number, body, next)) = split(rest) {
                rest = next;
                if number != sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let code = body.first_chunk().copied().map_or(-libc::EBADMSG, i32::from_ne_bytes);
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => take(kind, body),
                }
            }
        }
    }
}

/// The messages in some bytes: the kind of each and what follows the header.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (kind, _, body, rest) = split(bytes)?;
        bytes = rest;
        Some((kind, body))
    })
}

/// The first message of some bytes: kind, sequence number, body, and what comes after it.
fn split(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let word = |at: usize| bytes.get(at..at + 4)?.first_chunk().copied().map(u32::from_ne_bytes);
    let len = usize::try_from(word(0)?).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.first_chunk().copied()?);
    let body = bytes.get(HEADER..len)?;
    Some((kind, word(8)?, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attributes in some bytes, without those after the first that makes no sense.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.first_chunk().copied()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.first_chunk().copied()?);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NESTED, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_lie_in_each_other() {
        let message = Message::new(16, 0, &[7; 4]).with_text(3, "br0").nest(18, |list| list.with(1, [9]));
        let bytes = message.finish(REQUEST, 5);
        let expected: &[u8] =
            &[7, 7, 7, 7, 8, 0, 3, 0, b'b', b'r', b'0', 0, 12, 0, 18, 0x80, 5, 0, 1, 0, 9, 0, 0, 0];
        assert_eq!(&bytes[HEADER..], expected);
        let (kind, sequence, body, rest) = split(&bytes).unwrap();
        assert_eq!((kind, sequence, body, rest.len()), (16, 5, expected, 0));
        let read: Vec<_> = attributes(&body[4..]).collect();
        assert_eq!(read, [(3, &b"br0\0"[..]), (18, &[5, 0, 1, 0, 9, 0, 0, 0])]);
    }

    #[test]
    fn what_makes_no_sense_ends_the_reading() {
        assert!(split(&[0; 15]).is_none());
        assert!(split(&[255; 16]).is_none());
        assert!(split(&[3; 20]).is_none());
        for bad in [&[0u8, 0, 0, 0][..], &[3, 0, 1, 0], &[9, 0, 1, 0, 1], &[8]] {
            assert_eq!(attributes(bad).count(), 0);
        }
    }
}
