//! Any bytes as the kept owner of a file.
#![no_main]

use coracle_file_server::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::record(bytes));
