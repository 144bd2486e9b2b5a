//! Where the daemon's log goes: to the terminal it was started from, or to its file, which is its standard error then.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
};

use tracing_subscriber::EnvFilter;

use crate::paths::Home;

/// A log that is longer than this is put aside when a daemon starts.
const MAX_LEN: u64 = 16 << 20;

/// Opens the daemon's log for appending.
pub(crate) fn open(home: &Home) -> io::Result<File> {
    let path = home.daemon_log();
    if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > MAX_LEN) {
        fs::rename(&path, path.with_extension("log.old"))?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Begins to log to standard error. `CORACLE_LOG` chooses what is logged, for example `debug`.
pub(crate) fn start(detached: bool) {
    start_filtered(detached, "info");
}

/// The same without what a guest could fill the log with: the protocols' libraries report every request that fails.
pub(crate) fn start_for_file_server() {
    start_filtered(true, "info,fuse_backend_rs=off,virtio_queue=off");
}

fn start_filtered(detached: bool, filter: &str) {
    let filter = EnvFilter::try_from_env("CORACLE_LOG").unwrap_or_else(|_| EnvFilter::new(filter));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(!detached).init();
}
