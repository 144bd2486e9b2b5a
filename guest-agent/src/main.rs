//! PID 1 of the guest: runs the containers.

fn main() {}
