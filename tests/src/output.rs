//! Running a program to its end, with everything it said.

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    thread,
};

/// What a program that ended left behind.
#[derive(Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; 128 + n for signal n.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails the test unless the program ended with this code.
    #[track_caller]
    pub fn code(self, expected: i32) -> Self {
        assert_eq!(
            self.code,
            expected,
            "`{}` ended with {} instead of {expected}\nstdout: {}\nstderr: {}",
            self.command,
            self.code,
            self.out(),
            self.err()
        );
        self
    }

    /// Fails the test unless the program ended with 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.code(0)
    }

    /// Standard output without white space at its ends, of a program that succeeded.
    #[track_caller]
    pub fn text(self) -> String {
        self.ok().out().trim().to_owned()
    }

    /// Fails the test unless standard error has these words.
    #[track_caller]
    pub fn says(self, words: &str) -> Self {
        assert!(self.err().contains(words), "`{}` did not say `{words}` but: {}", self.command, self.err());
        self
    }
}

/// Runs a program without input.
pub fn run(command: &mut Command) -> Finished {
    run_with_input(command, b"")
}

/// Runs a program with this input; its output is read while the input is written, so that neither end can block the other.
pub fn run_with_input(command: &mut Command, input: &[u8]) -> Finished {
    let line = format!("{command:?}").replace('"', "");
    let mut child = command
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run `{line}`: {error}"));
    let stdin = child.stdin.take();
    let mut stdout = child.stdout.take().expect("stdout was piped");
    let mut stderr = child.stderr.take().expect("stderr was piped");
    thread::scope(|scope| {
        if let Some(mut stdin) = stdin {
            // A program may end without reading all of its input.
            scope.spawn(move || drop(stdin.write_all(input)));
        }
        let errors = scope.spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).map(|_| bytes)
        });
        let mut output = Vec::new();
        stdout.read_to_end(&mut output).expect("reading a pipe");
        let errors = errors.join().expect("no panic in the reader").expect("reading a pipe");
        let status = child.wait().expect("waiting for a child");
        let code = status.code().unwrap_or_else(|| {
            128 + std::os::unix::process::ExitStatusExt::signal(&status).expect("neither a code nor a signal")
        });
        Finished { command: line, code, stdout: output, stderr: errors }
    })
}
