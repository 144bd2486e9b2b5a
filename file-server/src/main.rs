//! The file server as a program of its own. The daemon starts it with the control socket as descriptor 3; it logs to stderr.

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // The protocols' libraries report every request that fails, with which a guest could fill the log.
    let filter = EnvFilter::new("info,fuse_backend_rs=off,virtio_queue=off");
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    match coracle_file_server::run_inherited() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut causes = vec![error.to_string()];
            let mut next = std::error::Error::source(&error);
            while let Some(source) = next {
                causes.push(source.to_string());
                next = source.source();
            }
            tracing::error!("{}", causes.join(": "));
            ExitCode::FAILURE
        }
    }
}
