//! Boots real machines and tries everything on them. One program plays all parts: the test on the host, the VMM that it
//! starts, and the guest's first process, which obeys commands over vsock. It needs a usable KVM and a guest kernel
//! (`vmlinux` in `CORACLE_GUEST_DIR` or `target/guest`); where one is missing, it says so and is content.

mod cases;
mod guest;
mod host;
mod initramfs;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::main();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == host::VMM_ROLE) {
        return host::be_the_vmm();
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if let Err(error) = coracle_vmm::probe::probe() {
        println!("machine tests skipped: {error}");
        return ExitCode::SUCCESS;
    }
    let Some(kernel) = host::kernel() else {
        println!("machine tests skipped: there is no guest kernel (cargo xtask kernel builds it)");
        return ExitCode::SUCCESS;
    };
    let filter = arguments.iter().find(|argument| !argument.starts_with('-')).cloned().unwrap_or_default();
    cases::run(&kernel, &filter)
}
