//! Any bytes as a kernel: it is loaded within guest memory or refused.
#![no_main]

use coracle_vmm::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::kernel(bytes));
