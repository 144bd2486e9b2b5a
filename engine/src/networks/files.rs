//! `/etc/hosts` and `/etc/resolv.conf` of containers, as Docker writes them.

use std::fmt::Write;

use crate::{
    container::{options, record::Record},
    error::Result,
};

const LOCAL: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n";

/// `/etc/hosts`: loopback, what the client added, links (address and names), and the container itself.
pub(crate) fn hosts(record: &Record, links: &[(String, String)]) -> Result<String> {
    let (config, host) = (&record.config, &record.host_config);
    let mut hosts = String::from(LOCAL);
    for extra in &host.extra_hosts {
        hosts.push_str(&options::hosts_line(extra, &[])?);
    }
    for (address, names) in links {
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
