//! Any bytes as what a file server says: the conversation ends, and nothing else happens.
#![no_main]

use coracle_vmm::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::file_server(bytes));
