//! The packet filter, spoken to without tools: tables, chains and rules as nf_tables takes them over netlink
//! (include/uapi/linux/netfilter/nf_tables.h). A change is one transaction: the kernel takes all of it or nothing.

use std::io;
use std::net::IpAddr;

use super::netlink::{APPEND, CREATE, Message, Socket};

const SUBSYSTEM: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8;
const BEGIN: u16 = libc::NFNL_MSG_BATCH_BEGIN as u16;
const END: u16 = libc::NFNL_MSG_BATCH_END as u16;
const NEW_TABLE: u16 = SUBSYSTEM | libc::NFT_MSG_NEWTABLE as u16;
const DELETE_TABLE: u16 = SUBSYSTEM | libc::NFT_MSG_DELTABLE as u16;
const NEW_CHAIN: u16 = SUBSYSTEM | libc::NFT_MSG_NEWCHAIN as u16;
const NEW_RULE: u16 = SUBSYSTEM | libc::NFT_MSG_NEWRULE as u16;

const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
/// Registers of 16 bytes.
const REGISTER_1: u32 = 1;
const REGISTER_2: u32 = 2;
const VERDICT: u32 = 0;

/// Which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4.
    Ipv4 = 2,
}

/// Where packets come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Hook {
    /// All that come in.
    Prerouting = 0,
    /// Those that are passed on.
    Forward = 2,
    /// Those that processes send.
    Output = 3,
}

/// What can be asked of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Meta {
    /// Its mark; four bytes in the machine's order, as the groups are.
    Mark = 3,
    /// Its protocol above IP; one byte.
    Protocol = 16,
    /// The group of the interface that it came from.
    InGroup = 21,
    /// The group of the interface that it goes to.
    OutGroup = 22,
}

/// Where in a packet bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Header {
    /// Counted from IP's header.
    Network = 1,
    /// Counted from TCP's or UDP's.
    Transport = 2,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Verdict {
    /// It goes no further.
    Drop = 0,
    /// This chain lets it pass.
    Accept = 1,
}

/// How a packet is answered that goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reject {
    /// TCP's reset.
    Reset,
    /// ICMP: network unreachable.
    NoRoute,
    /// ICMP: host unreachable.
    NoHost,
    /// ICMP: administratively prohibited.
    Prohibited,
}

/// A rule: what a packet must be like, step by step, and what is then done with it.
#[derive(Debug, Clone)]
pub(crate) struct Rule(Message);

impl Rule {
    /// One that every packet fits.
    pub(crate) fn new() -> Self {
        Self(Message::list())
    }

    /// What was asked of the packet is this.
    pub(crate) fn meta_is(self, meta: Meta, value: &[u8]) -> Self {
        self.load_meta(meta).compare(value)
    }

    /// The group of an interface, without the bits that are not in the mask.
    pub(crate) fn group_is(self, meta: Meta, mask: u32, value: u32) -> Self {
        self.load_meta(meta).mask(&mask.to_ne_bytes()).compare(&value.to_ne_bytes())
    }

    /// Bytes of the packet are these.
    pub(crate) fn bytes_are(self, header: Header, offset: u32, value: &[u8]) -> Self {
        let len = u32::try_from(value.len()).expect("a register is short");
        self.load_bytes(header, offset, len).compare(value)
    }

    /// Bits of a byte of the packet are these.
    pub(crate) fn bits_are(self, header: Header, offset: u32, mask: u8, value: u8) -> Self {
        self.load_bytes(header, offset, 1).mask(&[mask]).compare(&[value])
    }

    /// The kernel has neither an address nor a route for where it goes.
    pub(crate) fn goes_nowhere(self) -> Self {
        const OUT_INTERFACE: u32 = 1;
        const KIND: u32 = 3;
        let kinds = [libc::RTN_LOCAL, libc::RTN_BROADCAST, libc::RTN_MULTICAST].map(u32::from);
        let rule = self.load_route(KIND);
        let rule = kinds.iter().fold(rule, |rule, kind| rule.differs(&kind.to_ne_bytes()));
        rule.load_route(OUT_INTERFACE).compare(&0_u32.to_ne_bytes())
    }

