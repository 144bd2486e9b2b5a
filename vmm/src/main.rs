//! The VMM as a program of its own. The daemon starts it with the control socket as descriptor 3; it logs to stderr.

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
