//! The processors' threads: one each, running until they are paused, stopped, or the guest is over.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::bus::MachineBus;
use super::{Report, Reports};
use crate::control::{ExitCounts, ExitReason};
use crate::hypervisor::{Exit, Processor, kick};
use crate::jail::{Role, narrow};
use crate::sys::STACK;

/// All processors of a machine.
pub(super) struct Processors {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    counters: Vec<Arc<Counters>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct GateState {
    wanted: Wanted,
    /// Threads that do not run the guest now: paused or ended.
    standing: usize,
}

/// What the threads should do. It is looked at before each run; whoever changes it kicks the threads.
#[derive(Debug)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

/// One processor's exits. Only its own thread writes them.
#[derive(Debug, Default)]
struct Counters {
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    pio_read: AtomicU64,
    pio_write: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

impl Processors {
    pub(super) fn start(
        processors: Vec<Box<dyn Processor>>,
        bus: &Arc<MachineBus>,
        reports: &Reports,
    ) -> io::Result<Self> {
        let state = GateState { wanted: Wanted::Run, standing: 0 };
        let gate = Arc::new(Gate { state: Mutex::new(state), changed: Condvar::new() });
        let mut all = Self { threads: Vec::new(), gate, counters: Vec::new() };
        for (index, processor) in processors.into_iter().enumerate() {
            let counters = Arc::new(Counters::default());
            let (gate, bus, reports) = (Arc::clone(&all.gate), Arc::clone(bus), reports.clone());
            let for_thread = Arc::clone(&counters);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK)
                .spawn(move || run(processor, &bus, &gate, &for_thread, &reports));
            match thread {
                Ok(thread) => all.threads.push(thread),
                Err(error) => {
                    all.stop();
                    return Err(error);
                }
            }
            all.counters.push(counters);
        }
        Ok(all)
    }

    /// Returns when no processor runs any more.
    pub(super) fn pause(&self) {
        self.change(Wanted::Pause);
        let mut state = self.gate.lock();
        while state.wanted == Wanted::Pause && state.standing < self.threads.len() {
            state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn resume(&self) {
        self.change(Wanted::Run);
    }

    pub(super) fn is_paused(&self) -> bool {
        self.gate.lock().wanted == Wanted::Pause
    }

    pub(super) fn stop(self) {
        self.change(Wanted::Stop);
        for thread in self.threads {
            // A panic of a processor's thread was printed by it.
            let _ = thread.join();
        }
    }

    fn change(&self, wanted: Wanted) {
        self.gate.lock().wanted = wanted;
        self.gate.changed.notify_all();
        if wanted != Wanted::Run {
            self.threads.iter().for_each(kick);
        }
    }

    pub(super) fn exits(&self) -> ExitCounts {
        let mut sum = ExitCounts::default();
        for counters in &self.counters {
            for (total, counter) in [
                (&mut sum.mmio_read, &counters.mmio_read),
                (&mut sum.mmio_write, &counters.mmio_write),
                (&mut sum.pio_read, &counters.pio_read),
                (&mut sum.pio_write, &counters.pio_write),
                (&mut sum.interrupted, &counters.interrupted),
                (&mut sum.other, &counters.other),
            ] {
                *total += counter.load(Ordering::Relaxed);
            }
        }
        sum
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while paused. `None`: stop; `Some(true)`: there was a pause.
    fn pass(&self) -> Option<bool> {
        let mut state = self.lock();
        let mut paused = false;
        while state.wanted == Wanted::Pause {
            if !paused {
                paused = true;
                state.standing += 1;
                self.changed.notify_all();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if paused {
            state.standing -= 1;
        }
        (state.wanted == Wanted::Run).then_some(paused)
    }

    fn ended(&self) {
        self.lock().standing += 1;
        self.changed.notify_all();
    }
}

fn run(
    mut processor: Box<dyn Processor>,
    bus: &MachineBus,
    gate: &Gate,
    counters: &Counters,
    reports: &Reports,
) {
    processor.prepare_thread();
    let narrowed = narrow(Role::Processor);
    let reason = loop {
        if let Err(error) = &narrowed {
            break Some(ExitReason::Failed { message: format!("its thread cannot be confined: {error}") });
        }
        match gate.pass() {
            Some(false) => {}
            Some(true) => processor.resumed(),
            None => break None,
        }
        if let Some(reason) = run_until_interrupted(processor.as_mut(), bus, counters) {
            break Some(reason);
        }
    };
    gate.ended();
    if let Some(reason) = reason {
        reports.send(Report::Ended(reason));
    }
}

/// Runs the guest until a kick (`None`) or until the machine is over.
fn run_until_interrupted(
    processor: &mut dyn Processor,
    bus: &MachineBus,
    counters: &Counters,
) -> Option<ExitReason> {
    loop {
        let exit = processor.run(bus);
        let counter = match exit {
            Exit::MmioRead => &counters.mmio_read,
            Exit::MmioWrite => &counters.mmio_write,
            Exit::PioRead => &counters.pio_read,
            Exit::PioWrite | Exit::Reset => &counters.pio_write,
            Exit::Interrupted => &counters.interrupted,
            Exit::Shutdown | Exit::Other | Exit::Failed(_) => &counters.other,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        match exit {
            Exit::Interrupted => return None,
            Exit::Reset => return Some(ExitReason::GuestReset),
            Exit::Shutdown => return Some(ExitReason::TripleFault),
            Exit::Failed(message) => return Some(ExitReason::Failed { message }),
            Exit::MmioRead | Exit::MmioWrite | Exit::PioRead | Exit::PioWrite | Exit::Other => {}
        }
    }
}