    /// Leads the packet to a socket of this machine, without changing it.
    pub(crate) fn lead_to(self, address: IpAddr, port: u16) -> Self {
        let (family, octets) = match address {
            IpAddr::V4(address) => (libc::AF_INET as u32, address.octets().to_vec()),
            IpAddr::V6(address) => (libc::AF_INET6 as u32, address.octets().to_vec()),
        };
        self.immediate(REGISTER_1, &octets)
            .immediate(REGISTER_2, &port.to_be_bytes())
            .expression("tproxy", |data| {
                data.with(1, be(family)).with(2, be(REGISTER_1)).with(3, be(REGISTER_2))
            })
    }

    /// Answers the packet in the stead of the other side.
    pub(crate) fn reject(self, with: Reject) -> Self {
        const RESET: u32 = 1;
        const UNREACHABLE: u32 = 2;
        let (kind, code) = match with {
            Reject::Reset => (RESET, 0),
            Reject::NoRoute => (UNREACHABLE, 0),
            Reject::NoHost => (UNREACHABLE, 2),
            Reject::Prohibited => (UNREACHABLE, 3),
        };
        self.expression("reject", |data| data.with(1, be(kind)).with(2, [code]))
    }

    /// There is a socket for it that may have others' addresses.
    pub(crate) fn has_transparent_socket(self) -> Self {
        self.expression("socket", |data| data.with(1, be(0)).with(2, be(REGISTER_1))).compare(&[1])
    }

    /// The socket that it comes from was made by a process of this cgroup, or of one below it: `level` is how far the group is below
    /// the root of the hierarchy.
    pub(crate) fn comes_from_group(self, id: u64, level: u32) -> Self {
        const GROUP: u32 = 3;
        self.expression("socket", |data| data.with(1, be(GROUP)).with(2, be(REGISTER_1)).with(3, be(level)))
            .compare(&id.to_ne_bytes())
    }

    /// Changes a port of the packet: two bytes of UDP's header, with the checksum in it.
    pub(crate) fn set_udp_port(self, offset: u32, port: u16) -> Self {
        const INTERNET_CHECKSUM: u32 = 1;
        const CHECKSUM_AT: u32 = 6;
        self.immediate(REGISTER_1, &port.to_be_bytes()).expression("payload", |data| {
            data.with(2, be(Header::Transport as u32))
                .with(3, be(offset))
                .with(4, be(2))
                .with(5, be(REGISTER_1))
                .with(6, be(INTERNET_CHECKSUM))
                .with(7, be(CHECKSUM_AT))
        })
    }

    /// Marks the packet.
    pub(crate) fn set_mark(self, mark: u32) -> Self {
        let mark_key = Meta::Mark as u32;
        self.immediate(REGISTER_1, &mark.to_ne_bytes())
            .expression("meta", |data| data.with(2, be(mark_key)).with(3, be(REGISTER_1)))
    }

    /// Sends the packet's connection elsewhere.
    pub(crate) fn destination(self, address: IpAddr, port: u16) -> Self {
        let (family, octets) = match address {
            IpAddr::V4(address) => (libc::NFPROTO_IPV4, address.octets().to_vec()),
            IpAddr::V6(address) => (libc::NFPROTO_IPV6, address.octets().to_vec()),
        };
        const DESTINATION: u32 = 1;
        self.immediate(REGISTER_1, &octets).immediate(REGISTER_2, &port.to_be_bytes()).expression(
            "nat",
            |data| {
                data.with(1, be(DESTINATION))
                    .with(2, be(u32::try_from(family).unwrap_or_default()))
                    .with(3, be(REGISTER_1))
                    .with(5, be(REGISTER_2))
            },
        )
    }

    /// The packet's fate.
    pub(crate) fn verdict(self, verdict: Verdict) -> Self {
        let code = (verdict as i32).to_be_bytes();
        self.expression("immediate", |data| {
            data.with(1, be(VERDICT))
                .nest(2, |value| value.nest(DATA_VERDICT, |verdict| verdict.with(VERDICT_CODE, code)))
        })
    }

    /// Any expression: its name, and what fills in its attributes.
    pub(crate) fn expression(self, name: &str, fill: impl FnOnce(Message) -> Message) -> Self {
        Self(self.0.nest(LIST_ELEMENT, |element| {
            element.with_text(EXPRESSION_NAME, name).nest(EXPRESSION_DATA, fill)
        }))
    }

    fn load_bytes(self, header: Header, offset: u32, len: u32) -> Self {
        self.expression("payload", |data| {
            data.with(1, be(REGISTER_1)).with(2, be(header as u32)).with(3, be(offset)).with(4, be(len))
        })
    }

