//! Which addresses containers reach, and where they lead.
//!
//! Containers reach what a program of the person's own on the host reaches, with these exceptions:
//! - The host's loopback is the host's own. [`HOST_V4`] and [`HOST_V6`] (`host.docker.internal`) stand for it, and only they: a
//!   container that asks for 127.0.0.1 by another way is refused.
//! - Link-local addresses mean something only on one link, and the host has others than the container; among them is the
//!   place where clouds keep a machine's credentials. They are refused.
//! - Multicast and broadcast are refused: one container's packet must not become many.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use coracle_agent_api::egress::{Failure, HOST_V4, HOST_V6};

/// The address to connect to for one that a container asked for.
pub(super) fn reachable(asked: SocketAddr) -> Result<SocketAddr, Failure> {
    let ip = match asked.ip().to_canonical() {
        IpAddr::V4(HOST_V4) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(HOST_V6) => Ipv6Addr::LOCALHOST.into(),
        ip if is_refused(ip) => return Err(Failure::Prohibited),
        ip => ip,
    };
    Ok(SocketAddr::new(ip, asked.port()))
}

/// The host's other loopback address, where what stands for the host is asked for: many services listen at one of the two only, and
/// a client in a container cannot know at which.
pub(super) fn other_loopback(asked: SocketAddr) -> Option<SocketAddr> {
    let ip: IpAddr = match asked.ip().to_canonical() {
        IpAddr::V4(HOST_V4) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(HOST_V6) => Ipv4Addr::LOCALHOST.into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, asked.port()))
}

fn is_refused(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            // 0.0.0.0 is another name of the host itself.
            ip.octets()[0] == 0
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_multicast()
                || ip.is_broadcast()
        }
        IpAddr::V6(ip) => {
            ip.is_unspecified() || ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast()
        }
    }
}

/// What a container is told of an error on the host.
pub(super) fn failure(error: &io::Error) -> Failure {
    use rustix::io::Errno;
    match Errno::from_io_error(error) {
        Some(Errno::CONNREFUSED | Errno::CONNRESET) => Failure::Refused,
        Some(Errno::HOSTUNREACH | Errno::HOSTDOWN) => Failure::HostUnreachable,
        // A host without an IPv6 address of its own says it in its own way.
        Some(Errno::NETUNREACH | Errno::NETDOWN | Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT) => {
            Failure::NetworkUnreachable
        }
        Some(Errno::TIMEDOUT) => Failure::TimedOut,
        Some(Errno::ACCESS | Errno::PERM) => Failure::Prohibited,
        _ => Failure::Exhausted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_for_the_host_stands_for_both_of_its_loopback_addresses() {
        let other = |asked: &str| other_loopback(asked.parse().unwrap()).map(|to| to.to_string());
        assert_eq!(other("192.168.65.254:80").as_deref(), Some("[::1]:80"));
        assert_eq!(other("[fdc4:f303:9324::254]:80").as_deref(), Some("127.0.0.1:80"));
        assert_eq!(other("[::ffff:192.168.65.254]:80").as_deref(), Some("[::1]:80"));
        assert_eq!(other("10.0.0.1:80"), None);
    }

    #[test]
    fn the_hosts_loopback_has_one_name_of_each_kind() {
        let lead = |asked: &str| reachable(asked.parse().unwrap()).map(|to| to.to_string());
        assert_eq!(lead("192.168.65.254:80"), Ok("127.0.0.1:80".to_owned()));
        assert_eq!(lead("[fdc4:f303:9324::254]:80"), Ok("[::1]:80".to_owned()));
        assert_eq!(lead("192.0.2.7:80"), Ok("192.0.2.7:80".to_owned()));
        for refused in [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "169.254.169.254:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "[::]:80",
            "[::1]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:0.0.0.0]:80",
        ] {
            assert_eq!(lead(refused), Err(Failure::Prohibited), "{refused}");
        }
    }
}
