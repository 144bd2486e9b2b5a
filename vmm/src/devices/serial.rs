//! A 16550 serial port: where a kernel that panics leaves its last words. What the guest prints is kept for a while, and goes to a
//! descriptor too if debugging was asked for, line by line; what that does not take at once is lost, the guest never waits.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

const LINE_MAX: usize = 256;
/// A panic with its registers, call trace and modules is about half of this.
const TAIL_MAX: usize = 16 * 1024;
/// What a kernel says first when it panics, and how much of what follows is of interest.
const PANIC: &str = "Kernel panic - not syncing: ";
const PANIC_MAX: usize = 300;

/// The end of what the guest printed, shared with whoever wants to know why it died. The guest may write anything here: it is
/// shown to people and believed by nobody.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = &bytes[bytes.len().saturating_sub(TAIL_MAX)..];
        let excess = (tail.len() + newest.len()).saturating_sub(TAIL_MAX);
        tail.drain(..excess);
        tail.extend(newest);
    }

    /// All of it, in printable characters.
    pub(crate) fn text(&self) -> String {
        let bytes: Vec<u8> = {
            let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            tail.iter().copied().filter(|byte| *byte != b'\r').collect()
        };
        let printable = |c: char| if c == '\n' || !c.is_control() { c } else { '.' };
        String::from_utf8_lossy(&bytes).chars().map(printable).collect()
    }

    /// Why the guest's kernel panicked, if it did.
    pub(crate) fn panic(&self) -> Option<String> {
        let text = self.text();
        let message = &text[text.rfind(PANIC)? + PANIC.len()..];
        Some(message.lines().next().unwrap_or_default().chars().take(PANIC_MAX).collect())
    }
}

/// The port.
pub(crate) struct SerialPort {
    serial: Serial<LineEvent, vm_superio::serial::NoEvents, Output>,
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
    pub(crate) fn new(sink: Option<OwnedFd>, tail: Tail, line: EventFd) -> io::Result<Self> {
        if let Some(sink) = &sink {
            let flags = fcntl_getfl(sink)?;
            fcntl_setfl(sink, flags | OFlags::NONBLOCK)?;
        }
        let sink =
            sink.map(|sink| LineWriter { sink: File::from(sink), pending: Vec::with_capacity(LINE_MAX) });
        Ok(Self { serial: Serial::new(LineEvent(line), Output { tail, sink }) })
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

struct Output {
    tail: Tail,
    sink: Option<LineWriter>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        match &mut self.sink {
            Some(sink) => sink.write(bytes),
            None => Ok(bytes.len()),
        }
    }

    /// The port flushes after every byte; lines are flushed when they are complete.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct LineWriter {
    sink: File,
    pending: Vec<u8>,
}

impl LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= LINE_MAX || self.pending.contains(&b'\n') {
            let result = self.sink.write(&self.pending);
            self.pending.clear();
            result?;
        }
        Ok(bytes.len())
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        // The last line, if it has no end. As good as it gets.
        let _ = self.sink.write(&self.pending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn a_panics_message_is_found_among_the_last_words() {
        let tail = Tail::default();
        let mut port = SerialPort::new(None, tail.clone(), EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        for byte in b"[    0.5] Kernel panic - not syncing: Attempted to kill init!\x1b[31m exitcode=0xb\r\nCPU: 0\r\n" {
            port.write(0, &[*byte]);
        }
        assert_eq!(tail.panic().unwrap(), "Attempted to kill init!.[31m exitcode=0xb");
        assert!(tail.text().ends_with("CPU: 0\n"));
    }

    #[test]
    fn only_the_end_of_much_output_is_kept() {
        let tail = Tail::default();
        for number in 0..100_000u32 {
            tail.push(&number.to_le_bytes());
        }
        tail.push(&vec![b'x'; 10 * TAIL_MAX]);
        tail.push(b"end");
        assert_eq!(tail.text().len(), TAIL_MAX);
        assert!(tail.text().ends_with("xend") && tail.panic().is_none());
    }

    #[test]
    fn a_panic_without_an_end_of_line_is_cut_to_a_sensible_length() {
        let tail = Tail::default();
        tail.push(PANIC.as_bytes());
        assert_eq!(tail.panic().unwrap(), "");
        tail.push("ä".repeat(4000).as_bytes());
        assert_eq!(tail.panic().unwrap().chars().count(), PANIC_MAX);
    }
}
