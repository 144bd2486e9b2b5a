//! How a machine comes up, and how one that runs already is taken over by a new daemon.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use coracle_agent_api::Hello;
use coracle_engine::sandbox::Running;
use coracle_vmm::{
    control::{Boot, BootFds, BootTimes, Client, DataDisk, MachineState},
    probe::{self, ProbeError},
};

use super::{
    Current, Shared, agent, disk,
    files::Files,
    folder::{BootRecord, Folder},
    guest::Guest,
    layers::{self, Layers},
    machine::{self, Machine},
    process::{self, VmmProcess},
};
use crate::{
    clock::monotonic_micros,
    failure::describe,
    settings::{MachineSize, Settings},
};

/// From the boot request to the agent's first word; also slow emulated processors make it.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);
/// A machine that is not up after this much longer than usual makes one wonder.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long an adopted VMM may take to say something.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(10);
/// What a machine still had open when it ended is let go within this time.
const DISK_TIMEOUT: Duration = Duration::from_secs(20);
/// Set (to anything) to have the guest's serial port written to `serial.log`.
const SERIAL_VARIABLE: &str = "CORACLE_SERIAL";

/// Boots a machine and waits for its agent.
pub(super) async fn boot(shared: &Shared) -> Result<(Current, Running)> {
    let mut phases = Phases::new();
    let mut stops = shared.stops.subscribe();
    let proof = proof();
    let size = Settings::load(&shared.settings)?.machine_size()?;
    let folder = shared.folder.clone();
    let prepared = tokio::task::spawn_blocking(move || Prepared::new(&folder, size));
    let prepared = tokio::time::timeout(DISK_TIMEOUT, prepared).await.map_err(|_| {
        anyhow!("another machine still has the data disk in {} open", shared.folder.path().display())
    })???;
    phases.now("disk-ready");

    let listener = shared.folder.listen()?;
    let log = shared.folder.open_log(&shared.folder.vmm_log())?;
    // The file server comes up while the machine does: nobody waits for it but the first who wants a file. It ends when what follows fails.
    let (files, socket) = Files::start(&shared.folder)?;
    let process = process::spawn(listener, log)?;
    tracing::info!(vm = %shared.id, pid = process.pid, cpus = size.cpus, memory_mib = size.memory_mib, "starting the VMM");
    phases.now("spawned");
    let mut record = BootRecord {
        pid: process.pid,
        file_server_pid: files.pid(),
        started_micros: phases.start,
        hello: None,
        boot: Vec::new(),
    };
    shared.folder.save_boot(&record)?;
    let brought_up = tokio::select! {
        brought_up = bring_up(shared, prepared, socket, &process, &mut phases) => brought_up,
        error = proof => Err(error),
        _ = stops.changed() => Err(anyhow!("it was told to stop while it started")),
    };
    match brought_up {
        Ok((machine, hello, layers)) => {
            record.hello = Some(hello);
            record.boot = phases.list;
            shared.folder.save_boot(&record)?;
            let running = Running {
                instance: shared.next_instance(),
                boot: record.phases(),
                hello: record.hello,
                adopted: false,
                lost: None,
            };
            let layers = Arc::new(tokio::sync::Mutex::new(layers));
            Ok((Current { machine, layers, files, process: Some(process) }, running))
        }
        Err(error) => {
            process.kill();
            process.wait().await;
            files.end().await;
            Err(explain(shared, error).await)
        }
    }
}

async fn bring_up(
    shared: &Shared,
    prepared: Prepared,
    file_server: OwnedFd,
    process: &VmmProcess,
    phases: &mut Phases,
) -> Result<(Arc<Machine>, Hello, Layers)> {
    let control = shared.folder.connect()?.context("the virtual machine monitor does not listen")?;
    let (machine, ready) = Machine::new(control)?;
    phases.now("control-connected");
    machine.listen_for_agent().await?;
    let build = move |client: &Client| {
        let Prepared { guest, data_disk, serial, boot } = prepared;
        let fds = BootFds {
            kernel: guest.kernel.file.as_fd(),
            initramfs: guest.initramfs.file.as_fd(),
            data_disk: data_disk.as_fd(),
            serial: serial.as_ref().map(AsFd::as_fd),
            file_server: Some(file_server.as_fd()),
        };
        client.boot(boot, fds)
    };
    machine.call(build).await.context("cannot build the machine")?;
    phases.now("booted");
    let layers = Layers::fresh(Layers::record_in(shared.folder.path()))?;
    let hello = async {
        let mut stream =
            ready.await.map_err(|_| anyhow!("the machine ended: {}", "its agent never called"))?;
        machine::read_hello(&mut stream).await
    };
    let hello = tokio::select! {
        hello = tokio::time::timeout(BOOT_TIMEOUT, hello) => match hello {
            Ok(hello) => hello?,
            Err(_) => bail!("its agent was not ready within {} seconds", BOOT_TIMEOUT.as_secs()),
        },
        reason = machine.end() => bail!("the machine ended while it started: {reason}"),
        status = process.wait() => bail!("the virtual machine monitor ended ({})", exit_words(status)),
    };
    phases.now("agent-ready");
    let status =
        machine.call(|client| client.status()).await.context("cannot ask the virtual machine monitor")?;
    phases.add_times(&status.times);
    Ok((machine, hello, layers))
}

