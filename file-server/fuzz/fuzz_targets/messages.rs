//! A guest's kernel that sends any FUSE messages: nothing beside the grant is seen or changed.
#![no_main]

use coracle_file_server::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::messages(bytes));
