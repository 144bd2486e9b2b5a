//! What the guest's kernel does with packets of containers that leave the guest. A packet does if it is not for the guest itself
//! and the guest has no route to where it wants to go; so containers' own networks need not be known here.
//!
//! Two chains of one table, before routing:
//! - `hold`: the first packet of a TCP connection, and an echo request, waits for the agent ([`super::queue`]), which lets it
//!   go on with a mark that says what shall become of it.
//! - `steer`: by that mark a connection goes to the agent's listener, is reset, or answered with an ICMP error. Datagrams go to
//!   the agent's socket, and what remains of TCP is reset: nobody has that connection.
//!
//! Between them, packets of connections that the agent has taken already are led to their sockets ([`crate::network`]).

use std::io;

use super::sockets::loopback;
use crate::network::nft::{Batch, Family, Header, Hook, Meta, Reject, Rule, Verdict};
use crate::network::{DELIVER_MARK, GROUP};

/// The queue in which first packets of connections wait, and the one for echo requests.
pub(super) const CONNECT_QUEUE: u16 = 20;
pub(super) const ECHO_QUEUE: u16 = 21;

/// What becomes of a packet that was held, as a mark on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Mark {
    /// The agent takes the connection.
    Take = 0x00c0_0001,
    /// Reset it.
    Reset = 0x00c0_0002,
    /// ICMP: host unreachable.
    HostUnreachable = 0x00c0_0003,
    /// ICMP: network unreachable.
    NetworkUnreachable = 0x00c0_0004,
    /// ICMP: administratively prohibited.
    Prohibited = 0x00c0_0005,
}

const TABLE: &str = "coracle-egress";
/// Before and after the kernel's place for changes of routing, where packets of known sockets are marked.
const BEFORE: i32 = -151;
const AFTER: i32 = -149;

/// Ports of the agent's sockets at 127.0.0.1 and ::1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    pub(super) tcp_v4: u16,
    pub(super) tcp_v6: u16,
    pub(super) udp_v4: u16,
    pub(super) udp_v6: u16,
}

/// Puts everything in place in the current network namespace, in the stead of what was there.
pub(super) fn apply(ports: Ports) -> io::Result<()> {
    // Every connection that fails is worth an answer.
    for name in ["ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"] {
        let path = std::path::Path::new("/proc/sys/net").join(name);
        if path.exists()
            && let Err(error) = std::fs::write(path, "0")
        {
            tracing::warn!("setting {name} failed: {error}");
        }
    }
    match rules(ports, queue).commit() {
        // Kernels without the expression for it have the older extension.
        Err(error) if error.kind() == io::ErrorKind::NotFound => rules(ports, queue_extension).commit(),
        result => result,
    }
}

fn rules(ports: Ports, queue: fn(Rule, u16) -> Rule) -> Batch {
    let batch = Batch::new_table(Family::Inet, TABLE)
        .chain("hold", "filter", Hook::Prerouting, BEFORE)
        .chain("steer", "filter", Hook::Prerouting, AFTER);
    let batch = hold(queue).into_iter().fold(batch, |batch, rule| batch.rule("hold", rule));
    steer(ports).into_iter().fold(batch, |batch, rule| batch.rule("steer", rule))
}

/// Containers' packets of a protocol; those of networks that no way leads out of are others.
fn from_containers(protocol: i32) -> Rule {
    Rule::new().meta_is(Meta::InGroup, &GROUP.to_ne_bytes()).meta_is(Meta::Protocol, &[protocol as u8])
}

fn hold(queue: fn(Rule, u16) -> Rule) -> [Rule; 3] {
    const SYN: u8 = 0x02;
    /// SYN, RST, FIN and ACK.
    const FLAGS: u8 = 0x17;
    const FLAGS_AT: u32 = 13;
    let syn = from_containers(libc::IPPROTO_TCP).bits_are(Header::Transport, FLAGS_AT, FLAGS, SYN);
    let echo = |protocol, kind: u8| from_containers(protocol).bytes_are(Header::Transport, 0, &[kind]);
    [
        queue(syn.goes_nowhere(), CONNECT_QUEUE),
        queue(echo(libc::IPPROTO_ICMP, 8).goes_nowhere(), ECHO_QUEUE),
        queue(echo(libc::IPPROTO_ICMPV6, 128).goes_nowhere(), ECHO_QUEUE),
    ]
}

fn steer(ports: Ports) -> Vec<Rule> {
    let marked = |mark: u32| Rule::new().meta_is(Meta::Mark, &mark.to_ne_bytes());
    let fate = |mark: Mark, with| marked(mark as u32).reject(with);
    let lead = |rule: Rule, v6: bool, port: u16| {
        rule.lead_to(loopback(v6), port).set_mark(DELIVER_MARK).verdict(Verdict::Accept)
    };
    let taken = || from_containers(libc::IPPROTO_TCP).meta_is(Meta::Mark, &(Mark::Take as u32).to_ne_bytes());
    let datagram = || from_containers(libc::IPPROTO_UDP).goes_nowhere();
    vec![
        marked(DELIVER_MARK).verdict(Verdict::Accept),
        lead(taken(), false, ports.tcp_v4),
        lead(taken(), true, ports.tcp_v6),
        fate(Mark::Reset, Reject::Reset),
        fate(Mark::HostUnreachable, Reject::NoHost),
        fate(Mark::NetworkUnreachable, Reject::NoRoute),
        fate(Mark::Prohibited, Reject::Prohibited),
        lead(datagram(), false, ports.udp_v4),
        lead(datagram(), true, ports.udp_v6),
        from_containers(libc::IPPROTO_TCP).goes_nowhere().reject(Reject::Reset),
    ]
}

fn queue(rule: Rule, number: u16) -> Rule {
    rule.expression("queue", |data| data.with(1, number.to_be_bytes()).with(2, 1_u16.to_be_bytes()))
}

/// The same by the extension of x_tables (linux/netfilter/xt_NFQUEUE.h, revision 0).
fn queue_extension(rule: Rule, number: u16) -> Rule {
    rule.expression("target", |data| {
        let info = [number.to_ne_bytes(), [0; 2], [0; 2], [0; 2]].concat();
        data.with_text(1, "NFQUEUE").with(2, 0_u32.to_be_bytes()).with(3, info)
    })
}
