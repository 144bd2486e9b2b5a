//! `/etc/hosts` and `/etc/resolv.conf` of containers, as Docker writes them.

use std::{fmt::Write, net::IpAddr};

use coracle_agent_api::egress::{HOST_V4, HOST_V6};

use super::links::Link;
use crate::{
    container::{config::HostConfig, options, record::Record},
    error::{Error, Result},
};

const LOCAL: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n";

/// `/etc/hosts`: loopback, what the client added, links (address and names), and the container itself.
pub(crate) fn hosts(record: &Record, links: &[Link]) -> Result<String> {
    let (config, host) = (&record.config, &record.host_config);
    let mut hosts = String::from(LOCAL);
    for extra in &host.extra_hosts {
        hosts.push_str(&options::hosts_line(extra, &[HOST_V4.into(), HOST_V6.into()])?);
    }
    for Link { address, names, .. } in links {
        // Writing to a string does not fail.
        let _ = writeln!(hosts, "{address}\t{names}");
    }
    let name = &config.hostname;
    let own = match config.domainname.as_str() {
        "" => name.clone(),
        domain => format!("{name}.{domain} {name}"),
    };
    let leases = record.networks.values().filter_map(|attached| attached.lease.as_ref());
    let addresses: Vec<_> = leases.flat_map(|lease| &lease.addresses).map(|net| net.addr()).collect();
    for address in &addresses {
        let _ = writeln!(hosts, "{address}\t{own}");
    }
    if addresses.is_empty() && host.network_mode != "none" {
        let _ = writeln!(hosts, "127.0.1.1\t{own}");
    }
    Ok(hosts)
}

/// `/etc/resolv.conf`: the name server in the container's own namespace, and how names are completed; `search` are the domains in
/// which the host itself looks names up.
pub(crate) fn resolv_conf(record: &Record, search: &[String]) -> String {
    let host = &record.host_config;
    if host.network_mode == "none" {
        return "# This container has a loopback interface only: there is no one to ask.\n".to_owned();
    }
    let mut text = String::from(
        "# Made by Coracle: the name server knows containers, and asks the host for all else.\nnameserver 127.0.0.11\n",
    );
    let search = match host.dns_search.is_empty() {
        true => search.to_vec(),
        // As in Docker, a dot means none.
        false => host.dns_search.iter().filter(|domain| *domain != ".").cloned().collect(),
    };
    if !search.is_empty() {
        let _ = writeln!(text, "search {}", search.join(" "));
    }
    let mut options = host.dns_options.clone();
    if !options.iter().any(|option| option.starts_with("ndots:")) {
        options.push("ndots:0".to_owned());
    }
    let _ = writeln!(text, "options {}", options.join(" "));
    text
}

/// The domains in which the host itself looks names up; the last line of its resolv.conf(5) counts.
pub(crate) fn host_search(file: &str) -> Vec<String> {
    let words = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        matches!(words.next(), Some("search" | "domain")).then(|| words.map(str::to_owned).collect())
    };
    let domains: Vec<String> = file.lines().filter_map(words).next_back().unwrap_or_default();
    domains.into_iter().filter(|domain| domain != ".").collect()
}

/// Checks `--dns`, `--dns-search` and `--dns-option`: they become lines of a file.
pub(crate) fn check(host: &HostConfig) -> Result<()> {
    name_servers(host)?;
    for (option, words) in [("dns-search", &host.dns_search), ("dns-option", &host.dns_options)] {
        let bad = |word: &&String| word.is_empty() || !word.bytes().all(|b| b.is_ascii_graphic());
        if let Some(bad) = words.iter().find(bad) {
            let shown: String = bad.chars().take(80).collect();
            return Err(Error::invalid(format!("invalid --{option}: {shown:?}")));
        }
    }
    Ok(())
}

/// Converts `--dns`.
pub(crate) fn name_servers(host: &HostConfig) -> Result<Vec<IpAddr>> {
    let parse = |text: &String| {
        let shown: String = text.chars().take(80).collect();
        text.parse().map_err(|_| Error::invalid(format!("invalid --dns: {shown:?} is no IP address")))
    };
    host.dns.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_domains_are_those_of_the_last_line() {
        for (file, domains) in [
            ("", &[][..]),
            ("nameserver 1.2.3.4\nsearch a.b c.d\n", &["a.b", "c.d"]),
            ("domain x\nsearch y\n#search z\n", &["y"]),
            ("search .\n", &[]),
        ] {
            assert_eq!(host_search(file), domains, "{file:?}");
        }
    }
}
