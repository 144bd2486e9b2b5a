//! DNS messages (RFC 1035, 6891), as much of them as the containers' name server needs: the question of a request, and answers to
//! it that are addresses, a name, or nothing. All else goes to another server as it came, and its answer comes back as it is; that is
//! why there is no parser for records here. Requests come from containers: every length is checked.

use std::net::IpAddr;

/// Bytes of a header.
const HEADER: usize = 12;
/// The longest name, as it stands in a message.
const MAX_NAME: usize = 255;
/// What a client takes in a datagram that does not say.
const PLAIN_SIZE: usize = 512;
/// Seconds that a client may keep an answer, as in Docker.
const TTL: u32 = 600;
const CLASS_INTERNET: u16 = 1;
const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
/// Where the question's name is, as a pointer to it.
const POINTER: [u8; 2] = [0xc0, HEADER as u8];
/// What we can send in a datagram.
const OUR_SIZE: u16 = 4096;

/// How an answer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// The answer is in the records, of which there may be none.
    Ok = 0,
    /// The request makes no sense.
    FormatError = 1,
    /// No one could be asked.
    ServerFailure = 2,
    /// This kind of request is not answered here.
    NotImplemented = 4,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// The name of an address.
    Ptr,
    /// Anything else.
    Other,
}

/// A request with one question in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question<'a> {
    request: &'a [u8],
    /// Where the question ends.
    end: usize,
    /// In lower case, without the dot at the end.
    pub name: String,
    pub kind: Kind,
    /// The longest answer that the client takes in a datagram.
    pub size: usize,
    extended: bool,
}

impl<'a> Question<'a> {
    /// Reads a request. What is no request at all is no one's business (`None`); what is a bad one is to be answered.
    pub(crate) fn read(request: &'a [u8]) -> Result<Self, Option<Vec<u8>>> {
        if request.len() < HEADER || request[2] & 0x80 != 0 {
            return Err(None);
        }
        let refuse = |code| Err(Some(bare(request, code)));
        if request[2] & 0x78 != 0 {
            return refuse(Code::NotImplemented);
        }
        let count = |at: usize| u16::from_be_bytes([request[at], request[at + 1]]);
        if count(4) != 1 {
            return refuse(Code::FormatError);
        }
        let Some((name, at)) = name(request, HEADER) else { return refuse(Code::FormatError) };
        let Some(&[a, b, c, d]) = request.get(at..at + 4) else { return refuse(Code::FormatError) };
        let kind = match (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])) {
            (TYPE_A, CLASS_INTERNET) => Kind::A,
            (TYPE_AAAA, CLASS_INTERNET) => Kind::Aaaa,
            (TYPE_PTR, CLASS_INTERNET) => Kind::Ptr,
            _ => Kind::Other,
        };
        let end = at + 4;
        let plain = count(6) == 0 && count(8) == 0 && count(10) > 0;
        let size = if plain { extension(&request[end..]) } else { None };
        Ok(Self {
            request,
            end,
            name,
            kind,
            size: size.map_or(PLAIN_SIZE, |size| usize::from(size).max(PLAIN_SIZE)),
            extended: size.is_some(),
        })
    }

    /// The address whose name is asked for.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        if self.kind != Kind::Ptr {
            return None;
        }
        if let Some(digits) = self.name.strip_suffix(".in-addr.arpa") {
            let parts: Option<Vec<u8>> = digits.split('.').rev().map(|part| part.parse().ok()).collect();
            return Some(IpAddr::from(<[u8; 4]>::try_from(parts?).ok()?));
        }
        let digits = self.name.strip_suffix(".ip6.arpa")?;
        let nibble = |part: &str| if part.len() == 1 { u8::from_str_radix(part, 16).ok() } else { None };
        let nibbles: Option<Vec<u8>> = digits.split('.').rev().map(nibble).collect();
        let bytes: Vec<u8> =
            nibbles?.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&0)).collect();
        (digits.split('.').count() == 32).then_some(())?;
        Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?))
    }

    /// An answer with these addresses, of which those of the wrong family are left out.
    pub(crate) fn addresses(&self, addresses: &[IpAddr]) -> Vec<u8> {
        let records = addresses.iter().filter_map(|address| match (address, self.kind) {
            (IpAddr::V4(address), Kind::A) => Some(record(TYPE_A, &address.octets())),
            (IpAddr::V6(address), Kind::Aaaa) => Some(record(TYPE_AAAA, &address.octets())),
            _ => None,
        });
        self.answer(Code::Ok, records.collect())
    }

    /// An answer with a name.
    pub(crate) fn name_is(&self, name: &str) -> Vec<u8> {
        let mut data = Vec::with_capacity(name.len() + 2);
        for label in name.split('.').filter(|label| !label.is_empty()) {
            let label = &label.as_bytes()[..label.len().min(63)];
            data.push(u8::try_from(label.len()).unwrap_or(63));
            data.extend(label);
        }
        data.push(0);
        self.answer(Code::Ok, vec![record(TYPE_PTR, &data)])
    }

    /// An answer without records.
    pub(crate) fn nothing(&self, code: Code) -> Vec<u8> {
        self.answer(code, Vec::new())
    }

    fn answer(&self, code: Code, records: Vec<Vec<u8>>) -> Vec<u8> {
        let mut answer = bare(self.request, code);
        answer[4..6].copy_from_slice(&1u16.to_be_bytes());
        // More than 65,535 records would not fit into any answer.
        let count = u16::try_from(records.len()).unwrap_or(u16::MAX);
        answer[6..8].copy_from_slice(&count.to_be_bytes());
        answer.extend(&self.request[HEADER..self.end]);
        answer.extend(records.into_iter().take(usize::from(count)).flatten());
        if self.extended {
            answer[10..12].copy_from_slice(&1u16.to_be_bytes());
            answer.push(0);
            answer.extend(TYPE_OPT.to_be_bytes());
            answer.extend(OUR_SIZE.to_be_bytes());
            answer.extend([0; 6]);
        }
        answer
    }

    /// What goes into a datagram: the answer, or its beginning with a word that there is more.
    pub(crate) fn cut(&self, answer: Vec<u8>) -> Vec<u8> {
        if answer.len() <= self.size {
            return answer;
        }
        let mut cut = self.nothing(Code::Ok);
        cut[2] |= 0x02;
        cut
    }
}

