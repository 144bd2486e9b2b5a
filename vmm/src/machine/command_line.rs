//! The kernel's command line: no probing of hardware that is not there, and where the devices are.

use crate::arch::x86_64::layout;
use crate::control::Boot;

/// `reboot=k` resets through the one register that the machine has for it; a panic does the same at once.
const ALWAYS: &str = "reboot=k panic=-1 no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests";
/// Nothing is printed but a panic, from the first moment on and by the simplest driver there is.
const SILENT: &str = "loglevel=1 8250.nr_uarts=0 earlycon=uart8250,io,0x3f8";
const SERIAL: &str = "console=ttyS0 8250.nr_uarts=1";

/// The command line for a machine with this many virtio devices.
pub(super) fn build(devices: u32, boot: &Boot) -> String {
    let mut words = vec![ALWAYS.to_owned(), if boot.serial { SERIAL } else { SILENT }.to_owned()];
    for index in 0..devices {
        let address = layout::MMIO_BEGIN + u64::from(index) * layout::MMIO_WINDOW;
        let line = layout::FIRST_DEVICE_LINE + index;
        words.push(format!("virtio_mmio.device=4K@{address:#x}:{line}"));
    }
    if !boot.cmdline_extra.is_empty() {
        words.push(boot.cmdline_extra.clone());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{DataDisk, FileRegion};

    #[test]
    fn devices_are_named_in_order_and_extra_words_come_last() {
        let region = FileRegion { offset: 0, len: 0 };
        let boot = Boot {
            vcpus: 1,
            memory_mib: 64,
            kernel: region,
            initramfs: region,
            data_disk: DataDisk { len: 4096 },
            layers_capacity: 4096,
            cmdline_extra: "debug -- x".into(),
            serial: false,
            file_server: false,
        };
        let line = build(2, &boot);
        let expected = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 debug -- x";
        assert!(line.ends_with(expected), "{line}");
        assert!(line.contains("loglevel=1") && !line.contains("console="), "{line}");
    }
}
