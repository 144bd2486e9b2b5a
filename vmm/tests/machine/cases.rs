//! The cases, each a sentence about a machine.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use coracle_vmm::control::{Client, ExitReason, MachineState, Notice};

use crate::host::{LAYERS, Options, PATIENCE, Vm};

type Case = (&'static str, fn(&Path));

const CASES: &[Case] = &[
    ("a_machine_boots_and_reports_its_phases", boots),
    ("processors_and_memory_are_what_was_asked_for", sizes),
    ("bytes_pass_both_ways_and_directions_end_one_by_one", streams),
    ("a_slow_stream_does_not_hold_up_others", slow_stream),
    ("many_connections_are_served", many_connections),
    ("refusals_and_resets_close_the_stream", refusals),
    ("the_data_disk_keeps_what_is_written", data_disk),
    ("segments_come_and_go", segments),
    ("random_numbers_come_from_the_host", random),
    ("memory_that_the_guest_frees_goes_back_to_the_host", balloon),
    ("files_of_the_host_are_read_and_written", files),
    ("a_file_server_that_dies_takes_its_files_along_and_nothing_else", files_lost),
    ("a_paused_machine_stands_still", pause),
    ("a_new_client_takes_over", takeover),
    ("the_guest_can_end_itself", guest_ends),
    ("bad_requests_are_refused_and_harm_nothing", bad_requests),
];

pub(crate) fn run(kernel: &Path, filter: &str) -> ExitCode {
    let mut failed = 0;
    for (name, case) in CASES.iter().filter(|(name, _)| name.contains(filter)) {
        let begin = Instant::now();
        let ok = catch_unwind(AssertUnwindSafe(|| case(kernel))).is_ok();
        println!("{} {name} ({:.1} s)", if ok { "ok  " } else { "FAIL" }, begin.elapsed().as_secs_f64());
        failed += u32::from(!ok);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn boots(kernel: &Path) {
    let mut vm = Vm::boot(kernel, &Options { serial: false, ..Options::default() });
    let status = vm.client.status().unwrap();
    println!("     exits to ready: {:?}", status.exits);
    println!("     uptime when ready: {}", vm.ask("uptime"));
    assert_eq!(status.state, MachineState::Running);
    let times = status.times;
    let steps = [
        times.process_start,
        times.boot_request,
        times.kernel_mapped,
        times.vcpus_started,
        times.vsock_activated,
    ];
    println!(
        "     milliseconds from the VMM's start: {:?}",
        steps.map(|t| (t.unwrap() - steps[0].unwrap()) / 1_000_000)
    );
    assert!(steps.windows(2).all(|pair| pair[0].unwrap() <= pair[1].unwrap()));
    vm.client.stop().unwrap();
    assert_eq!(vm.end(), (ExitReason::Stopped, true));
}

fn sizes(kernel: &Path) {
    // The third reaches beyond the hole for the devices, which begins at 3.25 GiB.
    for (vcpus, memory_mib) in [(1, 128), (2, 2048), (4, 3600), (8, 256)] {
        let vm = Vm::boot(kernel, &Options { vcpus, memory_mib, ..Options::default() });
        assert_eq!(vm.ask("cpus"), vcpus.to_string());
        let total: u64 = vm.ask("memory").parse().unwrap();
        // The kernel takes some of it for itself before it counts.
        let all = memory_mib * 1024;
        assert!((all * 9 / 10 - (16 << 10)..=all).contains(&total), "{total} KiB");
    }
}

fn streams(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options { vcpus: 2, ..Options::default() });
    for len in [0, 1, 4096, 300_000, 5_000_000] {
        let data = pattern(len);
        assert_eq!(vm.exchange("echo", &data), data, "{len} bytes");
    }
    // Many small writes: the guest counts overhead per packet.
    let mut stream = vm.command("count");
    let data = pattern(200_000);
    for chunk in data.chunks(7) {
        stream.write_all(chunk).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let sum = data.iter().fold(0u64, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte));
    assert_eq!(answer.trim(), format!("{} {sum}", data.len()));
    // The guest ends its direction first and still reads.
    let mut stream = vm.command("source 1000000");
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 1_000_000);
    stream.write_all(b"still here").unwrap();
    drop(stream);
    let wanted = "after its own end it read 10 bytes";
    let deadline = Instant::now() + PATIENCE;
    while !vm.serial().contains(wanted) {
        assert!(Instant::now() < deadline, "the guest did not read on after its own end");
        vm.ask("cpus");
    }
}

fn slow_stream(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options::default());
    // The host reads nothing of one stream, the guest nothing of another.
    let unread = vm.command("source 4000000");
    let mut stalled = vm.command("stall");
    stalled.set_nonblocking(true).unwrap();
    while stalled.write(&[0; 65536]).is_ok() {}
    let data = pattern(1_000_000);
    assert_eq!(vm.exchange("echo", &data), data);
    let mut all = Vec::new();
    (&unread).read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 4_000_000);
}