/// A header that answers a request, with nothing after it.
fn bare(request: &[u8], code: Code) -> Vec<u8> {
    let mut answer = vec![0; HEADER];
    answer[..2].copy_from_slice(&request[..2]);
    // It is an answer, recursion was asked for if it was, and there is recursion.
    answer[2] = 0x80 | (request[2] & 0x79);
    answer[3] = 0x80 | code as u8;
    answer
}

fn record(kind: u16, data: &[u8]) -> Vec<u8> {
    let mut record = POINTER.to_vec();
    record.extend(kind.to_be_bytes());
    record.extend(CLASS_INTERNET.to_be_bytes());
    record.extend(TTL.to_be_bytes());
    record.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
    record.extend(data);
    record
}

/// A name without pointers, and where it ends.
fn name(message: &[u8], start: usize) -> Option<(String, usize)> {
    let mut text = String::new();
    let mut at = start;
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => break,
            1..=63 => {}
            _ => return None,
        }
        let label = message.get(at..at + len)?;
        at += len;
        if at - start > MAX_NAME {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        // Names of ours have only such bytes; any other is kept from looking like one of ours.
        text.extend(label.iter().map(|b| {
            if b.is_ascii_graphic() && *b != b'.' { b.to_ascii_lowercase() as char } else { '\u{fffd}' }
        }));
    }
    Some((text, at))
}

/// The size in an OPT record, if that is what comes first.
fn extension(rest: &[u8]) -> Option<u16> {
    let [0, a, b, c, d, ..] = rest else { return None };
    (u16::from_be_bytes([*a, *b]) == TYPE_OPT).then_some(u16::from_be_bytes([*c, *d]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(name: &str, kind: u16, further: &[u8]) -> Vec<u8> {
        let mut request = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(!further.is_empty())];
        for label in name.split('.').filter(|label| !label.is_empty()) {
            request.push(label.len() as u8);
            request.extend(label.as_bytes());
        }
        request.extend([0, (kind >> 8) as u8, kind as u8, 0, 1]);
        request.extend(further);
        request
    }

    #[test]
    fn a_question_is_read_and_answered() {
        let request = ask("Web.Example", TYPE_A, &[]);
        let question = Question::read(&request).unwrap();
        assert_eq!((question.name.as_str(), question.kind, question.size), ("web.example", Kind::A, 512));
        let answer = question.addresses(&["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(answer[..12], [0x12, 0x34, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(answer[answer.len() - 16..], [0xc0, 12, 0, 1, 0, 1, 0, 0, 2, 88, 0, 4, 10, 0, 0, 1]);
        let request = ask("web", TYPE_AAAA, &[0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0]);
        let question = Question::read(&request).unwrap();
        assert_eq!((question.kind, question.size), (Kind::Aaaa, 4096));
        assert_eq!(question.addresses(&["10.0.0.1".parse().unwrap()])[4..12], [0, 1, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn addresses_are_read_from_names() {
        for (name, address) in [
            ("2.0.17.172.in-addr.arpa", Some("172.17.0.2")),
            ("2.0.17.in-addr.arpa", None),
            ("300.0.17.172.in-addr.arpa", None),
            ("2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa", Some("fd00::2")),
            ("2.0.d.f.ip6.arpa", None),
            ("web", None),
        ] {
            let request = ask(name, TYPE_PTR, &[]);
            let read = Question::read(&request).unwrap().address();
            assert_eq!(read.map(|read| read.to_string()).as_deref(), address, "{name}");
        }
        let request = ask("2.0.17.172.in-addr.arpa", TYPE_PTR, &[]);
        let answer = Question::read(&request).unwrap().name_is("web.net");
        assert!(answer.ends_with(b"\x00\x09\x03web\x03net\x00"));
    }

    #[test]
    fn what_is_no_request_is_not_answered_and_what_is_a_bad_one_is() {
        assert_eq!(Question::read(&[0; 11]), Err(None));
        let mut answer = ask("web", 1, &[]);
        answer[2] |= 0x80;
        assert_eq!(Question::read(&answer), Err(None));
        let mut update = ask("web", 1, &[]);
        update[2] |= 0x28;
        assert_eq!(Question::read(&update).unwrap_err().unwrap()[3], 0x84);
        let request = ask("web", 1, &[]);
        for len in 12..request.len() {
            assert_eq!(Question::read(&request[..len]).unwrap_err().unwrap()[3], 0x81, "{len}");
        }
        // A name that points at itself.
        let looped = [&request[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
        assert!(Question::read(&looped).is_err());
    }

    #[test]
    fn a_long_answer_is_cut_in_a_datagram() {
        let request = ask("web", 1, &[]);
        let question = Question::read(&request).unwrap();
        let many: Vec<IpAddr> = (0..100).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        let cut = question.cut(question.addresses(&many));
        assert!(cut.len() < 512 && cut[2] & 2 == 2);
        let few = question.addresses(&many[..2]);
        assert_eq!(question.cut(few.clone()), few);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(question) = Question::read(&bytes) {
                question.address();
                question.cut(question.addresses(&["10.0.0.1".parse().unwrap()]));
                question.name_is("a..b");
            }
        }
    }
}
