// SPDX-License-Identifier: Apache-2.0

//! A device for tests: all that a device of the machine can have, and an example of one.
//!
//! The machine has it if a file called `probe` comes beside its specification, or if `device=probe`
//! is a word of the command line. The device writes the calls of the machine to that file, a word a
//! line.
//!
//! | offset | register (32 bits) | |
//! |---|---|---|
//! | 0x00 | identity | reads `PRBE` |
//! | 0x04 | value | keeps its value |
//! | 0x08 | answers | doorbells that the I/O thread has answered in this boot |
//! | 0x0c | address | address of the message of the interrupt |
//! | 0x10 | data | its data; a write connects the interrupt |
//! | 0x14 | place | 0 or 1: which of the next two registers is the doorbell |
//! | 0x18 | missed | writes in this boot to a doorbell's register that rang nothing |
//! | 0x1c | fault | a write makes the I/O thread hang (1), panic (2), compute for 3 s (3), or report
//! a full disk and compute for 5 s (4) at the next doorbell |
//! | 0x20, 0x24 | doorbell | |
//!
//! Port 0x640 is a second doorbell, for the value 7 alone. It reads as the lowest byte of the
//! answers.

use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use acpi_tables::{
    Aml,
    aml::{self, Name, Path},
};
use devices::{
    bus::BusDevice,
    device::{Decoded, Device, ResetError, Space},
    doorbell::{Doorbell, Doorbells, Ring},
    interrupt::{MsiMessage, MsiRouter, RouteId},
    io_thread::{Calls, IoEvent, IoSource, IoThread},
};

use super::{Board, BoardError, Parts};
use crate::vcpu::{Event, Events};

/// The name of its file.
pub(crate) const FILE: &str = "probe";
/// The word of the command line.
const WORD: &str = "device=probe";
/// The name of its I/O thread.
pub(crate) const THREAD: &str = "io probe";

const MEMORY: Range<u64> = 0xfe00_0000..0xfe00_1000;
const PORT: u16 = 0x640;
const PORT_VALUE: u8 = 7;

const IDENTITY: u64 = 0;
const VALUE: u64 = 4;
const ANSWERS: u64 = 8;
const ADDRESS: u64 = 0xc;
const DATA: u64 = 0x10;
const PLACE: u64 = 0x14;
const MISSED: u64 = 0x18;
const FAULT: u64 = 0x1c;
const HANG: u32 = 1;
const PANIC: u32 = 2;
const SLOW: u32 = 3;
const FULL: u32 = 4;
const DOORBELLS: [u64; 2] = [0x20, 0x24];

/// Builds the device, if the machine has it.
pub(super) fn build(_: &Board, parts: &mut Parts<'_>) -> Result<Vec<Arc<dyn Device>>, BoardError> {
    let log = parts.files.take(FILE).map(File::from);
    if log.is_none() && !parts.spec.cmdline.split_ascii_whitespace().any(|word| word == WORD) {
        return Ok(Vec::new());
    }
    let probe = Probe::new(log, Arc::clone(parts.events), parts.doorbells(), parts.router());
    let failed = |error: io::Error| BoardError::Device { device: FILE.to_owned(), source: error.into() };
    Ok(vec![Arc::new(probe.map_err(failed)?)])
}

struct Probe {
    log: Option<File>,
    events: Arc<Events>,
    doorbells: Arc<dyn Doorbells>,
    router: Arc<dyn MsiRouter>,
    route: RouteId,
    /// Raises the interrupt.
    interrupt: IoEvent,
    /// Rung through memory and through the port.
    rung: [IoEvent; 2],
    registers: Mutex<Registers>,
}

#[derive(Default)]
struct Registers {
    value: u32,
    answers: u32,
    message: MsiMessage,
    place: usize,
    missed: u32,
    fault: u32,
}

fn compute(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {}
}

fn in_memory(place: usize) -> Doorbell {
    let offset = DOORBELLS.get(place).copied().unwrap_or_default();
    Doorbell { space: Space::Memory, address: MEMORY.start.saturating_add(offset), ring: Ring::Any }
}

fn on_port() -> Doorbell {
    Doorbell { space: Space::Ports, address: PORT.into(), ring: Ring::Byte(PORT_VALUE) }
}

impl Probe {
    fn new(
        log: Option<File>,
        events: Arc<Events>,
        doorbells: Arc<dyn Doorbells>,
        router: Arc<dyn MsiRouter>,
    ) -> io::Result<Self> {
        let rung = [IoEvent::new()?, IoEvent::new()?];
        for (doorbell, event) in [in_memory(0), on_port()].into_iter().zip(&rung) {
            doorbells.connect(doorbell, event.eventfd())?;
        }
        let (route, interrupt) = (router.allocate()?, IoEvent::new()?);
        Ok(Self { log, events, doorbells, router, route, interrupt, rung, registers: Mutex::default() })
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, call: &str) {
        if let Some(mut log) = self.log.as_ref() {
            let _ = writeln!(log, "{call}");
        }
    }