fn exit_words(status: Option<std::process::ExitStatus>) -> String {
    status.map_or_else(|| "nobody knows how".to_owned(), |status| status.to_string())
}

/// If a machine takes long to come up, tries whether KVM works here, once in a daemon's life: some KVMs let a machine begin
/// and never get anywhere. Ready only if it does not work.
async fn proof() -> anyhow::Error {
    static PROVED: AtomicBool = AtomicBool::new(false);
    if !PROVED.load(Ordering::Relaxed) {
        tokio::time::sleep(PATIENCE).await;
        match tokio::task::spawn_blocking(probe::probe).await {
            // A refusal may be a passing one, and the machine that boots knows better.
            Ok(Err(ProbeError::Refused(..) | ProbeError::Open(_))) => {}
            Ok(Err(error)) => return no_kvm(error),
            _ => PROVED.store(true, Ordering::Relaxed),
        }
    }
    std::future::pending().await
}

fn no_kvm(error: ProbeError) -> anyhow::Error {
    anyhow::Error::new(error).context("a virtual machine cannot run here (`coracle doctor` says more)")
}

/// Adds to an error what the VMM said last, or that KVM does not work here at all.
async fn explain(shared: &Shared, error: anyhow::Error) -> anyhow::Error {
    if error.chain().any(|cause| cause.is::<ProbeError>()) {
        return error;
    }
    if let Ok(Err(probe)) = tokio::task::spawn_blocking(probe::probe).await {
        return no_kvm(probe);
    }
    let log = shared.folder.vmm_log();
    let advice = match process::last_words(&log).as_str() {
        "" => format!("{} and `coracle doctor` may say more", log.display()),
        words => format!("the virtual machine monitor said: {words}"),
    };
    anyhow!("{} ({advice})", describe(&error))
}

/// Takes over a machine that an earlier daemon has started; `None` if none runs.
pub(super) async fn adopt(shared: &Shared) -> Result<Option<(Current, Running)>> {
    let Some(control) = shared.folder.connect()? else { return Ok(None) };
    let (machine, ready) = Machine::new(control)?;
    let status = tokio::time::timeout(ADOPT_TIMEOUT, machine.call(|client| client.status())).await;
    match status {
        Ok(Ok(status)) if matches!(status.state, MachineState::Running | MachineState::Paused) => {}
        Ok(Ok(_)) => {
            // Its daemon died before it could boot it, or it is ending.
            let _ = machine.call(|client| client.stop()).await;
            machine.end().await;
            return Ok(None);
        }
        Ok(Err(_)) => return Ok(None),
        Err(_) => {
            bail!("a virtual machine monitor runs in {} and does not answer", shared.folder.path().display())
        }
    }
    machine.listen_for_agent().await?;
    let mut record = shared.folder.load_boot();
    let hello = match record.as_ref().and_then(|record| record.hello.clone()) {
        Some(hello) => hello,
        None => {
            let Some(hello) = first_words(&machine, ready).await? else { return Ok(None) };
            if let Some(record) = &mut record {
                record.hello = Some(hello.clone());
                shared.folder.save_boot(record)?;
            }
            hello
        }
    };
    let stream = machine.connect().await.context("cannot reach the agent of the running machine")?;
    if let Err(error) = agent::answers(stream).await {
        if machine_ended(&machine).await {
            return Ok(None);
        }
        return Err(error.context("a machine runs already and its agent does not answer"));
    }
    let layers = settle_layers(shared, &machine).await?;
    let files = Files::adopt(&shared.folder).await;
    tracing::info!(vm = %shared.id, "took over a running machine");
    let running = Running {
        instance: shared.next_instance(),
        boot: record.map(|record| record.phases()).unwrap_or_default(),
        hello: Some(hello),
        adopted: true,
        lost: None,
    };
    let layers = Arc::new(tokio::sync::Mutex::new(layers));
    Ok(Some((Current { machine, layers, files, process: None }, running)))
}

