//! Any bytes as a tar stream: reading them ends in entries or in an error, and entries that can be read can be written and
//! read again.

#![no_main]

use std::io::Read;

use coracle_tarball::{TarStream, TarWriter};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut stream = TarStream::new(bytes);
    while let Ok(Some(entry)) = stream.next_entry() {
        if entry.sparse.is_some() {
            continue;
        }
        let mut data = Vec::new();
        if stream.read_to_end(&mut data).is_err() {
            return;
        }
        let mut writer = TarWriter::new(Vec::new());
        writer.append(&entry, data.as_slice()).expect("a vector takes everything");
        let written = writer.finish().expect("a vector takes everything");
        let again = TarStream::new(written.as_slice()).next_entry().expect("it is well-formed");
        assert_eq!(again.map(|again| again.mtime), Some(entry.mtime));
    }
});
