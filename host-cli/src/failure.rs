//! What a command that failed tells the person: what happened, why, what to do about it, and the exit code.

use std::fmt::Display;

use crate::client::stream::StreamError;

/// A failure of a command, ready to be printed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The process's exit code.
    pub(crate) code: u8,
    /// What happened, outermost first; nothing is printed if there is none (it was said already).
    pub(crate) error: Option<anyhow::Error>,
    /// What the person can do.
    pub(crate) hint: Option<String>,
}

/// The result of a command: its exit code, or why it failed.
pub(crate) type Outcome = Result<u8, Failure>;

impl Failure {
    /// A failure that says one sentence.
    pub(crate) fn new(message: impl Display) -> Self {
        anyhow::anyhow!("{message}").into()
    }

    /// Nothing more to say; only the exit code is left.
    pub(crate) fn silent(code: u8) -> Self {
        Self { code, error: None, hint: None }
    }

    /// With another exit code than 1.
    pub(crate) fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// With advice.
    pub(crate) fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Whoever read standard output has gone: no error that anybody wants to hear of.
    pub(crate) fn is_reader_gone(&self) -> bool {
        let causes = self.error.iter().flat_map(|error| error.chain());
        causes.filter_map(|cause| cause.downcast_ref()).any(StreamError::is_reader_gone)
    }

    /// Prints it to standard error, as `coracle: cannot …: reason`.
    pub(crate) fn report(&self) {
        let Some(error) = &self.error else { return };
        let mut text = format!("coracle: {}\n", describe(error));
        if let Some(hint) = &self.hint {
            text += &format!("hint: {hint}\n");
        }
        crate::terminal::complain(&text);
    }
}

/// An error and its causes in one line.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { code: 1, error: Some(error.into()), hint: None }
    }
}
