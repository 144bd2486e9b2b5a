//! The host's `resolv.conf` and hosts file (resolver(5), hosts(5)).

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::io::AsyncReadExt;

/// Files of the host are the person's own; a limit keeps a mistake small.
const MOST: u64 = 4 * 1024 * 1024;
const PORT: u16 = 53;
/// As many as the host's resolver asks.
const MOST_SERVERS: usize = 3;

/// Where the host's resolver has its files.
#[derive(Debug, Clone)]
pub struct HostFiles {
    /// Its name servers.
    pub resolv_conf: PathBuf,
    /// Names with fixed addresses.
    pub hosts: PathBuf,
}

impl Default for HostFiles {
    fn default() -> Self {
        Self { resolv_conf: "/etc/resolv.conf".into(), hosts: "/etc/hosts".into() }
    }
}

/// Whom to ask, and how patiently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Servers {
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) timeout: Duration,
    pub(super) attempts: u32,
}

impl HostFiles {
    /// What the host's resolver is told.
    pub(crate) async fn read_resolv_conf(&self) -> String {
        read(&self.resolv_conf).await
    }
}

/// Reads a file; one that cannot be read is empty, as for the host's resolver.
pub(super) async fn read(path: &Path) -> String {
    let read = async {
        let mut bytes = Vec::new();
        tokio::fs::File::open(path).await?.take(MOST).read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    read.await.unwrap_or_default()
}

/// What `resolv.conf` says.
pub(super) fn servers(text: &str) -> Servers {
    let mut servers = Servers { addresses: Vec::new(), timeout: Duration::from_secs(5), attempts: 2 };
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                servers.addresses.extend(address.map(|ip| SocketAddr::new(ip, PORT)));
            }
            Some("options") => words.for_each(|word| match word.split_once(':') {
                Some(("timeout", number)) => {
                    let seconds = number.parse().unwrap_or(5_u64).clamp(1, 30);
                    servers.timeout = Duration::from_secs(seconds);
                }
                Some(("attempts", number)) => servers.attempts = number.parse().unwrap_or(2_u32).clamp(1, 5),
                _ => {}
            }),
            _ => {}
        }
    }
    servers.addresses.truncate(MOST_SERVERS);
    if servers.addresses.is_empty() {
        servers.addresses.push((Ipv4Addr::LOCALHOST, PORT).into());
    }
    servers
}

/// The addresses that a hosts file gives a name, which is in lower case.
pub(super) fn addresses(text: &str, name: &str) -> Vec<IpAddr> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let found = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_resolver_reads_them() {
        let text = "# made by hand\nnameserver 10.0.0.53\noptions timeout:2 attempts:4 ndots:1\nnameserver fd00::53\n\
                    nameserver what\nsearch example\n";
        let read = servers(text);
        let expected: [SocketAddr; 2] = ["10.0.0.53:53".parse().unwrap(), "[fd00::53]:53".parse().unwrap()];
        assert_eq!(read.addresses, expected);
        assert_eq!((read.timeout, read.attempts), (Duration::from_secs(2), 4));
        assert_eq!(servers("").addresses, ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn names_of_the_hosts_file_are_found() {
        let text =
            "127.0.0.1 localhost\n10.0.0.7\tShip ship.example # the big one\n# 10.0.0.8 ship\nfd00::7 ship\n";
        let all: Vec<IpAddr> = vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        assert_eq!(addresses(text, "ship"), all);
        assert_eq!(addresses(text, "ship.example"), all[..1]);
        assert!(addresses(text, "boat").is_empty());
    }
}
