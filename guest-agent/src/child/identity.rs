//! Who a process runs as: `--user` looked up in the container's own /etc/passwd and /etc/group, with Docker's rules and
//! words. Both files are hostile: lines that make no sense are skipped, sizes are bounded.

use coracle_agent_api::{ApiError, ErrorKind};

use super::root_dir::RootDir;
use crate::error::{AtStep, Result};

const MAX_FILE: u64 = 16 * 1024 * 1024;
const MAX_ID: u32 = i32::MAX as u32;

/// The numbers to run with, and the home directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one included, without repetition.
    pub groups: Vec<u32>,
    /// Home directory; `/` for a user without an entry.
    pub home: String,
}

impl Identity {
    /// Looks a user up in a container.
    pub(super) fn look_up(root: &RootDir, user: &str, additional: &[String]) -> Result<Self> {
        let read = |path| match root.read_file(path, MAX_FILE) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(String::new()),
            Err(error) => Err(error).at(format!("read {path}")),
        };
        Self::from_files(&read("/etc/passwd")?, &read("/etc/group")?, user, additional)
    }

    fn from_files(passwd: &str, group: &str, user: &str, additional: &[String]) -> Result<Self> {
        let (user, group_name) = user.split_once(':').unwrap_or((user, ""));
        let user = if user.is_empty() { "0" } else { user };
        let wanted_uid = parse_id(user)?;
        let entry = passwd.lines().filter_map(User::parse).find(|entry| match wanted_uid {
            Some(uid) => entry.uid == uid,
            None => entry.name == user,
        });
        let (uid, mut gid, home) = match (&entry, wanted_uid) {
            (Some(entry), _) => (entry.uid, entry.gid, entry.home),
            (None, Some(uid)) => (uid, 0, ""),
            (None, None) => return Err(unknown("user", user, "passwd")),
        };
        let mut groups = Vec::new();
        if !group_name.is_empty() {
            gid = find_group(group, group_name)?;
        } else if let Some(entry) = &entry {
            let of_user = group.lines().filter_map(Group::parse).filter(|g| g.has(entry.name));
            groups.extend(of_user.map(|g| g.gid));
        }
        for name in additional {
            groups.push(find_group(group, name)?);
        }
        groups.insert(0, gid);
        let mut seen = std::collections::HashSet::new();
        groups.retain(|gid| seen.insert(*gid));
        let home = if home.is_empty() { "/" } else { home }.to_owned();
        Ok(Self { uid, gid, groups, home })
    }
}

fn find_group(groups: &str, name: &str) -> Result<u32> {
    let wanted = parse_id(name)?;
    let found = groups.lines().filter_map(Group::parse).find(|group| match wanted {
        Some(gid) => group.gid == gid,
        None => group.name == name,
    });
    match (found, wanted) {
        (Some(group), _) => Ok(group.gid),
        (None, Some(gid)) => Ok(gid),
        (None, None) => Err(unknown("group", name, "group")),
    }
}

fn unknown(what: &str, name: &str, file: &str) -> ApiError {
    let name: String = name.chars().take(256).collect();
    let message = format!("unable to find {what} {name}: no matching entries in {file} file");
    ApiError::new(ErrorKind::StartFailed, message)
}

/// A number, or `None` for a name.
fn parse_id(text: &str) -> Result<Option<u32>> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id <= MAX_ID => Ok(Some(id)),
        _ => Err(ApiError::new(ErrorKind::StartFailed, "uids and gids must be in range 0-2147483647")),
    }
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> User<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let _comment = fields.next();
        let legal = !name.is_empty() && uid <= MAX_ID && gid <= MAX_ID;
        legal.then(|| Self { name, uid, gid, home: fields.next().unwrap_or("") })
    }
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let gid = fields.next()?.parse().ok().filter(|gid| *gid <= MAX_ID)?;
        (!name.is_empty()).then(|| Self { name, gid, members: fields.next().unwrap_or("") })
    }

    fn has(&self, user: &str) -> bool {
        self.members.split(',').any(|member| member == user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken:x:abc:1\n\nweb:x:33:33::/var/www:/bin/sh\nhomeless:x:40:40\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,web\nweb:x:33:\ndisk:x:6:root\nbad:x:-1:root\n";

    fn look_up(user: &str, additional: &[&str]) -> Result<(u32, u32, Vec<u32>, String)> {
        let additional: Vec<_> = additional.iter().map(|s| s.to_string()).collect();
        let found = Identity::from_files(PASSWD, GROUP, user, &additional)?;
        Ok((found.uid, found.gid, found.groups, found.home))
    }

    #[test]
    fn users_are_found_as_docker_finds_them() {
        type Case = (&'static str, &'static [&'static str], u32, u32, &'static [u32], &'static str);
        let cases: &[Case] = &[
            ("", &[], 0, 0, &[0, 10, 6], "/root"),
            ("root", &[], 0, 0, &[0, 10, 6], "/root"),
            ("web", &[], 33, 33, &[33, 10], "/var/www"),
            ("33", &[], 33, 33, &[33, 10], "/var/www"),
            ("web:disk", &[], 33, 6, &[6], "/var/www"),
            ("web:77", &["wheel", "77", "5"], 33, 77, &[77, 10, 5], "/var/www"),
            ("1000", &[], 1000, 0, &[0], "/"),
            ("1000:1000", &[], 1000, 1000, &[1000], "/"),
            (":6", &[], 0, 6, &[6], "/root"),
            ("homeless", &[], 40, 40, &[40], "/"),
        ];
        for (user, additional, uid, gid, groups, home) in cases {
            let found = look_up(user, additional).unwrap();
            assert_eq!(found, (*uid, *gid, groups.to_vec(), home.to_string()), "{user}");
        }
    }

    #[test]
    fn what_is_not_there_is_named_in_dockers_words() {
        let cases = [
            ("nobody", "unable to find user nobody: no matching entries in passwd file"),
            ("broken", "unable to find user broken: no matching entries in passwd file"),
            ("root:nogroup", "unable to find group nogroup: no matching entries in group file"),
            ("-1", "uids and gids must be in range 0-2147483647"),
            ("4294967296", "uids and gids must be in range 0-2147483647"),
            ("0:2147483648", "uids and gids must be in range 0-2147483647"),
        ];
        for (user, message) in cases {
            assert_eq!(look_up(user, &[]).unwrap_err().message, message, "{user}");
        }
    }
}
