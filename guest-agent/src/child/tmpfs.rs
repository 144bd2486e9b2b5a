//! Options of `docker run --tmpfs PATH:OPTIONS`, as mount attributes and parameters of the file system. Unknown options
//! are refused by name.

use coracle_agent_api::ApiError;
use rustix::mount::MountAttrFlags;

use crate::error::invalid;

/// Parsed options.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TmpfsOptions {
    attributes: u32,
    parameters: Vec<(String, String)>,
}

impl TmpfsOptions {
    /// Parses a comma-separated list on top of Docker's defaults, `noexec,nosuid,nodev`.
    pub(crate) fn parse(text: &str) -> Result<Self, ApiError> {
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mut parameters: Vec<(String, String)> = Vec::new();
        for option in text.split(',').filter(|option| !option.is_empty()) {
            if let Some((set, clear)) = attribute(option) {
                attributes = attributes.difference(clear).union(set);
                continue;
            }
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            if !matches!(key, "size" | "mode" | "uid" | "gid" | "nr_inodes" | "nr_blocks") || value.is_empty()
            {
                return Err(invalid(format!("invalid tmpfs option `{option}`")));
            }
            parameters.retain(|(old, _)| old != key);
            parameters.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self { attributes: attributes.bits(), parameters })
    }

    /// The mode if none was given.
    pub(super) fn default_mode(&mut self, mode: u32) {
        if !self.parameters.iter().any(|(key, _)| key == "mode") {
            self.parameters.push(("mode".to_owned(), format!("{mode:o}")));
        }
    }

    pub(super) fn attributes(&self) -> MountAttrFlags {
        MountAttrFlags::from_bits_retain(self.attributes)
    }

    pub(super) fn parameters(&self) -> Vec<(&str, &str)> {
        self.parameters.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }
}

/// What an option sets and clears.
fn attribute(option: &str) -> Option<(MountAttrFlags, MountAttrFlags)> {
    let none = MountAttrFlags::empty();
    let access_times = MountAttrFlags::MOUNT_ATTR_NOATIME | MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    Some(match option {
        "ro" => (MountAttrFlags::MOUNT_ATTR_RDONLY, none),
        "rw" => (none, MountAttrFlags::MOUNT_ATTR_RDONLY),
        "nosuid" => (MountAttrFlags::MOUNT_ATTR_NOSUID, none),
        "suid" => (none, MountAttrFlags::MOUNT_ATTR_NOSUID),
        "nodev" => (MountAttrFlags::MOUNT_ATTR_NODEV, none),
        "dev" => (none, MountAttrFlags::MOUNT_ATTR_NODEV),
        "noexec" => (MountAttrFlags::MOUNT_ATTR_NOEXEC, none),
        "exec" => (none, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        "noatime" => (MountAttrFlags::MOUNT_ATTR_NOATIME, access_times),
        "strictatime" => (MountAttrFlags::MOUNT_ATTR_STRICTATIME, access_times),
        "relatime" | "atime" | "nostrictatime" | "norelatime" => (none, access_times),
        "nodiratime" => (MountAttrFlags::MOUNT_ATTR_NODIRATIME, none),
        "diratime" => (none, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_options_win_over_the_defaults_and_earlier_ones() {
        let options = TmpfsOptions::parse("rw,exec,size=1k,size=64m,mode=1770").unwrap();
        let expected = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        assert_eq!(options.attributes(), expected);
        assert_eq!(options.parameters(), [("size", "64m"), ("mode", "1770")]);
    }

    #[test]
    fn unknown_options_are_refused_by_name() {
        for bad in ["bogus", "size", "size=", "lowerdir=/etc"] {
            let error = TmpfsOptions::parse(bad).unwrap_err();
            assert!(error.message.contains(bad), "{}", error.message);
        }
    }
}
