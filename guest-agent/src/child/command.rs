//! Finds the program to execute, as a shell would, with the words for failures by which Docker's clients choose their
//! exit code.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use coracle_agent_api::{ApiError, ErrorKind};
use rustix::fs::{Access, AtFlags, CWD};

use crate::error::{Result, describe};

/// The path of a command; the calling process is already the right user in the right directory.
pub(super) fn find(command: &str, path: Option<&str>) -> Result<PathBuf> {
    if command.contains('/') {
        let candidate = PathBuf::from(command);
        return match check(&candidate) {
            Ok(()) => Ok(candidate),
            Err(error) => Err(unusable(command, &error)),
        };
    }
    for directory in path.unwrap_or_default().split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(command);
        if !command.is_empty() && check(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    let message = format!("exec: \"{command}\": executable file not found in $PATH");
    Err(ApiError { kind: ErrorKind::CommandNotFound, message, errno: Some(libc::ENOENT) })
}

fn check(candidate: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(candidate)?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    // Also for root, to whom the kernel says yes when any bit is set.
    if metadata.mode() & 0o111 == 0 || metadata.permissions().mode() & 0o170_000 != 0o100_000 {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Ok(rustix::fs::accessat(CWD, candidate, Access::EXEC_OK, AtFlags::EACCESS)?)
}

fn unusable(command: &str, error: &io::Error) -> ApiError {
    let errno = error.raw_os_error();
    let reason = describe(error);
    let (kind, message) = match errno {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ENAMETOOLONG) => {
            (ErrorKind::CommandNotFound, format!("exec: \"{command}\": stat {command}: {reason}"))
        }
        _ => (ErrorKind::CommandNotExecutable, format!("exec: \"{command}\": {reason}")),
    };
    ApiError { kind, message, errno }
}

/// Why the kernel did not execute a program that was found.
pub(super) fn not_executed(program: &Path, error: &io::Error) -> ApiError {
    let kind = match error.raw_os_error() {
        // The interpreter is missing.
        Some(libc::ENOENT) => ErrorKind::CommandNotFound,
        Some(libc::E2BIG | libc::ENOMEM | libc::EAGAIN) => ErrorKind::StartFailed,
        _ => ErrorKind::CommandNotExecutable,
    };
    let message = format!("exec {}: {}", program.display(), describe(error));
    ApiError { kind, message, errno: error.raw_os_error() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_the_words_that_clients_look_for() {
        let cases = [
            ("no-such-command", ErrorKind::CommandNotFound, "executable file not found in $PATH"),
            ("", ErrorKind::CommandNotFound, "executable file not found in $PATH"),
            ("/no/such", ErrorKind::CommandNotFound, "stat /no/such: no such file or directory"),
            ("/etc/passwd/x", ErrorKind::CommandNotFound, "not a directory"),
            ("/etc", ErrorKind::CommandNotExecutable, "is a directory"),
            ("/etc/passwd", ErrorKind::CommandNotExecutable, "permission denied"),
            ("/dev/null", ErrorKind::CommandNotExecutable, "permission denied"),
        ];
        for (command, kind, words) in cases {
            let error = find(command, Some("/usr/bin:/bin")).unwrap_err();
            assert_eq!(error.kind, kind, "{command}");
            assert!(error.message.contains(words), "{}", error.message);
        }
    }

    #[test]
    fn commands_are_found_in_the_path_only() {
        assert_eq!(find("sh", Some("/nowhere:/bin")).unwrap(), Path::new("/bin/sh"));
        assert!(find("sh", None).is_err());
    }
}
