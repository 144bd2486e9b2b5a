//! A kernel mounts what a file server serves, as a guest's would: the file system, the jail and the control protocol are the real ones, only
//! the transport is `/dev/fuse`. Every case runs with a server that is root and with one that is an ordinary user. The client is root, and
//! everybody else in between.
//!
//! It needs root and `/dev/fuse`, and fails where they are missing. Its mounts are in a mount namespace of their own.
#![allow(unsafe_code)]

mod bounds;
mod host;
mod owners;
mod posix;
mod programs;
mod safety;

use std::process::ExitCode;

use host::{Mounted, Who};

/// What a case is called, and what it does with a mounted file system.
type Case = (&'static str, fn(&Mounted));

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == host::SERVE) {
        return host::serve(&arguments);
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    host::prepare();
    let wanted = |name: &str| {
        let words: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
        words.is_empty() || words.iter().any(|word| name.contains(word.as_str()))
    };
    let cases: Vec<Case> =
        [posix::CASES, owners::CASES, safety::CASES, programs::CASES, bounds::CASES].concat();
    let mut failed = 0;
    for who in [Who::Root, Who::User] {
        for (name, case) in &cases {
            let name = format!("{who:?}: {name}");
            if !wanted(&name) {
                continue;
            }
            let started = std::time::Instant::now();
            let outcome = std::panic::catch_unwind(|| {
                let mounted = Mounted::new(who);
                case(&mounted);
                mounted.end();
            });
            let word = if outcome.is_ok() { "ok  " } else { "FAIL" };
            println!("{word} {name} ({:.1} s)", started.elapsed().as_secs_f32());
            failed += u32::from(outcome.is_err());
        }
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
