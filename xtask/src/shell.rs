//! Running other people's programs: every failure names the program, what it was asked and what it said.
//! Programs come from this machine's PATH and are trusted as the person who runs xtask trusts them.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A command of `program` with `arguments`.
pub(crate) fn command<I, S>(program: &str, arguments: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<std::ffi::OsStr>,
{
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// The command as a person would have typed it.
pub(crate) fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        let _ = write!(text, " {}", quote(&argument.to_string_lossy()));
    }
    text
}

/// `text` as one word of a POSIX shell.
pub(crate) fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// Runs the command with our own standard streams.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", describe(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", describe(command));
    }
    Ok(())
}

/// Runs the command silently; what it wrote is shown only when it fails. Returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", describe(command)))?;
    if !output.status.success() {
        let mut said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if said.is_empty() {
            said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        }
        bail!("`{}` failed: {}\n{said}", describe(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{}` did not print text", describe(command)))
}

/// Runs the command with both output streams joined, and calls `line` for each line. The last lines are shown when it fails.
pub(crate) fn lines(command: &mut Command, mut line: impl FnMut(&str)) -> Result<()> {
    const KEPT: usize = 25;
    let name = describe(command);
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot start `{name}`"))?;
    // The command object holds the pipe's writing ends; the reader would never see the end of it.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut last = std::collections::VecDeque::with_capacity(KEPT);
    for text in BufReader::new(reader).split(b'\n') {
        let text = text.with_context(|| format!("cannot read what `{name}` prints"))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        line(&text);
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(text);
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{name}`"))?;
    if !status.success() {
        bail!("`{name}` failed: {status}\n{}", Vec::from(last).join("\n"));
    }
    Ok(())
}

/// Whether `program` can be found on the PATH (or is a path to a file).
pub(crate) fn on_path(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_with_special_characters_are_quoted() {
        assert_eq!(quote("a-b_c.d/e=1"), "a-b_c.d/e=1");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), "'it'\\''s'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn a_failure_shows_the_last_lines() {
        let mut seen = 0;
        let error = lines(&mut command("sh", ["-c", "echo one; echo two >&2; exit 3"]), |_| seen += 1)
            .unwrap_err()
            .to_string();
        assert_eq!(seen, 2);
        assert!(error.contains("exit status: 3") && error.contains("two"), "{error}");
    }
}
