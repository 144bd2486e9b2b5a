//! A terminal from the container's own devpts: its two ends go to the agent, the process gets the inner one three times.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use coracle_agent_api::{ErrorKind, ProcessSpec};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::root_dir::RootDir;
use super::send_report;
use crate::error::{AtStep, Result};
use crate::fork_server::Report;
use crate::mounts;

/// Opens the terminal. For a container's first process it becomes /dev/console too.
pub(super) fn open(
    root: &RootDir,
    devpts: Option<&OwnedFd>,
    process: &ProcessSpec,
    report: &OwnedFd,
    console: bool,
) -> Result<[OwnedFd; 3]> {
    let outer = open_ptmx(root, devpts).at("open a terminal")?;
    unlockpt(&outer).at("unlock the terminal")?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let inner = ioctl_tiocgptpeer(&outer, flags).at("open the terminal's inner end")?;
    if let Some(size) = process.terminal_size {
        let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&outer, size).at("set the terminal's size")?;
    }
    if console {
        let target = root.find_without_links("/dev/console").at("open /dev/console")?;
        let bind = mounts::bind(&inner).at("bind the terminal")?;
        mounts::attach(bind, target).at("mount the terminal at /dev/console")?;
    }
    send_report(report, &Report::Terminal, &[outer.as_fd(), inner.as_fd()])
        .at_kind(ErrorKind::Internal, "hand the terminal to the agent")?;
    let copy = || inner.try_clone().at("duplicate the terminal");
    Ok([copy()?, copy()?, inner])
}

fn open_ptmx(root: &RootDir, devpts: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let ptmx = match devpts {
        Some(devpts) => {
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            rustix::fs::openat(devpts, "ptmx", flags, Mode::empty())?
        }
        None => root.open_device("/dev/pts/ptmx")?,
    };
    // A privileged container can mount what it likes there.
    let stat = rustix::fs::fstat(&ptmx)?;
    let is_ptmx = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(5, 2);
    if is_ptmx { Ok(ptmx) } else { Err(io::Error::other("/dev/pts/ptmx is not a terminal multiplexer")) }
}
