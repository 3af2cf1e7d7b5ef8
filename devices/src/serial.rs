// SPDX-License-Identifier: Apache-2.0

//! A 16550A serial port.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use acpi_tables::{
    Aml,
    aml::{self, EISAName, IO, Interrupt as InterruptResource, Name, Path, ResourceTemplate},
};
use vm_superio::{Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    bus::BusDevice,
    device::{Decoded, Device, ResetError},
};

/// Number of the device's ports.
pub const PORTS: u8 = 8;

const DATA: u8 = 0;
const IER: u8 = 1;
const IIR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const SCR: u8 = 7;
/// Bytes in the receive FIFO.
const FIFO: usize = 64;
/// Received data raises an interrupt.
const IER_RECEIVED: u8 = 1;
/// vm-superio's registers at power-on: 8 data bits, OUT2 set.
const LCR_POWER_ON: u8 = 3;
const LCR_DLAB: u8 = 0x80;
const MCR_POWER_ON: u8 = 8;
const DIVISOR_9600: [u8; 2] = [0x0c, 0];

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart = vm_superio::Serial<Interrupt, NoEvents, Box<dyn Write + Send>>;

/// A serial port. The guest's output goes to a sink byte by byte on the vCPU's thread: the sink must not wait, and
/// bytes that it refuses are lost, as on a line without a reader.
pub struct Serial {
    uart: Mutex<Uart>,
    place: Place,
}

/// The serial port's place in the machine.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its first port.
    pub port: u16,
    /// The pin of the IOAPIC that its interrupt raises.
    pub gsi: u32,
}

impl Serial {
    /// A port at `place` that signals `interrupt` and writes to `out`.
    #[must_use]
    pub fn new(place: Place, interrupt: EventFd, out: Box<dyn Write + Send>) -> Self {
        Self { uart: Mutex::new(Uart::new(Interrupt(interrupt), out)), place }
    }

