//! Any bytes as what a registry says: the first line a challenge and a content type, the rest a manifest.
#![no_main]

use coracle_image_store::registry::challenge::Challenge;
use coracle_image_store::registry::manifest::{Descriptor, Document};
use http::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|said: &[u8]| {
    let (line, rest) = match said.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&said[..end], &said[end + 1..]),
        None => (said, &[][..]),
    };
    if let Ok(value) = HeaderValue::from_bytes(line) {
        let mut headers = HeaderMap::new();
        headers.insert(WWW_AUTHENTICATE, value);
        for challenge in Challenge::parse_all(&headers) {
            if let Challenge::Bearer { realm, .. } = challenge {
                assert!(!realm.is_empty());
            }
        }
    }
    match Document::parse(std::str::from_utf8(line).ok(), rest) {
        Ok((Document::Image(image), _)) => image.layers.iter().for_each(is_named),
        Ok((Document::Index(entries), _)) => entries.iter().for_each(is_named),
        Err(error) => assert!(error.to_string().len() < 2000),
    }
});

fn is_named(descriptor: &Descriptor) {
    assert!(!descriptor.media_type.is_empty());
}