fn many_connections(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options { vcpus: 2, ..Options::default() });
    let streams: Vec<UnixStream> = (0..300).map(|_| vm.command("echo")).collect();
    for (index, mut stream) in streams.iter().enumerate() {
        write!(stream, "{index}").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
    for (index, mut stream) in streams.iter().enumerate() {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, index.to_string());
    }
    drop(streams);
    let counts = vm.client.status().unwrap().vsock;
    assert!(counts.connected >= 300, "{counts:?}");
}

fn refusals(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options::default());
    // Nobody listens there.
    assert_eq!(vm.connect(9999).read(&mut [0; 1]).unwrap(), 0);
    // The guest may connect only where the host listens.
    vm.client.vsock_listen(7000, false).unwrap();
    let mut command = vm.command("dial 7000");
    let (port, stream) = vm.accepted();
    assert_eq!(port, 7000);
    command.write_all(b"to the host").unwrap();
    command.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    UnixStream::from(stream).read_to_string(&mut text).unwrap();
    assert_eq!(text, "to the host");
    let mut rest = Vec::new();
    vm.command("dial 7001").read_to_end(&mut rest).unwrap();
    assert!(vm.serial().contains("Connection reset"), "{}", vm.serial());
    // A host stream that closes without a word ends the guest's reads.
    drop(vm.command("count"));
    assert_eq!(vm.ask("cpus"), "1");
}

fn data_disk(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options::default());
    let data = pattern(3 << 20);
    assert_eq!(vm.exchange("write /dev/vda 1048576", &data), b"ok\n");
    let mut found = vec![0; data.len()];
    vm.disk.read_exact_at(&mut found, 1 << 20).unwrap();
    assert!(found == data, "the file has something else than what was written");
    let answer = vm.exchange("read /dev/vda 1048576 3145728", &[]);
    assert!(answer[..3] == *b"ok\n" && answer[3..] == data);
    let blocks = vm.disk.metadata().unwrap().blocks();
    assert_eq!(vm.ask("discard /dev/vda 1048576 2097152"), "0");
    let mut found = vec![1; 2 << 20];
    vm.disk.read_exact_at(&mut found, 1 << 20).unwrap();
    assert!(found.iter().all(|&byte| byte == 0));
    assert!(vm.disk.metadata().unwrap().blocks() <= blocks - 4096, "no space came back");
    assert_eq!(vm.exchange("read /dev/vda 67104768 8192", &[]), b"-1\n", "the disk goes on after its end");
    // A disk that shrinks gives errors where it is gone, and comes back.
    vm.disk.set_len(32 << 20).unwrap();
    assert_eq!(vm.exchange("read /dev/vda 50331648 8192", &[]), b"5\n");
    assert_eq!(vm.exchange("read /dev/vda 1048576 8192", &[])[..3], *b"ok\n");
    vm.disk.set_len(crate::host::DISK).unwrap();
    assert_eq!(vm.exchange("read /dev/vda 50331648 8192", &[])[..3], *b"ok\n");
}

fn segments(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options::default());
    let offset = LAYERS - (1 << 20);
    let read = format!("read /dev/vdb {offset} 8192");
    const EIO: &[u8] = b"5\n";
    assert_eq!(vm.exchange(&read, &[]), EIO);
    let mut file = tempfile::tempfile().unwrap();
    let data = pattern(8192);
    file.write_all(&data).unwrap();
    vm.client.attach_segment(offset, 8192, file.as_fd()).unwrap();
    assert!(vm.client.attach_segment(offset + 4096, 4096, file.as_fd()).is_err());
    assert_eq!(vm.exchange(&read, &[])[3..], data);
    vm.client.detach_segment(offset).unwrap();
    assert_eq!(vm.exchange(&read, &[]), EIO);
}

fn random(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options::default());
    let (one, two) = (vm.exchange("random", &[]), vm.exchange("random", &[]));
    assert!(one.len() == 32 && one != two, "{one:?} {two:?}");
}

