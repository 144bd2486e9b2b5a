//! The last part on the way to the program: standard descriptors, limits, working directory, user, capabilities.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use coracle_agent_api::{ApiError, ErrorKind, ProcessSpec, Rlimit};
use rustix::fs::{FileType, Gid, Uid};
use rustix::process::Resource;
use rustix::thread::CapabilitySet;

use super::capabilities;
use super::command;
use super::identity::Identity;
use super::root_dir::RootDir;
use crate::error::{AtStep, Result, describe, invalid};
use crate::fork_server::Task;
use crate::seccomp::Filter;
use crate::sys;

/// Everything that `execve` needs.
pub(super) struct Prepared {
    program: PathBuf,
    args: Vec<CString>,
    env: Vec<CString>,
    seccomp: Option<Filter>,
    effective: CapabilitySet,
}

/// Writes `oom_score_adj`, which was inherited from the fork server; /proc must still be the agent's.
pub(super) fn set_oom_score(process: &ProcessSpec) -> Result<()> {
    let score = process.oom_score_adj.unwrap_or(0).to_string();
    match (std::fs::write("/proc/self/oom_score_adj", score), process.oom_score_adj) {
        (result, Some(_)) => result.at("set oom_score_adj"),
        // Refused only where the agent itself runs with a higher one and without CAP_SYS_RESOURCE.
        (_, None) => Ok(()),
    }
}

/// Turns the calling process into what `task.process` says.
pub(super) fn prepare(root: &RootDir, task: &Task, first: bool, stdio: [OwnedFd; 3]) -> Result<Prepared> {
    let process = &task.process;
    let identity = Identity::look_up(root, &process.user, &process.additional_groups)?;
    rustix::process::setsid().at("start a session")?;
    let [stdin, stdout, stderr] = stdio;
    for fd in [&stdin, &stdout, &stderr] {
        give(fd, identity.uid).at("hand the standard streams over")?;
    }
    if process.tty {
        rustix::process::ioctl_tiocsctty(&stdin).at("get the terminal")?;
    }
    rustix::stdio::dup2_stdin(stdin).at("set standard input")?;
    rustix::stdio::dup2_stdout(stdout).at("set standard output")?;
    rustix::stdio::dup2_stderr(stderr).at("set standard error")?;
    sys::close_on_exec_from(3).at("mark descriptors")?;

    enter_directory(root, process)?;
    for limit in &process.rlimits {
        set_limit(limit)?;
    }
    let capabilities = capabilities::wanted(&process.capabilities, task.all_capabilities)?;
    capabilities::bound(capabilities)?;
    // What is permitted until the program runs is not what is permitted then: that follows from the bounding set and the user.
    rustix::thread::set_keep_capabilities(true).at("keep the capabilities")?;
    become_user(&identity)?;
    let effective = if identity.uid == 0 { capabilities } else { CapabilitySet::empty() };
    capabilities::hold(effective, effective | CapabilitySet::SYS_ADMIN)?;
    if task.die_with_agent && first {
        // After the change of user, which takes it back.
        let kill = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(kill).at("tie the container to the agent")?;
    }
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).at("set no_new_privs")?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let env = environment(&process.env, &identity.home);
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
    let name = process.args.first().ok_or_else(|| invalid("there is no command to run"))?;
    let program = command::find(name, path)?;
    Ok(Prepared {
        program,
        args: c_strings(&process.args)?,
        env: c_strings(&env)?,
        seccomp: task.seccomp.clone(),
        effective,
    })
}

impl Prepared {
    /// Executes the program; returns only if that fails.
    pub(super) fn execute(self) -> ApiError {
        let Ok(program) = CString::new(self.program.as_os_str().as_encoded_bytes()) else {
            return invalid("the command has a zero byte in it");
        };
        // The very last thing, so that a filter need not allow what only the set-up needs.
        if let Some(filter) = &self.seccomp
            && let Err(error) = self.filter_system_calls(filter)
        {
            return error;
        }
        let error = sys::execve(&program, &self.args, &self.env);
        command::not_executed(&self.program, &error)
    }
}

