//! Which addresses a network has, and which of them is given next. Pure: who holds what is told by the caller.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use coracle_agent_api::{
    NetworkId,
    egress::{HOST_V4, HOST_V6},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The addresses of one family that a network has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pool {
    pub(crate) subnet: IpNet,
    /// Only these are given to containers.
    #[serde(default)]
    pub(crate) range: Option<IpNet>,
    /// The guest's own.
    pub(crate) gateway: IpAddr,
    /// Addresses that are someone else's, by what they are called.
    #[serde(default)]
    pub(crate) auxiliary: BTreeMap<String, IpAddr>,
    /// A client chose the subnet; then a client may choose addresses in it too.
    #[serde(default)]
    pub(crate) chosen: bool,
}

impl Pool {
    /// One in which the first address is the guest's.
    pub(crate) fn new(subnet: IpNet) -> Self {
        let gateway = first_of(subnet);
        Self { subnet, range: None, gateway, auxiliary: BTreeMap::new(), chosen: false }
    }

    /// The gateway's address with the subnet's prefix.
    pub(crate) fn gateway_net(&self) -> IpNet {
        self.with_prefix(self.gateway)
    }

    /// An address with the subnet's prefix.
    pub(crate) fn with_prefix(&self, address: IpAddr) -> IpNet {
        IpNet::new(address, self.subnet.prefix_len()).expect("the address is of the subnet's family")
    }

    /// Whether it can be someone's: it is in the subnet, and neither the subnet itself, nor its broadcast address, nor the
    /// gateway's, nor kept aside.
    pub(crate) fn may_be_given(&self, address: &IpAddr) -> bool {
        self.subnet.contains(address)
            && is_host(&self.subnet, address)
            && *address != self.gateway
            && !self.auxiliary.values().any(|kept| kept == address)
    }

    /// The lowest address that is not taken.
    pub(crate) fn lowest_free(&self, taken: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
        let from = self.range.unwrap_or(self.subnet);
        let (first, last) = (number(from.network()), number(last_of(from)));
        let mut next = first;
        loop {
            let address = address(next, from);
            if self.may_be_given(&address) && !taken(&address) {
                return Some(address);
            }
            if next == last {
                return None;
            }
            next += 1;
        }
    }
}

fn last_of(net: IpNet) -> IpAddr {
    net.broadcast()
}

/// The first address that someone can have.
pub(crate) fn first_of(net: IpNet) -> IpAddr {
    let network = net.network();
    if is_host(&net, &network) { network } else { address(number(network) + 1, net) }
}

