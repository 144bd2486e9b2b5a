//! The VMM's own binary.
fn main() {}
