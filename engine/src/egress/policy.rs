//! Where a container may connect to: what its label [`LABEL`] says.
//!
//! - `all`, or no label: everywhere that [`super::reach`] leads.
//! - `none`: nowhere, and no name is asked for it.
//! - A list with commas: networks (`10.0.0.0/8`, `2001:db8::/32`, or one address), names (`example.com`), and names below a
//!   name (`*.example.com`). A name allows the addresses that it had when the container asked for it, for as long as the answer
//!   was good and a while longer; names that are not listed are not asked for.
//!
//! A container is known by the address that its packets come from, within its own networks' bridges. One that may send packets
//! of any kind (CAP_NET_RAW) can lie about that to the others on its bridge; `--cap-drop NET_RAW` takes that away.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use crate::error::{Error, Result};

/// The label of containers (and of images, for the containers made of them).
pub(crate) const LABEL: &str = "coracle.egress";
/// Words in a list.
const MOST_WORDS: usize = 256;
/// Addresses that are remembered for one container.
const MOST_LEARNT: usize = 4096;
/// Programs keep an address for longer than they should.
const GRACE: Duration = Duration::from_secs(300);
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Policy {
    All,
    None,
    List(Vec<Allowed>),
}

/// An element of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Allowed {
    Network(IpNet),
    Name(String),
    /// Everything that ends with this; it begins with a dot.
    Below(String),
}

impl Policy {
    /// What a container's labels say.
    ///
    /// # Errors
    /// If the label's value is none of the three forms.
    pub(crate) fn of<'a>(mut labels: impl Iterator<Item = (&'a String, &'a String)>) -> Result<Self> {
        labels.find(|(name, _)| *name == LABEL).map_or(Ok(Self::All), |(_, value)| Self::parse(value))
    }

    fn parse(text: &str) -> Result<Self> {
        match text.trim() {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let words: Vec<_> = text.split(',').map(str::trim).collect();
        if words.len() > MOST_WORDS {
            return Err(Error::invalid(format!("the label {LABEL} has more than {MOST_WORDS} elements")));
        }
        words.into_iter().map(Allowed::parse).collect::<Result<_>>().map(Self::List)
    }

    /// Whether a name may be asked for; it is in lower case.
    pub(super) fn allows_name(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::List(all) => all.iter().any(|allowed| match allowed {
                Allowed::Network(_) => false,
                Allowed::Name(own) => own == name,
                Allowed::Below(end) => name.len() > end.len() && name.ends_with(end.as_str()),
            }),
        }
    }

    fn allows_address(&self, ip: IpAddr) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::List(all) => all.iter().any(|allowed| match allowed {
                Allowed::Network(network) => network.contains(&ip),
                _ => false,
            }),
        }
    }
}

impl Allowed {
    fn parse(word: &str) -> Result<Self> {
        if let Ok(network) = word.parse::<IpNet>() {
            return Ok(Self::Network(network.trunc()));
        }
        if let Ok(ip) = word.parse::<IpAddr>() {
            return Ok(Self::Network(ip.into()));
        }
        let name = word.trim_end_matches('.').to_ascii_lowercase();
        let (below, name) = match name.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, name.as_str()),
        };
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        // What has only digits and dots was meant as an address.
        let is_address = name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        if name.len() > 253 || is_address || !name.split('.').all(is_label) {
            let shown: String = word.chars().take(100).collect();
            return Err(Error::invalid(format!(
                "invalid element '{shown}' in the label {LABEL}: expected `all`, `none`, or a list of names \
                 (example.com, *.example.com) and networks (10.0.0.0/8) with commas between them"
            )));
        }
        Ok(if below { Self::Below(format!(".{name}")) } else { Self::Name(name.to_owned()) })
    }
}

/// The addresses that one container was told for the names that its policy lists.
#[derive(Debug, Default)]
pub(super) struct Learnt(HashMap<IpAddr, (String, Instant)>);

