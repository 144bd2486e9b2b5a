//! Any ring and buffers for the random number device: it serves them or calls the driver broken.
#![no_main]

use coracle_vmm::fuzzing::{self, Device};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::device(Device::Rng, bytes);
});