    /// Moves the doorbell in memory, on the thread of the vCPU that wants it elsewhere or of the
    /// event loop.
    fn move_doorbell(&self, registers: &mut Registers, place: usize) -> io::Result<()> {
        let event = self.rung[0].eventfd();
        self.doorbells.disconnect(in_memory(registers.place), event)?;
        registers.place = place;
        self.doorbells.connect(in_memory(place), event)
    }
}

impl Device for Probe {
    fn decodes(self: Arc<Self>) -> Vec<Decoded> {
        let port = Arc::new(Port(Arc::clone(&self)));
        vec![Decoded::memory(MEMORY, self), Decoded::ports(PORT, 1, port)]
    }

    fn aml(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        aml::Device::new(Path::new("_SB_.PRBE"), vec![&Name::new(Path::new("_HID"), &"PRTC0001")])
            .to_aml_bytes(&mut bytes);
        bytes
    }

    fn io_threads(self: Arc<Self>) -> Vec<IoThread> {
        let sources = self.rung.iter().cloned().map(IoSource::Event).collect();
        let work = move |_| {
            let mut registers = self.registers();
            registers.answers = registers.answers.wrapping_add(1);
            let fault = registers.fault;
            drop(registers);
            match fault {
                HANG => loop {
                    thread::park();
                },
                SLOW => compute(Duration::from_secs(3)),
                FULL => {
                    self.events.send(Event::DiskFull { disk: FILE.to_owned() });
                    compute(Duration::from_secs(5));
                }
                PANIC => resume_unwind(Box::new("a fault that the guest has ordered")),
                _ => {}
            }
            self.interrupt.signal();
        };
        vec![IoThread {
            name: THREAD.to_owned(),
            calls: Calls::None,
            sources,
            work: Box::new(work),
            end: Box::new(|| {}),
        }]
    }

    fn pause(&self) {
        self.note("pause");
    }

    fn resume(&self) {
        self.note("resume");
    }

    fn reset(&self) -> Result<(), ResetError> {
        self.note("reset");
        let mut registers = self.registers();
        let at_power_on = self
            .router
            .disconnect(self.route, self.interrupt.eventfd())
            .and_then(|()| self.move_doorbell(&mut registers, 0));
        at_power_on.map_err(|error| ResetError { device: FILE.to_owned(), source: error.into() })?;
        self.interrupt.take();
        *registers = Registers::default();
        Ok(())
    }

    fn shutdown(&self) {
        self.note("shutdown");
        let place = self.registers().place;
        let _ = self.doorbells.disconnect(in_memory(place), self.rung[0].eventfd());
        let _ = self.doorbells.disconnect(on_port(), self.rung[1].eventfd());
        let _ = self.router.disconnect(self.route, self.interrupt.eventfd());
        self.router.release(self.route);
    }
}

impl BusDevice for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Some(data) = data.first_chunk_mut::<4>() else { return };
        let registers = self.registers();
        *data = match offset {
            IDENTITY => *b"PRBE",
            VALUE => registers.value.to_le_bytes(),
            ANSWERS => registers.answers.to_le_bytes(),
            MISSED => registers.missed.to_le_bytes(),
            _ => return,
        };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first_chunk::<4>().map(|data| u32::from_le_bytes(*data)) else { return };
        let mut registers = self.registers();
        let result = match offset {
            VALUE => {
                registers.value = value;
                Ok(())
            }
            ADDRESS => {
                registers.message.address = value.into();
                Ok(())
            }
            DATA => {
                registers.message.data = value;
                self.router.connect(self.route, self.interrupt.eventfd(), registers.message)
            }
            FAULT => {
                registers.fault = value;
                Ok(())
            }
            PLACE => self.move_doorbell(&mut registers, usize::from(value == 1)),
            _ if DOORBELLS.contains(&offset) => {
                registers.missed = registers.missed.wrapping_add(1);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = result {
            self.note(&error.to_string());
        }
    }
}

/// The second doorbell.
struct Port(Arc<Probe>);

impl BusDevice for Port {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.0.registers().answers.to_le_bytes()[..1]);
    }

    fn write(&self, _: u64, _: &[u8]) {
        let mut registers = self.0.registers();
        registers.missed = registers.missed.wrapping_add(1);
    }
}
