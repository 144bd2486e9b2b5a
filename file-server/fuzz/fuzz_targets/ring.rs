//! Any rings, tables and buffers.
#![no_main]

use coracle_file_server::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::ring(bytes));