fn balloon(kernel: &Path) {
    // Memory that is shared with a file server is the host's in another way.
    for files in [false, true] {
        returns(&Vm::boot(kernel, &Options { memory_mib: FULL, files, ..Options::default() }));
    }
}

/// MiB of a machine that fills most of them.
const FULL: u64 = 512;

fn returns(vm: &Vm) {
    let before = vm.resident();
    // Three quarters of its memory, written and freed again.
    assert_eq!(vm.ask(&format!("touch {}", FULL * 3 / 4)), "touched");
    let most = vm.resident();
    assert!(most >= before + (FULL << 20) / 2, "{before} {most}");
    let begin = Instant::now();
    let mut left = most;
    while left > before + (FULL << 20) / 10 {
        assert!(begin.elapsed() < PATIENCE, "of {most} bytes {left} are still there; before it was {before}");
        // The guest's clock decides when it reports: this waits for it by asking it.
        vm.ask("nap");
        left = vm.resident();
    }
    let mib = [before, most, left].map(|bytes| bytes >> 20);
    println!("     MiB before, full, returned: {mib:?}, after {:.1} s", begin.elapsed().as_secs_f64());
}

fn files(kernel: &Path) {
    let mut vm = Vm::boot(kernel, &Options { vcpus: 2, files: true, ..Options::default() });
    let tree = vm.files.as_ref().unwrap().tree.clone();
    assert_eq!(vm.ask("mount-files"), "0");
    let data = pattern(3 << 20);
    std::fs::write(tree.join("from-host"), &data).unwrap();
    assert!(vm.exchange("get /mnt/tree/from-host", &[]) == [b"ok\n", &data[..]].concat());
    assert_eq!(vm.exchange("put /mnt/tree/from-guest", &data), b"ok\n");
    assert!(std::fs::read(tree.join("from-guest")).unwrap() == data);
    // Both processors at once, on queues of their own.
    let streams: Vec<_> = (0..8).map(|_| vm.command("get /mnt/tree/from-host")).collect();
    for mut stream in streams {
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer[3..] == data);
    }
    // What is granted later is there, and what is taken back is not.
    let files = vm.files.as_ref().unwrap();
    let later = tempfile::tempdir().unwrap();
    std::fs::write(later.path().join("file"), "later").unwrap();
    files.grant("later", later.path());
    assert_eq!(vm.ask("get /mnt/later/file"), "ok\nlater");
    let id = || coracle_file_server::control::GrantId::try_from("later".to_owned()).unwrap();
    files.client.revoke(id()).unwrap();
    let stale = vm.ask("get /mnt/later/file");
    assert!([libc::ESTALE, libc::ENOENT].map(|errno| errno.to_string()).contains(&stale), "{stale}");
    // The server ends with the machine.
    vm.command("reboot");
    assert_eq!(vm.end(), (ExitReason::GuestReset, true));
    assert!(vm.files.as_mut().unwrap().child.wait().unwrap().success());
}

fn files_lost(kernel: &Path) {
    let mut vm = Vm::boot(kernel, &Options { files: true, ..Options::default() });
    assert_eq!(vm.ask("mount-files"), "0");
    std::fs::write(vm.files.as_ref().unwrap().tree.join("file"), "content").unwrap();
    assert_eq!(vm.ask("get /mnt/tree/file"), "ok\ncontent");
    let files = vm.files.as_mut().unwrap();
    files.child.kill().unwrap();
    files.child.wait().unwrap();
    // Whoever wants a file is told that there is none.
    for _ in 0..3 {
        assert_eq!(vm.ask("get /mnt/tree/file"), libc::ENOTCONN.to_string());
    }
    assert_eq!(vm.ask("cpus"), "1");
    vm.client.stop().unwrap();
    assert_eq!(vm.end(), (ExitReason::Stopped, true));
}

fn pause(kernel: &Path) {
    let vm = Vm::boot(kernel, &Options { vcpus: 2, ..Options::default() });
    let _busy = vm.command("spin");
    vm.client.pause().unwrap();
    vm.client.pause().unwrap();
    assert_eq!(vm.client.status().unwrap().state, MachineState::Paused);
    let mut stream = vm.command("cpus");
    stream.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    assert!(stream.read(&mut [0; 8]).is_err(), "a paused guest answered");
    vm.client.resume().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer.trim(), "2");
}