    fn load_route(self, result: u32) -> Self {
        const OF_DESTINATION: u32 = 2;
        self.expression("fib", |data| {
            data.with(1, be(REGISTER_1)).with(2, be(result)).with(3, be(OF_DESTINATION))
        })
    }

    fn load_meta(self, meta: Meta) -> Self {
        self.expression("meta", |data| data.with(1, be(REGISTER_1)).with(2, be(meta as u32)))
    }

    fn compare(self, value: &[u8]) -> Self {
        const EQUAL: u32 = 0;
        self.compare_with(EQUAL, value)
    }

    fn differs(self, value: &[u8]) -> Self {
        const DIFFERENT: u32 = 1;
        self.compare_with(DIFFERENT, value)
    }

    fn compare_with(self, operator: u32, value: &[u8]) -> Self {
        self.expression("cmp", |data| {
            data.with(1, be(REGISTER_1)).with(2, be(operator)).nest(3, |data| data.with(DATA_VALUE, value))
        })
    }

    fn mask(self, mask: &[u8]) -> Self {
        let len = u32::try_from(mask.len()).expect("a register is short");
        let zero = vec![0; mask.len()];
        self.expression("bitwise", |data| {
            data.with(1, be(REGISTER_1))
                .with(2, be(REGISTER_1))
                .with(3, be(len))
                .nest(4, |data| data.with(DATA_VALUE, mask))
                .nest(5, |data| data.with(DATA_VALUE, zero))
        })
    }

    fn immediate(self, register: u32, value: &[u8]) -> Self {
        self.expression("immediate", |data| {
            data.with(1, be(register)).nest(2, |data| data.with(DATA_VALUE, value))
        })
    }
}

fn be(number: u32) -> [u8; 4] {
    number.to_be_bytes()
}

/// A change of the rules of one network namespace.
#[derive(Debug)]
pub(crate) struct Batch {
    family: Family,
    table: String,
    messages: Vec<Message>,
}

impl Batch {
    /// Begins with a table that is empty, whatever it was before.
    pub(crate) fn new_table(family: Family, table: &str) -> Self {
        let mut batch = Self::without_table(family, table);
        batch.messages.push(named(NEW_TABLE, CREATE, family, table));
        batch
    }

    /// Takes a table away, whether it is there or not.
    pub(crate) fn without_table(family: Family, table: &str) -> Self {
        // Made first, because one that is not there cannot be deleted.
        let messages = vec![named(NEW_TABLE, CREATE, family, table), named(DELETE_TABLE, 0, family, table)];
        Self { family, table: table.to_owned(), messages }
    }

    /// Adds a chain that packets come by. `kind` is `filter`, `nat` or `route`; lower priorities come first.
    pub(crate) fn chain(mut self, name: &str, kind: &str, hook: Hook, priority: i32) -> Self {
        let message = Message::new(NEW_CHAIN, CREATE, &header(self.family))
            .with_text(CHAIN_TABLE, &self.table)
            .with_text(CHAIN_NAME, name)
            .nest(CHAIN_HOOK, |list| {
                list.with(HOOK_NUMBER, be(hook as u32)).with(HOOK_PRIORITY, priority.to_be_bytes())
            })
            .with_text(CHAIN_TYPE, kind);
        self.messages.push(message);
        self
    }

    /// Adds a rule at the end of a chain.
    pub(crate) fn rule(mut self, chain: &str, rule: Rule) -> Self {
        let message = Message::new(NEW_RULE, CREATE | APPEND, &header(self.family))
            .with_text(RULE_TABLE, &self.table)
            .with_text(RULE_CHAIN, chain)
            .nest(RULE_EXPRESSIONS, |list| list.raw(rule.0.as_bytes()));
        self.messages.push(message);
        self
    }

    /// Carries it out in the namespace that the calling thread is in.
    pub(crate) fn commit(self) -> io::Result<()> {
        let mut socket = Socket::netfilter()?;
        // For a batch, the subsystem stands where a family's own number would.
        let edge = |kind| Message::new(kind, 0, &[0, 0, 0, libc::NFNL_SUBSYS_NFTABLES as u8]);
        socket.transaction(edge(BEGIN), self.messages, edge(END))
    }
}

fn named(kind: u16, flags: u16, family: Family, table: &str) -> Message {
    Message::new(kind, flags, &header(family)).with_text(TABLE_NAME, table)
}

/// `struct nfgenmsg`.
fn header(family: Family) -> [u8; 4] {
    [family as u8, 0, 0, 0]
}
