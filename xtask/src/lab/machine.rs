//! One run of the emulated machine: QEMU with three streams over unix sockets in a private folder, which is removed at the end.
//! QEMU dies with us, whatever ends us; what the emulated machine writes reaches only our own streams and that folder.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};

use super::{Options, system::System};
use crate::shell;

/// Variables that the command keeps, besides those that start with one of `KEPT_PREFIXES`.
const KEPT: &[&str] =
    &["PATH", "HOME", "USER", "LOGNAME", "LANG", "TERM", "CI", "NO_COLOR", "COLUMNS", "BENCH_SAMPLES"];
const KEPT_PREFIXES: &[&str] = &["CORACLE_", "RUST_", "RUSTUP_", "CARGO_", "DOCKER_", "LC_"];
/// Where the command finds the folder for what it makes.
const OUT: &str = "/run/coracle-lab-out";

/// Everything that QEMU emulates, with virtualization, but without XSAVE and what builds on it: QEMU does not tell KVM of a guest's XSETBV, so that
/// guests find the sizes in CPUID inconsistent.
const CPU: &str =
    "max,+svm,+npt,-xsave,-xsavec,-xsaveopt,-xgetbv1,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq,-pku,-mpx";

/// A processor that gets nowhere for two minutes ends the machine, so that whoever waits for it learns it.
///
/// `nohz=off highres=off` makes the timer a periodic one. QEMU 7.2 changes a processor's set of pending interrupts without
/// a lock at each exit of a guest (`interrupt_request` in target/i386/tcg/sysemu/svm_helper.c), and an interrupt that comes at that moment
/// is forgotten until the next one; were that the only timer, there would be no next one.
const APPEND: &str = "console=ttyS0 panic=-1 quiet loglevel=5 mitigations=off watchdog_thresh=60 softlockup_panic=1 \
    nohz=off highres=off";

/// Runs `arguments` in a new machine.
pub(super) fn run(system: &System, options: &Options, arguments: &[String]) -> Result<ExitCode> {
    let signals = Signals::hold()?;
    let job = tempfile::Builder::new()
        .prefix("coracle-lab-")
        .tempdir_in("/tmp")
        .context("cannot make a folder for the job")?;
    let shared = job.path().join("job");
    fs::create_dir(&shared)?;
    fs::write(shared.join("job.sh"), script(arguments, options.out.is_some())?)?;

    let streams: Vec<UnixListener> = ["stdin", "stdout", "stderr"]
        .iter()
        .map(|name| UnixListener::bind(job.path().join(name)))
        .collect::<io::Result<_>>()
        .context("cannot make the streams")?;
    let mut command = qemu(system, options, job.path())?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    let said = child.stderr.take().context("QEMU has no standard error")?;

    let (tell, events) = mpsc::channel();
    signals.watch(tell.clone())?;
    let complaint = thread::spawn(move || io::read_to_string(said).unwrap_or_default());
    let pumps = match connect(&streams, &tell, &events, child.id()) {
        Ok(pumps) => pumps,
        Err(end) => return finish_early(child, complaint, end, job.path()),
    };
    let end = wait(&mut child, &events)?;
    for pump in pumps {
        let _ = pump.join();
    }
    if let End::Signal(signal) = end {
        return Ok(ExitCode::from(128 + signal as u8));
    }
    let said = complaint.join().unwrap_or_default();
    match fs::read_to_string(shared.join("status")).ok().and_then(|text| text.trim().parse::<u8>().ok()) {
        Some(code) => Ok(ExitCode::from(code)),
        None => Err(broken(job.path(), &said)),
    }
}

/// Something that happened to the machine.
enum Event {
    Signal(Signal),
    Connected,
    Gone,
}

enum End {
    Signal(Signal),
    Exit,
}

