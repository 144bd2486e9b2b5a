//! Boots real machines and tries everything on them. One program plays all parts: the test on the host, the VMM and the file server that it
//! starts, and the guest's first process, which obeys commands over vsock. It needs a usable KVM and a guest kernel
//! (`vmlinux` in `CORACLE_GUEST_DIR` or `target/guest`); where one is missing, it says so and fails.

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
    if arguments.first().is_some_and(|argument| argument == host::FILE_SERVER_ROLE) {
        return host::be_the_file_server();
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if let Err(error) = coracle_vmm::probe::probe() {
        eprintln!("the machine tests cannot run: {error} (cargo xtask lab gives a KVM)");
        return ExitCode::FAILURE;
    }
    let Some(kernel) = host::kernel() else {
        eprintln!("the machine tests cannot run: there is no guest kernel (cargo xtask guest builds it)");
        return ExitCode::FAILURE;
    };
    let filter = arguments.iter().find(|argument| !argument.starts_with('-')).cloned().unwrap_or_default();
    cases::run(&kernel, &filter)
}
