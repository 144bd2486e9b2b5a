//! Checks requests before anything is done for them: what is out of range is refused by name.

use coracle_agent_api::{
    ContainerSpec, Endpoint, IpcMode, MIN_IPV6_MTU, Network, ProcessId, ProcessSpec, Resources, TreeSource,
    VolumeMount, WayOut,
};

use crate::cgroup;
use crate::child;
use crate::error::{Result, invalid};
use crate::layers;

/// The kernel's limit for host and domain names.
const MAX_NAME: usize = 64;
/// Groups between that of all containers and a container's own.
const MAX_GROUPS: usize = 8;

/// Networks that a container is on.
const MAX_ENDPOINTS: usize = 100;

/// Checks a container.
pub(crate) fn container(spec: &ContainerSpec) -> Result<()> {
    layers::check(&spec.layers)?;
    process(&spec.process)?;
    for (what, name) in [("host", &spec.hostname), ("domain", &spec.domainname)] {
        if name.len() > MAX_NAME || name.contains('\0') {
            return Err(invalid(format!("the {what} name `{name}` is longer than {MAX_NAME} bytes")));
        }
    }
    for mount in &spec.tmpfs {
        absolute("tmpfs", &mount.path)?;
        child::TmpfsOptions::parse(&mount.options)?;
    }
    volumes(&spec.volumes)?;
    for mount in &spec.binds {
        absolute("bind mount", &mount.path)?;
        if let TreeSource::Path { path } = &mount.source {
            absolute("source of a bind mount", path)?;
        }
    }
    let files = spec.files.iter().map(|file| ("file", &file.path));
    let masked = spec.masked_paths.iter().map(|path| ("masked path", path));
    let readonly = spec.readonly_paths.iter().map(|path| ("read-only path", path));
    for (what, path) in files.chain(masked).chain(readonly) {
        absolute(what, path)?;
    }
    for device in &spec.devices {
        absolute("device", &device.path)?;
        in_dev(&device.source)?;
    }
    for name in spec.sysctls.keys() {
        sysctl(name, spec)?;
    }
    if let Network::Endpoints(endpoints) = &spec.network {
        if endpoints.len() > MAX_ENDPOINTS {
            return Err(invalid(format!("a container can be on {MAX_ENDPOINTS} networks at most")));
        }
        endpoints.iter().try_for_each(endpoint)?;
    }
    cgroup_parent(&spec.cgroup_parent)?;
    resources(&spec.resources)
}

/// Checks a place on a network.
pub(crate) fn endpoint(endpoint: &Endpoint) -> Result<()> {
    for name in [&endpoint.interface, &endpoint.bridge.interface] {
        interface(name)?;
    }
    if endpoint.bridge.mtu.is_some_and(|mtu| mtu < 68) {
        return Err(invalid("a packet has 68 bytes at least"));
    }
    let ipv6 = endpoint.bridge.addresses.iter().chain(&endpoint.addresses).any(|net| net.addr().is_ipv6());
    if ipv6 && endpoint.bridge.mtu.is_some_and(|mtu| mtu < MIN_IPV6_MTU) {
        return Err(invalid(format!("with IPv6 a packet has room for {MIN_IPV6_MTU} bytes at least")));
    }
    Ok(())
}

/// Which network is to lead out of a container.
pub(crate) fn way_out(way: &WayOut) -> Result<()> {
    interface(&way.interface)
}

/// The kernel's rule for names of interfaces, and what our own are called.
fn interface(name: &str) -> Result<()> {
    let legal = (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':'))
        && !matches!(name, "." | ".." | "lo" | "all" | "default");
    if legal {
        Ok(())
    } else {
        Err(invalid(format!("`{}` is no name of an interface", name.escape_default())))
    }
}

