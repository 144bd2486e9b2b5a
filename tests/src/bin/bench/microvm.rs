//! The peer of the machine benches: QEMU's microvm machine with KVM, with the same kernel, initramfs, disks and agent as ours. Its
//! vsock is the kernel's vhost-vsock, so the agent says hello to a socket of this process.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use coracle_agent_api::{AGENT_PORT, DiffId, LayerSource, READY_PORT};
use coracle_tests::{agent, workspace};
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

/// The guest's address; any that nobody else here uses.
const CID: u32 = 1077;

/// What a machine is made of.
pub(crate) struct Parts {
    pub(crate) data_disk: PathBuf,
    pub(crate) layer: PathBuf,
    pub(crate) diff_id: DiffId,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
}

/// A running machine whose agent has said hello.
pub(crate) struct Microvm {
    child: Child,
    source: LayerSource,
    diff_id: DiffId,
    /// Its end would be the agent's.
    _hello: BufReader<VsockStream>,
    started: Instant,
    /// Milliseconds from the start of QEMU to the agent's hello.
    pub(crate) ready_ms: f64,
}

/// Milliseconds on the way of one container.
pub(crate) struct ContainerTimes {
    /// The start request, to its answer.
    pub(crate) start_ms: f64,
    /// From the start request to the first byte.
    pub(crate) first_byte_ms: f64,
    /// From the start of QEMU to the first byte.
    pub(crate) since_boot_ms: f64,
}

impl Microvm {
    pub(crate) fn start(parts: &Parts) -> Result<Self> {
        let listener =
            VsockListener::bind_with_cid_port(VMADDR_CID_ANY, READY_PORT).context("no vsock here")?;
        let guest = workspace().join("target/guest");
        let started = Instant::now();
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm,accel=kvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=off", "-cpu", "host"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-smp", &parts.cpus.to_string(), "-m", &parts.memory_mib.to_string()])
            .arg("-kernel")
            .arg(guest.join("vmlinux"))
            .arg("-initrd")
            .arg(guest.join("initramfs.cpio"))
            .args(["-append", "reboot=k panic=-1 no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests quiet 8250.nr_uarts=0"])
            .args(["-device", &format!("vhost-vsock-device,guest-cid={CID}"), "-device", "virtio-rng-device"])
            .args(["-drive", &format!("id=data,if=none,format=raw,file={}", parts.data_disk.display())])
            .args(["-device", "virtio-blk-device,drive=data"])
            .args(["-drive", &format!("id=layers,if=none,format=raw,readonly=on,file={}", parts.layer.display())])
            .args(["-device", "virtio-blk-device,drive=layers"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("qemu-system-x86_64 is not installed")?;
        let hello = listener.accept().context("the agent in QEMU did not say hello");
        if hello.is_err() {
            child.kill()?;
        }
        let mut hello = BufReader::new(hello?.0);
        let mut line = String::new();
        hello.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the agent in QEMU ended without a word");
        let ready_ms = started.elapsed().as_secs_f64() * 1e3;
        let len = std::fs::metadata(&parts.layer)?.len();
        let source = LayerSource::Partition { number: 1, start: 0, len };
        Ok(Self { child, source, diff_id: parts.diff_id.clone(), _hello: hello, started, ready_ms })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs `echo hello` in a container.
    pub(crate) fn run(&self, number: usize) -> Result<ContainerTimes> {
        let id = format!("{number:064x}");
        let spec = agent::container(&self.diff_id, self.source.clone(), &["/bin/busybox", "echo", "hello"]);
        let mut api = VsockStream::connect_with_cid_port(CID, AGENT_PORT)?;
        let begin = Instant::now();
        agent::start(&mut api, &id, &spec)?;
        let start_ms = begin.elapsed().as_secs_f64() * 1e3;
        let mut first = None;
        let mut stream = VsockStream::connect_with_cid_port(CID, AGENT_PORT)?;
        let (said, code) = agent::output(&mut stream, &id, &mut || first = Some(Instant::now()))?;
        ensure!(code == 0 && said == b"hello\n", "echo in QEMU ended with {code}");
        let first = first.context("no byte came")?;
        agent::call(&mut api, "DELETE", &format!("/v1/processes/{id}"), b"")?;
        agent::call(&mut api, "DELETE", &format!("/v1/containers/{id}"), b"")?;
        Ok(ContainerTimes {
            start_ms,
            first_byte_ms: (first - begin).as_secs_f64() * 1e3,
            since_boot_ms: (first - self.started).as_secs_f64() * 1e3,
        })
    }
}

impl Drop for Microvm {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
