//! The coracle binary: CLI, daemon, doctor.

fn main() {}
