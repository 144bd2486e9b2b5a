//! Progress of long steps on standard error: one line that is rewritten on a terminal, elsewhere a new line every few seconds at most,
//! printed when the step itself says something.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// A long step.
pub(crate) struct Progress {
    name: &'static str,
    expected: usize,
    seen: usize,
    started: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    /// Starts a step that is expected to print about `expected` lines; 0 when nobody knows.
    pub(crate) fn start(name: &'static str, expected: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        if !terminal {
            eprintln!("{name} …");
        }
        Self { name, expected, seen: 0, started: Instant::now(), shown: None, terminal }
    }

    /// Counts a line that the step printed.
    pub(crate) fn line(&mut self, text: &str) {
        self.seen += 1;
        let pause = if self.terminal { Duration::from_millis(100) } else { Duration::from_secs(10) };
        if self.shown.is_some_and(|shown| shown.elapsed() < pause) {
            return;
        }
        self.shown = Some(Instant::now());
        let percent = match self.expected {
            0 => String::new(),
            expected => format!("{:3} % ", (self.seen * 100 / expected).min(99)),
        };
        let text: String = text.trim().chars().filter(|c| !c.is_control()).take(60).collect();
        if self.terminal {
            eprint!("\r\x1b[K{}: {percent}{text}", self.name);
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{}: {percent}{text}", self.name);
        }
    }

    /// Ends the step.
    pub(crate) fn done(self) {
        let start = if self.terminal { "\r\x1b[K" } else { "" };
        eprintln!("{start}{}: done in {:.1} s", self.name, self.started.elapsed().as_secs_f64());
    }
}
