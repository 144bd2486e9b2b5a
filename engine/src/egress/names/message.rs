//! As much of DNS messages (RFC 1035, section 4) as it takes to know what is asked, and to answer for the hosts file. Every byte
//! of a question is chosen by a container.

use std::net::IpAddr;

const HEADER_LEN: usize = 12;
const MAX_NAME: usize = 255;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Addresses of the hosts file are asked for again soon: the file may change.
const TTL: u32 = 5;

/// What a message asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// In lower case, labels with dots between them, none at the end.
    pub(super) name: String,
    kind: u16,
    class: u16,
    /// Where the question ends in the message.
    end: usize,
}

/// The one question of a message; `None` if there are more or it is malformed, or has bytes in its name that no name has.
pub(super) fn question(message: &[u8]) -> Option<Question> {
    let header = message.first_chunk::<HEADER_LEN>()?;
    let is_query = header[2] & 0xf8 == 0;
    if !is_query || header[4..6] != [0, 1] {
        return None;
    }
    let mut name = String::new();
    let mut at = HEADER_LEN;
    loop {
        let len = usize::from(*message.get(at)?);
        let label = message.get(at + 1..at + 1 + len)?;
        at += 1 + len;
        if len == 0 {
            break;
        }
        // Longer ones would be pointers, which no question needs.
        if len > 63 || name.len() + len + 1 > MAX_NAME || !label.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
    }
    let [k0, k1, c0, c1] = *message.get(at..)?.first_chunk::<4>()?;
    let (kind, class) = (u16::from_be_bytes([k0, k1]), u16::from_be_bytes([c0, c1]));
    Some(Question { name, kind, class, end: at + 4 })
}

/// The answer that a name has these addresses: those of the family that is asked for, perhaps none.
pub(super) fn answer(message: &[u8], question: &Question, addresses: &[IpAddr]) -> Vec<u8> {
    let wanted = |ip: &&IpAddr| {
        question.class == CLASS_IN
            && match ip {
                IpAddr::V4(_) => question.kind == TYPE_A,
                IpAddr::V6(_) => question.kind == TYPE_AAAA,
            }
    };
    let records: Vec<_> = addresses.iter().filter(wanted).take(16).collect();
    let mut answer = message.get(..question.end).unwrap_or_default().to_vec();
    let recursion_desired = message.get(2).map_or(0, |flags| flags & 1);
    // A response, authoritative for nothing, with recursion available; no error.
    let counts = [0x80 | recursion_desired, 0x80, 0, 1, 0, records.len() as u8, 0, 0, 0, 0];
    answer[2..HEADER_LEN].copy_from_slice(&counts);
    for ip in records {
        answer.extend([0xc0, HEADER_LEN as u8]);
        answer.extend(question.kind.to_be_bytes());
        answer.extend(CLASS_IN.to_be_bytes());
        answer.extend(TTL.to_be_bytes());
        let octets = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        answer.extend((octets.len() as u16).to_be_bytes());
        answer.extend(octets);
    }
    answer
}

/// The addresses in an answer and their times to live, as far as it can be read.
pub(super) fn addresses(answer: &[u8]) -> Vec<(IpAddr, u32)> {
    let mut found = Vec::new();
    let Some(header) = answer.first_chunk::<HEADER_LEN>() else { return found };
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let mut at = HEADER_LEN;
    for _ in 0..count(4) {
        let Some(end) = name_end(answer, at) else { return found };
        at = end + 4;
    }
    for _ in 0..count(6) {
        let Some((address, end)) = record(answer, at) else { break };
        found.extend(address);
        at = end;
    }
    found
}

/// The record at a place: its address, if it is of one, and where it ends.
fn record(answer: &[u8], at: usize) -> Option<(Option<(IpAddr, u32)>, usize)> {
    let start = name_end(answer, at)?;
    let [k0, k1, c0, c1, t0, t1, t2, t3, l0, l1] = *answer.get(start..)?.first_chunk::<10>()?;
    let data = start + 10;
    let end = data + usize::from(u16::from_be_bytes([l0, l1]));
    let data = answer.get(data..end)?;
    let ip = match (u16::from_be_bytes([k0, k1]), u16::from_be_bytes([c0, c1])) {
        (TYPE_A, CLASS_IN) => <[u8; 4]>::try_from(data).ok().map(IpAddr::from),
        (TYPE_AAAA, CLASS_IN) => <[u8; 16]>::try_from(data).ok().map(IpAddr::from),
        _ => None,
    };
    Some((ip.map(|ip| (ip, u32::from_be_bytes([t0, t1, t2, t3]))), end))
}

/// Where a name ends, which may end with a pointer to another place.
fn name_end(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            len @ 1..=63 => at += 1 + usize::from(len),
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

/// Whether this is an answer to that message; and whether a further server should be asked, as the host's resolver does.
pub(super) fn answers(answer: &[u8], message: &[u8]) -> Option<Worth> {
    let (head, asked) = (answer.first_chunk::<HEADER_LEN>()?, message.first_chunk::<HEADER_LEN>()?);
    if head[..2] != asked[..2] || head[2] & 0x80 == 0 {
        return None;
    }
    const SERVER_FAILURE: u8 = 2;
    const NOT_IMPLEMENTED: u8 = 4;
    const REFUSED: u8 = 5;
    match head[3] & 0x0f {
        SERVER_FAILURE | NOT_IMPLEMENTED | REFUSED => Some(Worth::Last),
        _ => Some(Worth::Final),
    }
}

/// What an answer is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Worth {
    /// It is the answer.
    Final,
    /// It is the answer if no other server has a better one.
    Last,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message
    }

    #[test]
    fn a_question_is_read_and_answered() {
        let message = query("Db.Example", TYPE_A);
        let asked = question(&message).unwrap();
        assert_eq!(asked.name, "db.example");
        let addresses =
            ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap(), "10.0.0.2".parse().unwrap()];
        let reply = answer(&message, &asked, &addresses);
        assert_eq!(reply[..12], [0xab, 0xcd, 0x81, 0x80, 0, 1, 0, 2, 0, 0, 0, 0]);
        assert!(reply.ends_with(&[0, 4, 10, 0, 0, 2]));
        assert_eq!(answers(&reply, &message), Some(Worth::Final));
        let told: Vec<_> = [addresses[0], addresses[2]].map(|ip| (ip, TTL)).to_vec();
        assert_eq!(super::addresses(&reply), told);
        let other = query("db.example", 16);
        let none = answer(&other, &question(&other).unwrap(), &addresses);
        assert_eq!((none.len(), none[7]), (other.len(), 0));
    }

    #[test]
    fn what_is_no_answer_is_not_taken_for_one() {
        let message = query("a", TYPE_A);
        assert_eq!(answers(&message, &message), None, "a question");
        let mut reply = answer(&message, &question(&message).unwrap(), &[]);
        reply[3] |= 2;
        assert_eq!(answers(&reply, &message), Some(Worth::Last));
        reply[0] ^= 1;
        assert_eq!(answers(&reply, &message), None, "another one's answer");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_question_or_none(message in proptest::collection::vec(any::<u8>(), 0..80), name in "[a-z.]{0,20}") {
            for message in [message, query(&name, TYPE_A)] {
                if let Some(asked) = question(&message) {
                    prop_assert!(answer(&message, &asked, &["10.0.0.1".parse().unwrap()]).len() >= 12);
                }
                let _ = answers(&message, &message);
                let _ = super::addresses(&message);
            }
        }
    }
}
