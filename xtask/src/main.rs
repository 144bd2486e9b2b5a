//! Builds, tests, demonstrates and measures Coracle.

fn main() {}
