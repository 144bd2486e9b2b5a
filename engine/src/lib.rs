//! The Docker Engine API and the state machines behind it.

pub mod sandbox;