/// Whether someone can have an address of a subnet.
pub(crate) fn is_host(net: &IpNet, address: &IpAddr) -> bool {
    match net {
        IpNet::V4(net) if net.prefix_len() < 31 => *address != net.network() && *address != net.broadcast(),
        // The first address is that of any router (RFC 4291, 2.6.1).
        IpNet::V6(net) if net.prefix_len() < 127 => *address != net.network(),
        _ => true,
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn address(number: u128, family: IpNet) -> IpAddr {
    match family {
        IpNet::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => Ipv6Addr::from(number).into(),
    }
}

/// The address in a subnet by which containers know the host: what is sent to it must not stay on a network.
pub(crate) fn hosts_own(net: &IpNet) -> Option<IpAddr> {
    [HOST_V4.into(), HOST_V6.into()].into_iter().find(|own| net.contains(own))
}

/// Whether two subnets have an address in common.
pub(crate) fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

/// A subnet for a network that asked for none: those that Docker takes, 172.17.0.0/16 to 172.31.0.0/16, then 192.168.0.0/20 and on.
pub(crate) fn next_ipv4(taken: impl Fn(&IpNet) -> bool) -> Option<IpNet> {
    let large = (17..=31).map(|second| Ipv4Net::new(Ipv4Addr::new(172, second, 0, 0), 16));
    let small = (0..16).map(|part| Ipv4Net::new(Ipv4Addr::new(192, 168, part * 16, 0), 20));
    large.chain(small).flatten().map(IpNet::V4).find(|net| !taken(net))
}

/// The same for IPv6: of the 65,536 subnets of this engine's own site (RFC 4193), which is made from the id of its default network.
pub(crate) fn next_ipv6(engine: &NetworkId, taken: impl Fn(&IpNet) -> bool) -> Option<IpNet> {
    let site = u64::from_str_radix(engine.as_str().get(..10)?, 16).ok()?;
    let site = (0xfd_u128 << 120) | (u128::from(site) << 80);
    let subnet = |number: u128| Ipv6Net::new(Ipv6Addr::from(site | (number << 64)), 64);
    (0..=0xffff).filter_map(|number| subnet(number).ok()).map(IpNet::V6).find(|net| !taken(net))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(subnet: &str) -> Pool {
        Pool::new(subnet.parse().unwrap())
    }

    #[test]
    fn addresses_are_given_from_the_lowest() {
        for (subnet, gateway, first) in [
            ("172.17.0.0/16", "172.17.0.1", Some("172.17.0.2")),
            ("10.0.0.0/30", "10.0.0.1", Some("10.0.0.2")),
            ("10.0.0.0/31", "10.0.0.0", Some("10.0.0.1")),
            ("10.0.0.7/32", "10.0.0.7", None),
            ("fd00::/64", "fd00::1", Some("fd00::2")),
            ("0.0.0.0/0", "0.0.0.1", Some("0.0.0.2")),
        ] {
            let pool = pool(subnet);
            assert_eq!(pool.gateway.to_string(), gateway, "{subnet}");
            let free = pool.lowest_free(|_| false).map(|address| address.to_string());
            assert_eq!(free.as_deref(), first, "{subnet}");
        }
    }

    #[test]
    fn a_full_pool_gives_nothing_and_what_is_kept_is_not_given() {
        let mut pool = pool("10.0.0.0/29");
        pool.auxiliary.insert("router".to_owned(), "10.0.0.3".parse().unwrap());
        pool.range = Some("10.0.0.0/30".parse().unwrap());
        let two: IpAddr = "10.0.0.2".parse().unwrap();
        assert_eq!(pool.lowest_free(|_| false), Some(two));
        assert_eq!(pool.lowest_free(|address| *address == two), None);
    }

    #[test]
    fn subnets_of_ones_own_do_not_overlap() {
        let mut taken: Vec<IpNet> = vec!["172.18.0.0/20".parse().unwrap()];
        while let Some(next) = next_ipv4(|net| taken.iter().any(|other| overlap(net, other))) {
            taken.push(next);
        }
        assert_eq!(taken.len(), 31);
        assert_eq!(taken[1].to_string(), "172.17.0.0/16");
        assert_eq!(taken[2].to_string(), "172.19.0.0/16");
        let engine: NetworkId = "0123456789abcdef".repeat(4).parse().unwrap();
        assert_eq!(next_ipv6(&engine, |_| false).unwrap().to_string(), "fd01:2345:6789::/64");
        let first = next_ipv6(&engine, |_| false).unwrap();
        assert_eq!(next_ipv6(&engine, |net| *net == first).unwrap().to_string(), "fd01:2345:6789:1::/64");
    }

    proptest! {
        #[test]
        fn what_is_given_is_in_the_subnet_and_free(number: u32, prefix in 8u8..=32, taken in 0u32..40) {
            let pool = Pool::new(IpNet::V4(Ipv4Net::new(number.into(), prefix).unwrap().trunc()));
            let mut given: Vec<IpAddr> = Vec::new();
            for _ in 0..taken {
                let Some(next) = pool.lowest_free(|address| given.contains(address)) else { break };
                prop_assert!(pool.subnet.contains(&next) && !given.contains(&next) && next != pool.gateway);
                given.push(next);
            }
        }
    }
}