impl Learnt {
    /// An answer was given: the name has these addresses, for so many seconds.
    pub(super) fn learn(&mut self, name: &str, addresses: &[(IpAddr, u32)], now: Instant) {
        for (ip, ttl) in addresses {
            if self.0.len() >= MOST_LEARNT {
                self.0.retain(|_, (_, until)| *until > now);
            }
            if self.0.len() >= MOST_LEARNT && !self.0.contains_key(ip) {
                return;
            }
            let good = Duration::from_secs((*ttl).into()).saturating_add(GRACE).min(LONGEST);
            self.0.insert(*ip, (name.to_owned(), now + good));
        }
    }

    /// Whether a policy allows an address; and the name by which, if it was by a name.
    pub(super) fn allows(&self, policy: &Policy, ip: IpAddr, now: Instant) -> (bool, Option<&str>) {
        let name = self.0.get(&ip).filter(|(_, until)| *until > now).map(|(name, _)| name.as_str());
        let by_name = name.is_some_and(|name| policy.allows_name(name));
        (by_name || policy.allows_address(ip), name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn labels_have_three_forms() {
        assert_eq!(Policy::parse("all").unwrap(), Policy::All);
        assert_eq!(Policy::parse(" none ").unwrap(), Policy::None);
        let list = Policy::parse("10.0.0.0/8, Example.COM.,*.ships.example,2001:db8::1").unwrap();
        let expected = vec![
            Allowed::Network("10.0.0.0/8".parse().unwrap()),
            Allowed::Name("example.com".to_owned()),
            Allowed::Below(".ships.example".to_owned()),
            Allowed::Network("2001:db8::1/128".parse().unwrap()),
        ];
        assert_eq!(list, Policy::List(expected));
        for bad in ["", "a,,b", "10.0.0.0/33", "10.0.0", "*", "*.*.com", "ex ample", "a..b", "http://x/"] {
            assert!(Policy::parse(bad).is_err(), "{bad}");
        }
        let labels = HashMap::from([(LABEL.to_owned(), "none".to_owned())]);
        assert_eq!(Policy::of(labels.iter()).unwrap(), Policy::None);
        assert_eq!(Policy::of(HashMap::new().iter()).unwrap(), Policy::All);
    }

    #[test]
    fn a_name_allows_what_it_was_answered_with_for_a_while() {
        let policy = Policy::parse("example.com,*.ships.example,10.0.0.0/8").unwrap();
        let (mut learnt, now) = (Learnt::default(), Instant::now());
        assert!(policy.allows_name("old.ships.example") && policy.allows_name("example.com"));
        assert!(!policy.allows_name("ships.example") && !policy.allows_name("evil-example.com"));
        assert!(!learnt.allows(&policy, ip("192.0.2.1"), now).0);
        learnt.learn("example.com", &[(ip("192.0.2.1"), 60)], now);
        assert_eq!(learnt.allows(&policy, ip("192.0.2.1"), now), (true, Some("example.com")));
        assert!(!learnt.allows(&policy, ip("192.0.2.1"), now + GRACE + Duration::from_secs(61)).0);
        assert!(learnt.allows(&policy, ip("10.2.3.4"), now).0);
        assert!(!learnt.allows(&Policy::None, ip("192.0.2.1"), now).0);
        assert!(learnt.allows(&Policy::All, ip("192.0.2.9"), now).0);
    }

    #[test]
    fn what_is_learnt_is_bounded() {
        let (mut learnt, now) = (Learnt::default(), Instant::now());
        let all: Vec<_> = (0..6000_u32).map(|n| (IpAddr::from(n.to_be_bytes()), 60)).collect();
        learnt.learn("example.com", &all, now);
        assert_eq!(learnt.0.len(), MOST_LEARNT);
        learnt.learn("example.com", &all[5000..5001], now + LONGEST);
        assert_eq!(learnt.0.len(), 1);
    }
}