/// The earlier daemon died before it had kept them: the machine is still starting, or they are still unread.
async fn first_words(machine: &Arc<Machine>, ready: machine::Ready) -> Result<Option<Hello>> {
    let hello = async {
        let mut stream = ready.await.map_err(|_| anyhow!("the agent never called"))?;
        machine::read_hello(&mut stream).await
    };
    tokio::select! {
        hello = tokio::time::timeout(BOOT_TIMEOUT, hello) => match hello {
            Ok(Ok(hello)) => Ok(Some(hello)),
            Ok(Err(_)) if machine_ended(machine).await => Ok(None),
            Ok(Err(error)) => Err(error),
            Err(_) => bail!("the agent of a machine that runs already does not call"),
        },
        _ = machine.end() => Ok(None),
    }
}

async fn machine_ended(machine: &Machine) -> bool {
    tokio::time::timeout(Duration::from_secs(1), machine.end()).await.is_ok()
}

/// Undoes what the earlier daemon was in the middle of.
async fn settle_layers(shared: &Shared, machine: &Arc<Machine>) -> Result<Layers> {
    let mut layers = Layers::load(Layers::record_in(shared.folder.path()));
    for (diff_id, slot) in layers.unsettled() {
        // Refused if the machine does not have it, which is what is wanted.
        let _ = machine.call(move |client| client.detach_segment(slot.start)).await;
        layers.forget(&diff_id)?;
    }
    Ok(layers)
}

/// Everything that a machine needs, opened.
struct Prepared {
    guest: Guest,
    data_disk: std::fs::File,
    serial: Option<std::fs::File>,
    boot: Boot,
}

impl Prepared {
    fn new(folder: &Folder, size: MachineSize) -> Result<Self> {
        let guest = Guest::open()?;
        folder.create()?;
        folder.forget_machine();
        let data_disk = disk::open(&folder.data_disk(), &guest.data, size.disk)?;
        let len = data_disk.metadata().context("cannot tell the data disk's size")?.len() / 4096 * 4096;
        let wants_serial = std::env::var_os(SERIAL_VARIABLE).is_some();
        let serial = wants_serial.then(|| folder.open_log(&folder.serial_log())).transpose()?;
        let boot = Boot {
            vcpus: size.cpus,
            memory_mib: size.memory_mib,
            kernel: guest.kernel.region,
            initramfs: guest.initramfs.region,
            data_disk: DataDisk { len },
            layers_capacity: layers::CAPACITY,
            cmdline_extra: String::new(),
            serial: serial.is_some(),
            file_server: true,
        };
        Ok(Self { guest, data_disk, serial, boot })
    }
}

/// The moments of a boot.
struct Phases {
    start: u64,
    list: Vec<(String, u64)>,
}

impl Phases {
    fn new() -> Self {
        Self { start: monotonic_micros(), list: Vec::new() }
    }

    fn now(&mut self, name: &str) {
        self.add(name, monotonic_micros());
    }

    fn add(&mut self, name: &str, monotonic_micros: u64) {
        self.list.push((name.to_owned(), monotonic_micros.saturating_sub(self.start)));
    }

    /// What the VMM saw, on the same clock.
    fn add_times(&mut self, times: &BootTimes) {
        let seen = [
            ("vmm-started", times.process_start),
            ("boot-requested", times.boot_request),
            ("kernel-mapped", times.kernel_mapped),
            ("vcpus-started", times.vcpus_started),
            ("vsock-activated", times.vsock_activated),
        ];
        for (name, nanos) in seen {
            if let Some(nanos) = nanos {
                self.add(name, nanos / 1000);
            }
        }
        self.list.sort_by_key(|(_, micros)| *micros);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_stand_in_the_order_of_time() {
        let mut phases = Phases { start: 100, list: Vec::new() };
        phases.add("agent-ready", 900);
        phases.add_times(&BootTimes {
            vcpus_started: Some(500_000),
            process_start: Some(50_000),
            ..BootTimes::default()
        });
        let names: Vec<_> = phases.list.iter().map(|(name, micros)| (name.as_str(), *micros)).collect();
        assert_eq!(names, [("vmm-started", 0), ("vcpus-started", 400), ("agent-ready", 800)]);
    }
}
