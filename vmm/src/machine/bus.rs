//! The registers of the machine: which device answers at which address. Reads of nothing give all ones; writes to nothing
//! are ignored.

use std::sync::{Mutex, PoisonError};

use crate::arch::x86_64::layout;
use crate::devices::serial::SerialPort;
use crate::devices::transport::Transport;
use crate::hypervisor::{Bus, Flow};

pub(super) struct MachineBus {
    transports: Vec<Mutex<Transport>>,
    serial: Mutex<SerialPort>,
}

impl MachineBus {
    pub(super) fn new(transports: Vec<Transport>, serial: SerialPort) -> Self {
        Self { transports: transports.into_iter().map(Mutex::new).collect(), serial: Mutex::new(serial) }
    }

    /// The device at an address and the offset in its window.
    fn transport(&self, address: u64) -> Option<(&Mutex<Transport>, u64)> {
        let offset = address.checked_sub(layout::MMIO_BEGIN)?;
        let index = usize::try_from(offset / layout::MMIO_WINDOW).ok()?;
        Some((self.transports.get(index)?, offset % layout::MMIO_WINDOW))
    }

    /// The serial port and its register.
    fn serial(&self, port: u16) -> Option<(&Mutex<SerialPort>, u8)> {
        let register = port.checked_sub(layout::SERIAL_PORT).filter(|register| *register < 8)?;
        Some((&self.serial, register as u8))
    }
}

impl Bus for MachineBus {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.transport(address) {
            Some((transport, offset)) => {
                transport.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.transport(address) {
            transport.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == layout::RESET_PORT {
            // The keyboard controller is always ready to be told to reset.
            data.fill(0);
        } else if let Some((serial, register)) = self.serial(port) {
            serial.lock().unwrap_or_else(PoisonError::into_inner).read(register, data);
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) -> Flow {
        if port == layout::RESET_PORT && data == [layout::RESET_COMMAND] {
            return Flow::Reset;
        }
        if let Some((serial, register)) = self.serial(port) {
            serial.lock().unwrap_or_else(PoisonError::into_inner).write(register, data);
        }
        Flow::Continue
    }
}