impl Prepared {
    fn filter_system_calls(&self, filter: &Filter) -> Result<()> {
        let admin = self.effective | CapabilitySet::SYS_ADMIN;
        capabilities::hold(admin, admin)?;
        sys::filter_system_calls(filter).at("install the seccomp filter")
    }
}

/// Makes pipes and terminals the user's, who may want to open /dev/stdout again.
fn give(fd: &OwnedFd, uid: u32) -> rustix::io::Result<()> {
    let stat = rustix::fs::fstat(fd)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_null = kind == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(1, 3);
    if is_null || stat.st_uid == uid {
        return Ok(());
    }
    rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), None)
}

fn enter_directory(root: &RootDir, process: &ProcessSpec) -> Result<()> {
    let failed = |error: std::io::Error| {
        let reason = describe(&error);
        let message = format!("chdir to cwd (\"{}\") set in config.json failed: {reason}", process.cwd);
        ApiError { kind: ErrorKind::StartFailed, message, errno: error.raw_os_error() }
    };
    let directory = root.find_directory(&process.cwd).map_err(failed)?;
    rustix::process::fchdir(directory.as_fd()).map_err(|error| failed(error.into()))
}

fn set_limit(limit: &Rlimit) -> Result<()> {
    let resource = resource_of(&limit.name)
        .ok_or_else(|| invalid(format!("unknown resource limit `{}`", limit.name)))?;
    let number = |value: u64| (value != u64::MAX).then_some(value);
    let value = rustix::process::Rlimit { current: number(limit.soft), maximum: number(limit.hard) };
    rustix::process::setrlimit(resource, value).at(format!("set the limit {}", limit.name))
}

/// The resource that a limit's name means.
pub(crate) fn resource_of(name: &str) -> Option<Resource> {
    Some(match name {
        "as" => Resource::As,
        "core" => Resource::Core,
        "cpu" => Resource::Cpu,
        "data" => Resource::Data,
        "fsize" => Resource::Fsize,
        "locks" => Resource::Locks,
        "memlock" => Resource::Memlock,
        "msgqueue" => Resource::Msgqueue,
        "nice" => Resource::Nice,
        "nofile" => Resource::Nofile,
        "nproc" => Resource::Nproc,
        "rss" => Resource::Rss,
        "rtprio" => Resource::Rtprio,
        "rttime" => Resource::Rttime,
        "sigpending" => Resource::Sigpending,
        "stack" => Resource::Stack,
        _ => return None,
    })
}

fn become_user(identity: &Identity) -> Result<()> {
    let groups: Vec<Gid> = identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    rustix::thread::set_thread_groups(&groups).at("set the groups")?;
    let gid = Gid::from_raw(identity.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).at("set the group")?;
    let uid = Uid::from_raw(identity.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).at("set the user")?;
    Ok(())
}

/// The environment, with HOME if it is missing.
fn environment(given: &[String], home: &str) -> Vec<String> {
    let mut env = given.to_vec();
    if !env.iter().any(|variable| variable.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        env.retain(|variable| !variable.starts_with("HOME="));
        env.push(format!("HOME={home}"));
    }
    env
}

fn c_strings(strings: &[String]) -> Result<Vec<CString>> {
    let convert = |text: &String| CString::new(text.as_str());
    let converted: std::result::Result<_, _> = strings.iter().map(convert).collect();
    converted.map_err(|_| invalid("an argument or an environment variable has a zero byte in it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_added_only_where_it_is_missing() {
        let env =
            |given: &[&str]| environment(&given.iter().map(|s| s.to_string()).collect::<Vec<_>>(), "/root");
        assert_eq!(env(&["A=1"]), ["A=1", "HOME=/root"]);
        assert_eq!(env(&["HOME=/here"]), ["HOME=/here"]);
        assert_eq!(env(&["HOME="]), ["HOME=/root"]);
    }
}
