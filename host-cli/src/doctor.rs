//! `coracle doctor`: whether coracle can work here, in plain words, and what to do where it cannot.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use coracle_vmm::probe::{self, ProbeError};

use crate::{
    client,
    failure::{Failure, Outcome, describe},
    paths::Home,
    settings::Settings,
    terminal,
    units::human_binary_size,
    vm::Guest,
};

/// Less free space than this is worth a warning.
const LITTLE_SPACE: u64 = 2 << 30;

/// How one thing is.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// As it should be.
    Good(String),
    /// It works, but the person may want to know.
    Note(String, String),
    /// Nothing runs before this is mended.
    Bad(String, String),
}

/// Looks at everything and says what was found. Exit code 1: something must be mended.
pub(crate) fn run(home: &Home) -> Outcome {
    let findings = [kvm(), guest(), settings(home), space(home), socket(home), docker_cli()];
    let mut text = String::new();
    for finding in &findings {
        text += &match finding {
            Finding::Good(what) => format!("ok       {what}\n"),
            Finding::Note(what, advice) => format!("note     {what}\n         {advice}\n"),
            Finding::Bad(what, advice) => format!("MISSING  {what}\n         {advice}\n"),
        };
    }
    let bad = findings.iter().filter(|finding| matches!(finding, Finding::Bad(..))).count();
    text += match bad {
        0 => "coracle can run containers here\n",
        _ => "coracle cannot run containers here before what is missing is there\n",
    };
    terminal::print(&text)?;
    if bad == 0 { Ok(0) } else { Err(Failure::silent(1)) }
}

fn kvm() -> Finding {
    let error = match probe::probe() {
        Ok(()) => return Finding::Good("KVM: a trial machine ran its instructions".to_owned()),
        Err(error) => error,
    };
    let advice = match &error {
        ProbeError::Missing => {
            "turn virtualization on in the firmware's settings, or load the module: `sudo modprobe kvm_intel` (or kvm_amd); \
             in a virtual machine, nested virtualization must be on"
                .to_owned()
        }
        ProbeError::Denied => kvm_permission(),
        _ => "run coracle on a machine (or in a virtual machine with nested virtualization) where KVM works; from the \
              source tree, `cargo xtask lab -- CMD` emulates one"
            .to_owned(),
    };
    Finding::Bad(format!("KVM: {}", describe(&error.into())), advice)
}

/// How this user gets at /dev/kvm.
fn kvm_permission() -> String {
    let group = fs::metadata("/dev/kvm").ok().and_then(|metadata| group_name(metadata.gid()));
    let group = group.as_deref().unwrap_or("kvm");
    if group == "root" {
        return "/dev/kvm belongs to root alone: `sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm`, then \
                `sudo usermod -aG kvm $USER` and log in again"
            .to_owned();
    }
    format!("add yourself to the group: `sudo usermod -aG {group} $USER`, then log in again")
}

fn group_name(gid: u32) -> Option<String> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

fn guest() -> Finding {
    match Guest::open() {
        Ok(guest) => Finding::Good(format!(
            "guest: kernel {}, initramfs {}",
            human_binary_size(guest.kernel.region.len),
            human_binary_size(guest.initramfs.region.len)
        )),
        Err(error) => Finding::Bad(
            format!("guest: {}", describe(&error)),
            "use the released file, or `cargo xtask dist` in the source tree; CORACLE_GUEST_DIR names a folder with one"
                .to_owned(),
        ),
    }
}

fn settings(home: &Home) -> Finding {
    match Settings::load(&home.settings()).and_then(|settings| settings.machine_size()) {
        Ok(size) => Finding::Good(format!(
            "virtual machine: {} processors, {} of memory, disk of up to {}",
            size.cpus,
            human_binary_size(size.memory_mib << 20),
            human_binary_size(size.disk)
        )),
        Err(error) => Finding::Bad(
            format!("virtual machine: {}", describe(&error)),
            "`coracle up --cpus N --memory SIZE --disk SIZE` chooses others".to_owned(),
        ),
    }
}

fn space(home: &Home) -> Finding {
    // The state directory may not be there yet: what will hold it counts.
    let folder = home.root().ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(folder) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let what = format!("disk space: {} free in {}", human_binary_size(free), folder.display());
            if free < LITTLE_SPACE {
                Finding::Note(what, "images and containers may soon have no room".to_owned())
            } else {
                Finding::Good(what)
            }
        }
        Err(error) => Finding::Bad(
            format!("disk space: cannot look at {}: {}", folder.display(), io::Error::from(error)),
            "choose another place with CORACLE_HOME".to_owned(),
        ),
    }
}

fn socket(home: &Home) -> Finding {
    match client::connect_running(home) {
        Ok(Some(_)) => Finding::Good(format!("daemon: listens on {}", home.socket().display())),
        Ok(None) => Finding::Good("daemon: not running; a command that needs it starts it".to_owned()),
        Err(error) => Finding::Bad(
            format!("daemon: {}", describe(&error)),
            "the socket must belong to you; CORACLE_HOME chooses another place".to_owned(),
        ),
    }
}

fn docker_cli() -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).map(|folder| folder.join("docker")).find(|file| file.is_file()) {
        Some(docker) => Finding::Good(format!("docker CLI: {}", docker.display())),
        None => Finding::Note(
            "docker CLI: none on PATH".to_owned(),
            "coracle has commands of its own; for docker's, install Debian's docker-cli or docker.io"
                .to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_by_its_number() {
        assert_eq!(group_name(0).as_deref(), Some("root"));
        assert_eq!(group_name(u32::MAX - 7), None);
    }
}
