//! Any story of packets and streams: the vsock core's bounds hold, whatever happens.
#![no_main]

use coracle_vmm::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::vsock_core(bytes));