fn takeover(kernel: &Path) {
    let mut vm = Vm::boot(kernel, &Options { keep: true, ..Options::default() });
    let (sender, notices) = std::sync::mpsc::channel();
    let second = Client::connect(&vm.control, move |notice| {
        let _ = sender.send(notice);
    })
    .unwrap();
    assert!(matches!(vm.notices.recv_timeout(PATIENCE), Ok(Notice::Disconnected)));
    vm.ready = None;
    let Ok(Notice::VsockAccepted { stream, .. }) = notices.recv_timeout(PATIENCE) else {
        panic!("nothing kept")
    };
    vm.client = second;
    vm.notices = notices;
    assert_eq!(vm.ask("cpus"), "1");
    vm.command("reboot");
    // The kept connection ends with the guest.
    assert_eq!(UnixStream::from(stream).read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(vm.end(), (ExitReason::GuestReset, true));
}

fn guest_ends(kernel: &Path) {
    for serial in [true, false] {
        let mut vm = Vm::boot(kernel, &Options { vcpus: 2, serial, ..Options::default() });
        vm.command("reboot");
        assert_eq!(vm.end(), (ExitReason::GuestReset, true));
        let mut vm = Vm::boot(kernel, &Options { vcpus: 2, serial, ..Options::default() });
        vm.command("panic");
        let (reason, success) = vm.end();
        let ExitReason::GuestPanic { message } = reason else { panic!("{reason:?}") };
        assert!(message.starts_with("Attempted to kill init!"), "{message}");
        assert!(!success);
        assert_eq!(vm.serial().contains("Kernel panic"), serial, "{}", vm.serial());
    }
    // The kernel's own fault, before its first program runs.
    let mut vm = Vm::start();
    let mut request = Vm::request(kernel, &Options { serial: false, ..Options::default() });
    request.cmdline_extra = "rdinit=/nothing root=/dev/nothing".into();
    vm.boot_with(request, kernel).unwrap();
    let (reason, _) = vm.end();
    let ExitReason::GuestPanic { message } = reason else { panic!("{reason:?}") };
    assert!(message.contains("Unable to mount root fs"), "{message}");
}

fn bad_requests(kernel: &Path) {
    let mut vm = Vm::start();
    for request in [
        vm.client.pause(),
        vm.client.attach_segment(0, 4096, vm.disk.as_fd()),
        vm.client.vsock_connect(1, vm.disk.as_fd()),
    ] {
        assert!(request.unwrap_err().to_string().contains("not been booted"));
    }
    let good = Options::default();
    let refuse = |change: &dyn Fn(&mut coracle_vmm::control::Boot), words: &str| {
        let mut request = Vm::request(kernel, &good);
        change(&mut request);
        let message = vm.boot_with(request, kernel).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    refuse(&|boot| boot.vcpus = 0, "0 virtual processors");
    refuse(&|boot| boot.vcpus = 65, "65 virtual processors");
    refuse(&|boot| boot.memory_mib = 0, "0 MiB of memory");
    refuse(&|boot| boot.memory_mib = 513, "513 MiB of memory");
    refuse(&|boot| boot.memory_mib = 1 << 20, "the host has");
    refuse(&|boot| boot.memory_mib = (1 << 20) + 2, "at most 1 TiB");
    refuse(&|boot| boot.kernel.len = 1 << 20, "truncated");
    refuse(&|boot| boot.kernel.len += 1 << 30, "has only");
    refuse(&|boot| boot.kernel.offset = 4096, "has only");
    refuse(&|boot| (boot.kernel.offset, boot.kernel.len) = (4096, 1 << 20), "ELF");
    refuse(&|boot| boot.data_disk.len = 1 << 40, "fewer than its capacity");
    refuse(&|boot| boot.layers_capacity = 1, "capacity");
    refuse(&|boot| boot.cmdline_extra = "a\nb".into(), "printable");
    vm.client.vsock_listen(crate::guest::PORT, false).unwrap();
    vm.try_boot(kernel, &good).unwrap();
    vm.accepted();
    assert!(vm.try_boot(kernel, &good).unwrap_err().to_string().contains("already"));
    // A file cannot be waited for: it is no stream. The machine goes on.
    vm.client.vsock_connect(crate::guest::PORT, vm.disk.as_fd()).unwrap();
    assert_eq!(vm.ask("cpus"), "1");
    vm.client.stop().unwrap();
    assert_eq!(vm.end(), (ExitReason::Stopped, true));
}