/// Parameters that belong to the container's own namespaces, and to no one else's.
fn sysctl(name: &str, spec: &ContainerSpec) -> Result<()> {
    const IPC: [&str; 8] = [
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    let path =
        child::sysctl_path(name).ok_or_else(|| invalid(format!("`{name}` is no name of a parameter")))?;
    let path = path.trim_start_matches("/proc/sys/");
    let own_network = matches!(spec.network, Network::Endpoints(_));
    let own_ipc = matches!(spec.ipc, IpcMode::Private | IpcMode::Shareable | IpcMode::None);
    let of_ipc = IPC.contains(&path) || path.starts_with("fs/mqueue/");
    let of_uts = path == "kernel/domainname";
    if path.starts_with("net/") && own_network || of_ipc && own_ipc || of_uts && !spec.host_uts {
        Ok(())
    } else {
        Err(invalid(format!("sysctl \"{name}\" is not in a separate kernel namespace")))
    }
}

fn cgroup_parent(parent: &str) -> Result<()> {
    let legal = |name: &str| {
        name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
            && name != "."
            && name != ".."
            && name.len() <= 200
            // Neither a file of the kernel's nor a container.
            && !["cgroup.", "cpu.", "memory.", "io.", "pids.", "cpuset.", "hugetlb."].iter().any(|prefix| name.starts_with(prefix))
            && name.parse::<ProcessId>().is_err()
    };
    let names: Vec<&str> = parent.split('/').filter(|name| !name.is_empty()).collect();
    if names.first() == Some(&cgroup::HELPERS) {
        return Err(invalid(format!("the cgroup `{parent}` is the agent's own: name another one")));
    }
    if names.len() <= MAX_GROUPS && names.iter().all(|name| legal(name)) {
        Ok(())
    } else {
        Err(invalid(format!("`{parent}` is no path of a cgroup")))
    }
}

fn in_dev(path: &str) -> Result<()> {
    let inside = path == "/dev" || path.starts_with("/dev/");
    if inside && !path.contains('\0') && !path.split('/').any(|part| part == "..") {
        Ok(())
    } else {
        Err(invalid(format!("`{path}` is not a device in /dev")))
    }
}

/// Checks limits.
pub(crate) fn resources(resources: &Resources) -> Result<()> {
    for list in [&resources.cpuset_cpus, &resources.cpuset_mems].into_iter().flatten() {
        if !list.bytes().all(|b| b.is_ascii_digit() || matches!(b, b',' | b'-')) {
            return Err(invalid(
                "a list of CPUs or memory nodes has a character in it that is none of 0-9, `,` and `-`",
            ));
        }
    }
    let weights = resources.io_device_weights.iter().map(|device| &device.path);
    let limits = resources.io_limits.iter().map(|limit| &limit.path);
    weights.chain(limits).try_for_each(|path| in_dev(path))
}

/// Checks a process.
pub(crate) fn process(spec: &ProcessSpec) -> Result<()> {
    if spec.args.is_empty() {
        return Err(invalid("there is no command to run"));
    }
    if spec.args.iter().chain(&spec.env).any(|text| text.contains('\0')) {
        return Err(invalid("an argument or an environment variable has a zero byte in it"));
    }
    if !spec.cwd.starts_with('/') || spec.cwd.contains('\0') {
        let message =
            format!("the working directory '{}' is invalid, it needs to be an absolute path", spec.cwd);
        return Err(invalid(message));
    }
    child::parse_capabilities(&spec.capabilities)?;
    for limit in &spec.rlimits {
        if child::resource_of(&limit.name).is_none() {
            return Err(invalid(format!("unknown resource limit `{}`", limit.name)));
        }
        if limit.soft > limit.hard {
            return Err(invalid(format!("the soft limit of `{}` is above its hard limit", limit.name)));
        }
    }
    if spec.oom_score_adj.is_some_and(|score| !(-1000..=1000).contains(&score)) {
        return Err(invalid("oom_score_adj must be between -1000 and 1000"));
    }
    Ok(())
}

/// Whether volumes are mounted at paths that can be.
pub(crate) fn volumes(mounts: &[VolumeMount]) -> Result<()> {
    for mount in mounts {
        absolute("volume", &mount.path)?;
        if mount.subpath.starts_with('/') || mount.subpath.contains('\0') {
            return Err(invalid(format!("the volume's path `{}` is not a relative path", mount.subpath)));
        }
    }
    Ok(())
}

fn absolute(what: &str, path: &str) -> Result<()> {
    let plain = path.starts_with('/') && !path.contains('\0') && !path.trim_matches('/').is_empty();
    if plain { Ok(()) } else { Err(invalid(format!("the {what} `{path}` is not an absolute path below /"))) }
}
