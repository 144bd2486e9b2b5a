//! Any accesses to a device's registers: only a device that was set up validly is ever active.
#![no_main]

use coracle_vmm::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::registers(bytes));
