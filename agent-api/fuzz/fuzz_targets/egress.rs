//! Any bytes as a conversation about the outside, as the daemon reads what a guest says and the agent what the daemon says: each
//! frame is refused, or survives being written and read again.
#![no_main]

use coracle_agent_api::datagrams::{Inward, Outward};
use coracle_agent_api::egress::{HEADER_LEN, Header, Reply, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Some((header, after)) = rest.split_first_chunk::<HEADER_LEN>() {
        let Ok(Header { kind, id, len }) = Header::decode(header) else { return };
        let Some((payload, after)) = after.split_at_checked(len) else { return };
        rest = after;
        if let Ok(request) = Request::decode(kind, payload) {
            let again = request.encode(id);
            assert_eq!(Request::decode(kind, &again[HEADER_LEN..]), Ok(request));
        }
        if let Ok(reply) = Reply::decode(kind, payload) {
            let again = reply.encode(id);
            assert_eq!(Reply::decode(kind, &again[HEADER_LEN..]), Ok(reply));
        }
        if let Ok(inward) = Inward::decode(kind, payload) {
            let again = inward.encode(id);
            assert_eq!(Inward::decode(kind, &again[HEADER_LEN..]), Ok(inward));
        }
        if let Ok(Outward(data)) = Outward::decode(kind, payload) {
            assert_eq!(Outward::encode(id, &data)[HEADER_LEN..], *payload);
        }
    }
});
