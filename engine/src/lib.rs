//! The Docker Engine API and the state machines behind it.
//!
//! An [`Engine`] owns every fact about containers, keeps them in an embedded store, and serves Docker's clients on a Unix
//! socket. Containers run in a [`sandbox`], which it knows by a trait only. What comes out of a sandbox, an image or a client
//! is untrusted.

#![recursion_limit = "256"]

mod accept;
mod agent;
pub mod api;
mod container;
mod core;
mod egress;
mod engine;
mod error;
mod events;
mod exec;
mod http;
mod io;
mod logs;
mod networks;
mod ports;
mod registries;
pub mod sandbox;
mod sandboxes;
mod store;
mod time;
mod timings;
mod volumes;

pub use core::EngineConfig;
pub use egress::HostFiles;
pub use engine::{Engine, ServeEnd};
pub use error::{Error, Kind};
pub use registries::RegistrySource;
