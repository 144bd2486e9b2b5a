//! The VMM as a program of its own, for tests: it takes the control socket as descriptor 3 and logs to stderr. (The daemon runs
//! the same VMM as a role of its own program.)

use std::process::ExitCode;

use coracle_vmm::control::ExitReason;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    match coracle_vmm::run_inherited() {
        Ok(ExitReason::Stopped | ExitReason::GuestReset) => ExitCode::SUCCESS,
        Ok(reason) => {
            tracing::error!(%reason, "the machine failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            tracing::error!("{}", coracle_worker::chain(&error));
            ExitCode::FAILURE
        }
    }
}
