//! A machine: memory, processors and devices, built from a boot request and the descriptors that came with it. Building
//! either succeeds as a whole or leaves nothing behind.

mod bus;
mod command_line;
mod processors;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::{self as arch, ArchError, boot, layout};
use crate::clock;
use crate::control::{Boot, ExitCounts, ExitReason};
use crate::devices::VirtioDevice;
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, DataDisk, DiskError, LayersDisk, Segments};
use crate::devices::fs::{Fs, FsError};
use crate::devices::rng::Rng;
use crate::devices::serial::{SerialPort, Tail};
use crate::devices::transport::{EventError, QUEUE_NOTIFY, Transport};
use crate::devices::vsock::{Accepted, Vsock, VsockHandle};
use crate::devices::worker::{Command, Commands, SpawnError};
use crate::hypervisor::{self, Hypervisor, HypervisorError, Line, Start};
use crate::memory::{self, Memory, MemoryError};

use bus::MachineBus;
use processors::Processors;

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("{0} virtual processors are not possible: give 1 to {max}", max = arch::MAX_VCPUS)]
    Vcpus(u32),
    #[error("the boot request came without one of its descriptors")]
    MissingFd,
    #[error(transparent)]
    Arch(#[from] ArchError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    FileServer(#[from] FsError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    Event(#[from] EventError),
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// What a machine reports from its threads.
#[derive(Debug)]
pub(crate) enum Report {
    /// The guest connected to a port of the host.
    Accepted(Accepted),
    /// It is over.
    Ended(ExitReason),
}

/// Where the machine's threads report to.
#[derive(Debug, Clone)]
pub(crate) struct Reports {
    pub(crate) sender: Sender<Report>,
    pub(crate) wake: Arc<EventFd>,
}

impl Reports {
    pub(crate) fn send(&self, report: Report) {
        // Nobody listens any more when the VMM is about to end.
        let _ = self.sender.send(report);
        // Fails only when 2^64 reports are pending.
        let _ = self.wake.write(1);
    }
}

/// A device's thread and how to end it.
struct DeviceThread {
    stop: Box<dyn Fn() + Send>,
    thread: JoinHandle<()>,
}

/// A machine that runs, or is paused.
pub(crate) struct Machine {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) vsock: VsockHandle,
    pub(crate) segments: Segments,
    pub(crate) kernel_mapped: u64,
    pub(crate) vcpus_started: u64,
    tail: Tail,
    processors: Processors,
    threads: Vec<DeviceThread>,
    _hypervisor_machine: Box<dyn hypervisor::Machine>,
}

impl Machine {
    /// Builds the machine and starts it. `fds` are the kernel, the initramfs, the data disk, and the serial log and the file server's
    /// socket if asked for.
    pub(crate) fn boot(
        hypervisor: &dyn Hypervisor,
        request: &Boot,
        fds: Vec<OwnedFd>,
        reports: &Reports,
    ) -> Result<Self, MachineError> {
        if request.vcpus == 0 || request.vcpus > arch::MAX_VCPUS {
            return Err(MachineError::Vcpus(request.vcpus));
        }
        let mut fds = fds.into_iter();
        let mut next_fd = || fds.next().ok_or(MachineError::MissingFd);
        let (kernel, initramfs, data_disk) = (File::from(next_fd()?), File::from(next_fd()?), next_fd()?);
        let serial = if request.serial { Some(next_fd()?) } else { None };
        let file_server = if request.file_server { Some(next_fd()?) } else { None };

        let ranges = layout::memory_ranges(request.memory_mib)?;
        memory::check_host(request.memory_mib)?;
        // A file server works in the guest's memory itself. Other machines keep theirs to themselves, in huge pages on more hosts.
        let memory = match file_server {
            Some(_) => memory::allocate_shared(&ranges)?,
            None => memory::allocate(&ranges)?,
        };
        let data_disk = DataDisk::new(data_disk, request.data_disk.len)?;
        let segments = Segments::new(request.layers_capacity)?;
        let entry = boot::prepare(
            &memory,
            &boot::BootImage {
                kernel: (&kernel, request.kernel),
                initramfs: (&initramfs, request.initramfs),
                command_line: &command_line::build(DEVICES + u32::from(request.file_server), request),
                vcpus: request.vcpus as u8,
            },
        )?;
        let kernel_mapped = clock::now();

        let machine = hypervisor.create_machine(&memory)?;
        let tail = Tail::default();
        let mut devices = Devices { threads: Vec::new(), list: Vec::new() };
        let vsock = devices.add_all(data_disk, &segments, reports)?;
        if let Some(socket) = file_server {
            devices.add_file_system(socket, request.vcpus)?;
        }
        let bus =
            connect(machine.as_ref(), &memory, std::mem::take(&mut devices.list), serial, tail.clone())?;
        let processors = machine.create_processors(Start { vcpus: request.vcpus, entry })?;
        let processors = Processors::start(processors, &Arc::new(bus), reports)
            .map_err(|source| MachineError::System { action: "start a processor's thread", source })?;
        Ok(Self {
            vcpus: request.vcpus,
            memory_mib: request.memory_mib,
            vsock,
            segments,
            kernel_mapped,
            vcpus_started: clock::now(),
            tail,
            processors,
            threads: std::mem::take(&mut devices.threads),
            _hypervisor_machine: machine,
        })
    }

