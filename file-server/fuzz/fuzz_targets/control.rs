//! Any bytes as a control message: it is refused, or survives being written and read again.
#![no_main]

use coracle_file_server::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::control_message(bytes));