/// Waits for QEMU to open its three streams and starts to pump them. QEMU's own end closes the wait: a waiting thread tells of it.
fn connect(
    listeners: &[UnixListener],
    tell: &mpsc::Sender<Event>,
    events: &mpsc::Receiver<Event>,
    qemu: u32,
) -> std::result::Result<Vec<thread::JoinHandle<()>>, End> {
    watch_process(qemu, tell.clone());
    let [input, output, errors] = listeners else { return Err(End::Exit) };
    let mut pumps = Vec::new();
    for (index, listener) in [input, output, errors].into_iter().enumerate() {
        let Ok(listener) = listener.try_clone() else { return Err(End::Exit) };
        let tell = tell.clone();
        let pump = thread::spawn(move || {
            let Ok((stream, _)) = listener.accept() else { return };
            let _ = tell.send(Event::Connected);
            match index {
                0 => pump_input(stream),
                1 => pump(stream, &mut io::stdout()),
                _ => pump(stream, &mut io::stderr()),
            }
        });
        if index > 0 {
            pumps.push(pump);
        }
    }
    for _ in 0..3 {
        match events.recv() {
            Ok(Event::Connected) => {}
            Ok(Event::Signal(signal)) => return Err(End::Signal(signal)),
            Ok(Event::Gone) | Err(_) => return Err(End::Exit),
        }
    }
    Ok(pumps)
}

fn wait(child: &mut Child, events: &mpsc::Receiver<Event>) -> Result<End> {
    let end = loop {
        match events.recv() {
            Ok(Event::Signal(signal)) => break End::Signal(signal),
            Ok(Event::Gone) | Err(_) => break End::Exit,
            Ok(Event::Connected) => {}
        }
    };
    if matches!(end, End::Signal(_)) {
        let _ = child.kill();
    }
    child.wait().context("cannot wait for QEMU")?;
    Ok(end)
}

fn finish_early(
    mut child: Child,
    complaint: thread::JoinHandle<String>,
    end: End,
    job: &Path,
) -> Result<ExitCode> {
    let _ = child.kill();
    child.wait().context("cannot wait for QEMU")?;
    match end {
        End::Signal(signal) => Ok(ExitCode::from(128 + signal as u8)),
        End::Exit => Err(broken(job, &complaint.join().unwrap_or_default())),
    }
}

