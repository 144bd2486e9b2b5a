//! The file server as a program of its own, for tests: it takes the control socket as descriptor 3 and logs to stderr. (The
//! daemon runs the same file server as a role of its own program.)

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // The protocols' libraries report every request that fails, with which a guest could fill the log.
    let filter = EnvFilter::new("info,fuse_backend_rs=off,virtio_queue=off");
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    match coracle_file_server::run_inherited() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", coracle_worker::chain(&error));
            ExitCode::FAILURE
        }
    }
}
