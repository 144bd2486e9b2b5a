//! The peer: QEMU's microvm machine with KVM, with the same kernel and initramfs and a disk of the same kind. Its vsock is the kernel's.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

use crate::guest::PORT;
use crate::host::DISK;

/// The guest's address; any that nobody else here uses.
const CID: u32 = 1078;

pub(crate) struct Qemu {
    child: Child,
    /// Its end would be seen by the guest.
    _ready: VsockStream,
    _folder: tempfile::TempDir,
}

impl Qemu {
    pub(crate) fn start(kernel: &Path, initramfs: &[u8], vcpus: u32, memory_mib: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (disk, initrd) = (folder.path().join("disk"), folder.path().join("initramfs"));
        File::create(&disk)?.set_len(DISK)?;
        std::fs::write(&initrd, initramfs)?;
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, PORT).context("no vsock here")?;
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm,accel=kvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=off", "-cpu", "host"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-smp", &vcpus.to_string(), "-m", &memory_mib.to_string()])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", "reboot=k panic=-1 no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests loglevel=1 8250.nr_uarts=0"])
            .args(["-device", &format!("vhost-vsock-device,guest-cid={CID}"), "-device", "virtio-rng-device"])
            .args(["-drive", &format!("id=data,if=none,format=raw,discard=unmap,file={}", disk.display())])
            .args(["-device", "virtio-blk-device,drive=data"])
            .args(["-device", "virtio-balloon-device,free-page-reporting=on"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("qemu-system-x86_64 is not installed")?;
        let ready = listener.accept().context("the guest in QEMU did not say that it is ready");
        if ready.is_err() {
            child.kill()?;
        }
        Ok(Self { child, _ready: ready?.0, _folder: folder })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn connect(&self) -> File {
        let stream = VsockStream::connect_with_cid_port(CID, PORT).expect("the guest in QEMU listens");
        File::from(OwnedFd::from(stream))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
