//! Network namespaces as descriptors. A namespace belongs to a thread, so whatever is done in another one is done on a thread that
//! ends with it: the agent's own threads never leave theirs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::links;
use super::netlink::Socket;
use crate::{bpf, sys};

/// A network namespace; it exists for as long as this, or a process in it.
#[derive(Debug)]
pub(crate) struct Namespace {
    fd: OwnedFd,
    /// By which the kernel knows it in its events.
    cookie: u64,
}

impl Namespace {
    /// A new one, with loopback up and what Docker gives every container: ping without a raw socket, and low ports for every user.
    pub(crate) fn new() -> io::Result<Self> {
        on_a_thread(|| {
            sys::unshare(UnshareFlags::NEWNET)?;
            links::bring_up(&mut Socket::route()?, links::LOOPBACK)?;
            for (name, value) in [("ping_group_range", "0 2147483647"), ("ip_unprivileged_port_start", "0")] {
                std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value)?;
            }
            Self::current()
        })
    }

    /// The one that the calling thread is in.
    pub(crate) fn current() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/proc/thread-self/ns/net", flags, Mode::empty())?;
        let cookie = bpf::network_cookie(std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?)?;
        Ok(Self { fd, cookie })
    }

    /// The kernel's number for it.
    pub(crate) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Does something in it. Blocks.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_a_thread(|| {
            move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("namespace".into()).spawn_scoped(scope, work)?;
        worker.join().unwrap_or_else(|_| Err(io::Error::other("the work in a namespace panicked")))
    })
}