    pub(crate) fn pause(&self) {
        self.processors.pause();
    }

    pub(crate) fn resume(&self) {
        self.processors.resume();
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.processors.is_paused()
    }

    pub(crate) fn exits(&self) -> ExitCounts {
        self.processors.exits()
    }

    /// What the guest printed last.
    pub(crate) fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Ends the processors, then the devices.
    pub(crate) fn stop(self) {
        self.processors.stop();
        stop_threads(self.threads);
    }
}

/// Number of the virtio devices that every machine has, for the command line.
const DEVICES: u32 = 5;

/// The devices of a machine under construction; what was started is stopped again if the construction fails.
struct Devices {
    threads: Vec<DeviceThread>,
    list: Vec<Box<dyn VirtioDevice>>,
}

impl Devices {
    /// In the order that the guest relies on: vsock, rng, data disk, layers disk, balloon.
    fn add_all(
        &mut self,
        data_disk: DataDisk,
        segments: &Segments,
        reports: &Reports,
    ) -> Result<VsockHandle, SpawnError> {
        let reports = reports.clone();
        let (vsock, handle, thread) = Vsock::new(move |accepted| reports.send(Report::Accepted(accepted)))?;
        let stop = handle.clone();
        self.threads.push(DeviceThread { stop: Box::new(move || stop.stop()), thread });
        self.list.push(Box::new(vsock));
        let (rng, commands, thread) = Rng::new()?;
        self.add(Box::new(rng), commands, thread);
        let (block, commands, thread) = Block::new(data_disk)?;
        self.add(Box::new(block), commands, thread);
        let (block, commands, thread) = Block::new(LayersDisk::new(segments.clone()))?;
        self.add(Box::new(block), commands, thread);
        let (balloon, commands, thread) = Balloon::new()?;
        self.add(Box::new(balloon), commands, thread);
        Ok(handle)
    }

    /// After the others, so that those stand where they stand in any machine.
    fn add_file_system(&mut self, socket: OwnedFd, vcpus: u32) -> Result<(), FsError> {
        let (fs, stop, thread) = Fs::new(socket, vcpus)?;
        self.threads.push(DeviceThread { stop: Box::new(stop), thread });
        self.list.push(Box::new(fs));
        Ok(())
    }

    fn add(&mut self, device: Box<dyn VirtioDevice>, commands: Commands<()>, thread: JoinHandle<()>) {
        self.threads.push(DeviceThread { stop: Box::new(move || commands.send(Command::Stop)), thread });
        self.list.push(device);
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        stop_threads(std::mem::take(&mut self.threads));
    }
}

fn stop_threads(threads: Vec<DeviceThread>) {
    for device in &threads {
        (device.stop)();
    }
    for device in threads {
        // Panics were reported by the thread itself.
        let _ = device.thread.join();
    }
}

/// Puts every device at its address, on its interrupt line.
fn connect(
    machine: &dyn hypervisor::Machine,
    memory: &Memory,
    devices: Vec<Box<dyn VirtioDevice>>,
    serial: Option<OwnedFd>,
    tail: Tail,
) -> Result<MachineBus, MachineError> {
    let mut transports = Vec::new();
    for (index, device) in (0u32..).zip(devices) {
        let line = new_line(machine, layout::FIRST_DEVICE_LINE + index)?;
        let transport = Transport::new(device, memory.clone(), line)?;
        let address = layout::MMIO_BEGIN + u64::from(index) * layout::MMIO_WINDOW + QUEUE_NOTIFY;
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            machine.connect_doorbell(kick, address, queue)?;
        }
        transports.push(transport);
    }
    let line = new_line(machine, layout::SERIAL_LINE)?;
    let serial = SerialPort::new(serial, tail, line)
        .map_err(|source| MachineError::System { action: "use the serial log", source })?;
    Ok(MachineBus::new(transports, serial))
}

fn new_line(machine: &dyn hypervisor::Machine, line: u32) -> Result<EventFd, MachineError> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| MachineError::System { action: "make an event for an interrupt", source })?;
    machine.connect_line(&event, Line(line))?;
    Ok(event)
}
