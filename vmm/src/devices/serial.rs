//! A 16550 serial port for debugging: what the guest prints goes to a descriptor, line by line. Output that the
//! descriptor does not take at once is lost; the guest never waits for it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

const LINE_MAX: usize = 256;

/// The port.
pub(crate) struct SerialPort {
    serial: Serial<LineEvent, vm_superio::serial::NoEvents, LineWriter>,
}

struct LineEvent(EventFd);

impl Trigger for LineEvent {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialPort {
    /// `line` raises the port's interrupt line.
    pub(crate) fn new(sink: OwnedFd, line: EventFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&sink)?;
        fcntl_setfl(&sink, flags | OFlags::NONBLOCK)?;
        let writer = LineWriter { sink: File::from(sink), pending: Vec::with_capacity(LINE_MAX) };
        Ok(Self { serial: Serial::new(LineEvent(line), writer) })
    }

    /// A read of a register, 0 to 7.
    pub(crate) fn read(&mut self, register: u8, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.serial.read(register);
        }
    }

    /// A write of a register, 0 to 7.
    pub(crate) fn write(&mut self, register: u8, data: &[u8]) {
        if let [byte] = data {
            // A failed interrupt or a full sink costs debugging output and nothing else.
            let _ = self.serial.write(register, *byte);
        }
    }
}

struct LineWriter {
    sink: File,
    pending: Vec<u8>,
}

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= LINE_MAX || self.pending.contains(&b'\n') {
            let result = self.sink.write(&self.pending);
            self.pending.clear();
            result?;
        }
        Ok(bytes.len())
    }

    /// The port flushes after every byte; lines are flushed when they are complete.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        // The last line, if it has no end. As good as it gets.
        let _ = self.sink.write(&self.pending);
    }
}