/// Tells when the process has ended, without reaping it.
fn watch_process(id: u32, tell: mpsc::Sender<Event>) {
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    thread::spawn(move || {
        let process = nix::unistd::Pid::from_raw(id.cast_signed());
        while waitid(Id::Pid(process), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(nix::Error::EINTR)
        {
        }
        let _ = tell.send(Event::Gone);
    });
}

fn pump(mut from: UnixStream, to: &mut dyn Write) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if to.write_all(&buffer[..length]).and_then(|()| to.flush()).is_err() {
                    // Our reader is gone: go on reading, so that the machine does not hang.
                    let _ = io::copy(&mut from, &mut io::sink());
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Our standard input, to its end. The thread may outlive the run, waiting for input that nobody wants; it ends with the process.
fn pump_input(mut to: UnixStream) {
    let _ = io::copy(&mut io::stdin().lock(), &mut to);
    // Only our direction, and then until QEMU has taken everything: QEMU drops what it has not read yet when the whole socket closes.
    let _ = to.shutdown(Shutdown::Write);
    let _ = io::copy(&mut to, &mut io::sink());
}

fn broken(job: &Path, said: &str) -> anyhow::Error {
    let log = fs::read(job.join("console.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let kept = std::env::temp_dir().join(format!("coracle-lab-console-{}.log", std::process::id()));
    let place = match fs::write(&kept, log.as_bytes()) {
        Ok(()) => format!("its console is kept in {}", kept.display()),
        Err(error) => format!("its console could not be kept: {error}"),
    };
    let lines: Vec<&str> = log.lines().collect();
    let tail = lines[lines.len().saturating_sub(15)..].join("\n");
    anyhow::anyhow!("the lab ended before the command did; {place}\n{}\n{tail}", said.trim())
}

fn qemu(system: &System, options: &Options, job: &Path) -> Result<std::process::Command> {
    let path = |name: &str| -> Result<String> {
        let path = job.join(name);
        let text = path.to_str().context("the temporary folder's path is not UTF-8")?;
        if text.contains(',') {
            bail!("the temporary folder's path must not contain a comma: {text}");
        }
        Ok(text.to_owned())
    };
    let model = if nix::unistd::geteuid().is_root() { "passthrough" } else { "none" };
    // setpriv makes QEMU die with us even when we are killed.
    let mut command = shell::command("setpriv", ["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    command
        .args([
            "-accel",
            "tcg",
            "-M",
            "q35",
            "-cpu",
            CPU,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        // One processor: with two, QEMU before 8.1 can translate code at the very moment when the other processor writes it, and run
        // the half of it for ever. The lab's kernel and its guests patch themselves all the time: static keys, BPF.
        .args(["-smp", "1", "-m", &options.memory.to_string()])
        .arg("-kernel")
        .arg(&system.kernel)
        .arg("-initrd")
        .arg(&system.initramfs)
        .args(["-append", APPEND])
        .args(["-serial", &format!("file:{}", path("console.log")?)])
        // For looking into a machine that hangs: `socat - unix:/tmp/coracle-lab-…/monitor`, then `info registers -a`.
        .args(["-monitor", &format!("unix:{},server=on,wait=off", path("monitor")?)])
        .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
        .args([
            "-virtfs",
            &format!("local,path=/,mount_tag=root,security_model={model},readonly=on,multidevs=remap"),
        ])
        .args(["-virtfs", &format!("local,path={},mount_tag=job,security_model={model}", path("job")?)]);
    if let Some(out) = &options.out {
        let out = out.canonicalize().with_context(|| format!("cannot find {}", out.display()))?;
        let out = out
            .to_str()
            .filter(|text| !text.contains(','))
            .context("the path of --out must be UTF-8 and without a comma")?;
        command.args(["-virtfs", &format!("local,path={out},mount_tag=out,security_model={model}")]);
    }
    for name in ["stdin", "stdout", "stderr"] {
        command
            .args(["-chardev", &format!("socket,id={name},path={}", path(name)?)])
            .args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
    }
    Ok(command)
}

fn script(arguments: &[String], out: bool) -> Result<String> {
    let mut script = String::from("# The job, written by xtask.\n");
    for (name, value) in std::env::vars() {
        let kept =
            KEPT.contains(&name.as_str()) || KEPT_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if kept && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            writeln!(script, "export {name}={}", shell::quote(&value))?;
        }
    }
    let _ = writeln!(script, "export CORACLE_LAB=1 CORACLE_LAB_OUT={OUT}; mkdir -p {OUT}");
    if out {
        writeln!(
            script,
            "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none out {OUT} || exit 125"
        )?;
    }
    let folder = std::env::current_dir().context("cannot find the current folder")?;
    let folder = folder.to_str().context("the current folder's path is not UTF-8")?;
    writeln!(script, "cd {} || exit 125", shell::quote(folder))?;
    script.push_str("exec");
    for argument in arguments {
        write!(script, " {}", shell::quote(argument))?;
    }
    script.push('\n');
    Ok(script)
}

/// The signals that ask us to end, held back so that we end in order.
pub(super) struct Signals(SigSet);

impl Signals {
    /// Holds the signals back from this thread, and from the threads and programs that it starts from now on, until the value is dropped.
    pub(super) fn hold() -> Result<Self> {
        let set = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect::<SigSet>();
        set.thread_block().context("cannot hold signals back")?;
        Ok(Self(set))
    }

    fn watch(&self, tell: mpsc::Sender<Event>) -> Result<()> {
        let set = self.0;
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                while let Ok(signal) = set.wait() {
                    if tell.send(Event::Signal(signal)).is_err() {
                        return;
                    }
                }
            })
            .map(drop)
            .context("cannot start a thread")
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        let _ = self.0.thread_unblock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_keeps_its_words_and_its_folder() {
        let words = ["echo".to_owned(), "it's $HOME".to_owned()];
        let script = script(&words, false).unwrap();
        let here = std::env::current_dir().unwrap();
        assert!(script.contains(&format!("cd {}", here.display())), "{script}");
        assert!(script.ends_with("exec echo 'it'\\''s $HOME'\n"), "{script}");
        assert!(!script.contains("mount -t 9p"), "{script}");
    }
}
