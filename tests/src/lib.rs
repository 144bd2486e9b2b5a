//! What the end-to-end tests share: a Coracle of their own for each test, the stock `docker` CLI and ours as its clients,
//! and image archives made by other people's tools.
//!
//! Tests whose file name starts with `lab_` run the whole product and need a usable KVM: `cargo xtask test` runs them in
//! the lab. Those that start with `host_` run on this machine as root. Neither is ever skipped: what is missing is a failure
//! that says so.

pub mod agent;
mod images;
mod installation;
mod output;
pub mod report;

pub use images::{Entry, image_archive, images_dir, oci_archive_with};
pub use installation::{Installation, coracle_binary, workspace};
pub use output::{Finished, run, run_with_input};