    /// Puts bytes into the receive FIFO (64 bytes) and returns how many fitted. A full FIFO signals its interrupt
    /// again: on hardware the line is still high, and a guest that has missed the edge would never read.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let mut uart = self.uart();
        let fits = input.len().min(uart.fifo_capacity());
        if fits == 0 && !input.is_empty() {
            if uart.read(LCR) & LCR_DLAB == 0 && uart.read(IER) & IER_RECEIVED != 0 {
                let _ = uart.interrupt_evt().trigger();
            }
            return 0;
        }
        // A failed interrupt signal loses no byte: the guest may poll.
        uart.enqueue_raw_bytes(input.get(..fits).unwrap_or_default()).unwrap_or(fits)
    }

    /// The free bytes in the receive FIFO.
    pub fn capacity(&self) -> usize {
        self.uart().fifo_capacity()
    }

    fn power_on(&self) {
        let mut uart = self.uart();
        let mut set = |offset, value| {
            let _ = uart.write(offset, value);
        };
        set(LCR, LCR_DLAB);
        set(0, DIVISOR_9600[0]);
        set(1, DIVISOR_9600[1]);
        set(LCR, LCR_POWER_ON);
        set(IER, 0);
        set(MCR, MCR_POWER_ON);
        set(SCR, 0);
        // Reading the data register pops the FIFO of at most 64 bytes, and reading IIR clears it.
        for _ in 0..FIFO {
            uart.read(DATA);
        }
        uart.read(IIR);
    }

    /// Restores the "received data" interrupt, which lasts as long as there is data (16550A datasheet, table of IIR):
    /// vm-superio ends it with the first byte that is read, and with each read of IIR. Linux reads at most 256 bytes in
    /// a row, and then relies on IIR.
    fn keep_received(uart: &mut Uart) {
        if uart.fifo_capacity() == FIFO || uart.read(LCR) & LCR_DLAB != 0 {
            return;
        }
        let enabled = uart.read(IER);
        if enabled & IER_RECEIVED != 0 {
            // A write to IER makes vm-superio check its FIFO. Only received data is meant, so the other bits come
            // second.
            let _ = uart.write(IER, IER_RECEIVED);
            let _ = uart.write(IER, enabled);
        }
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Serial {
    fn decodes(self: Arc<Self>) -> Vec<Decoded> {
        vec![Decoded::ports(self.place.port, PORTS.into(), self)]
    }

    fn aml(&self) -> Vec<u8> {
        let Place { port, gsi } = self.place;
        let interrupt = InterruptResource::new(true, true, false, false, gsi);
        let ports = IO::new(port, port, 1, PORTS);
        let mut bytes = Vec::new();
        aml::Device::new(
            Path::new("_SB_.COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0_u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt, &ports])),
            ],
        )
        .to_aml_bytes(&mut bytes);
        bytes
    }

    /// Unread received bytes are lost.
    fn reset(&self) -> Result<(), ResetError> {
        self.power_on();
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart();
        for (register, byte) in (offset..).zip(data) {
            let Ok(register) = u8::try_from(register) else {
                *byte = 0xff;
                continue;
            };
            *byte = uart.read(register);
            if matches!(register, DATA | IIR) {
                Self::keep_received(&mut uart);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.uart();
        for (register, byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                // The guest cannot act on the sink's errors.
                let _ = uart.write(register, *byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Sink, EventFd, Serial) {
        let sink = Sink::default();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let place = Place { port: 0x3f8, gsi: 4 };
        let serial = Serial::new(place, interrupt.try_clone().unwrap(), Box::new(sink.clone()));
        (sink, interrupt, serial)
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_sink() {
        let (sink, _, serial) = port();
        for byte in b"hi\n" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hi\n");
    }

    #[test]
    fn input_is_bounded_by_the_fifo_and_interrupts() {
        let (_, interrupt, serial) = port();
        serial.write(IER.into(), &[1]);
        assert_eq!(serial.enqueue(&[b'x'; 100]), 64);
        assert!(interrupt.read().is_ok());
        assert!(interrupt.read().is_err());
        assert_eq!(serial.enqueue(b"y"), 0);
        assert!(interrupt.read().is_ok(), "the guest has missed it, perhaps");
        assert_eq!(serial.enqueue(b""), 0);
        assert!(interrupt.read().is_err());
        assert_eq!(read(&serial, 5) & 1, 1, "data ready");
        assert_eq!(read(&serial, 0), b'x');
        assert_eq!(serial.capacity(), 1);
    }

    #[test]
    fn received_data_interrupts_until_the_last_byte_is_read() {
        const IDENTITY: u8 = 0xf;
        const RECEIVED: u8 = 4;
        const NONE: u8 = 1;
        let (_, interrupt, serial) = port();
        serial.write(IER.into(), &[1]);
        assert_eq!(serial.enqueue(&[b'x'; 64]), 64);
        for left in (0..64).rev() {
            let _ = interrupt.read();
            assert_eq!(read(&serial, 2) & IDENTITY, RECEIVED, "{left} bytes and one are left");
            assert_eq!(read(&serial, 2) & IDENTITY, RECEIVED, "reading IIR takes no data away");
            assert_eq!(read(&serial, 0), b'x');
            assert!(interrupt.read().is_ok(), "{left}");
        }
        assert_eq!(read(&serial, 2) & IDENTITY, NONE);
        assert!(interrupt.read().is_err());
        // Not if the guest has disabled the interrupt, and not through the divisor's register.
        serial.write(IER.into(), &[0]);
        serial.enqueue(b"ab");
        assert_eq!([read(&serial, 0), read(&serial, 2) & IDENTITY], [b'a', NONE]);
        serial.write(LCR.into(), &[LCR_DLAB]);
        assert_eq!([read(&serial, 0), read(&serial, 1)], DIVISOR_9600);
        assert!(interrupt.read().is_err());
    }

    #[test]
    fn reset_forgets_everything() {
        let (_, interrupt, serial) = port();
        serial.write(IER.into(), &[1]);
        serial.write(LCR.into(), &[0x80]);
        serial.write(SCR.into(), &[0x55]);
        serial.enqueue(b"old");
        serial.reset().unwrap();
        let _ = interrupt.read();
        assert_eq!(serial.capacity(), 64);
        assert_eq!([read(&serial, 1), read(&serial, 3), read(&serial, 7)], [0, 3, 0]);
        assert_eq!(read(&serial, 5) & 1, 0, "no data");
        serial.enqueue(b"new");
        assert!(interrupt.read().is_err(), "interrupts are off");
    }
}
