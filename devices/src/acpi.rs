// SPDX-License-Identifier: Apache-2.0

//! The fixed hardware of a hardware-reduced ACPI machine (ACPI 6.5, 4.1 and 4.8.3.7): sleep control and status, the reset
//! register, and the status register behind the generic event device (5.6.9), which carries the power button.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use acpi_tables::{
    Aml,
    aml::{
        self, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
        Interrupt, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Scope,
        Store,
    },
};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    bus::BusDevice,
    device::{Decoded, Device, ResetError},
    machine::{MachineEvent, MachineEvents},
};

/// Offset of the event status: 4 bytes, cleared by reading. The AML method of the generic event device reads it.
pub const EVENT_STATUS: u64 = 0;
/// Offset of the sleep control register (1 byte), for the FADT.
pub const SLEEP_CONTROL: u64 = 4;
/// Offset of the sleep status register (1 byte), for the FADT.
pub const SLEEP_STATUS: u64 = 5;
/// Offset of the reset register (1 byte), for the FADT.
pub const RESET: u64 = 6;
/// Length of the registers in bytes.
pub const LEN: u64 = 8;

/// Bit of the event status: the power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1;
/// The reset register's value in the FADT.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of `\_S5`, for the DSDT.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The registers, on ports that the vmm chooses.
pub struct AcpiRegisters {
    events: Arc<dyn MachineEvents>,
    interrupt: EventFd,
    status: AtomicU32,
    place: Place,
}

/// The registers' place in the machine.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Their first port.
    pub port: u16,
    /// The pin of the IOAPIC that the generic event device's interrupt raises.
    pub gsi: u32,
}

impl AcpiRegisters {
    /// Registers at `place` that report to `events`, and signal `interrupt` (the generic event device's, edge
    /// triggered) when the event status becomes non-zero.
    #[must_use]
    pub fn new(place: Place, events: Arc<dyn MachineEvents>, interrupt: EventFd) -> Self {
        Self { events, interrupt, status: AtomicU32::new(0), place }
    }

    /// Presses the power button; the guest decides what follows.
    ///
    /// # Errors
    /// Those of signalling the interrupt.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.status.fetch_or(EVENT_POWER_BUTTON, Ordering::AcqRel);
        self.interrupt.write(1)
    }
}

impl Device for AcpiRegisters {
    fn decodes(self: Arc<Self>) -> Vec<Decoded> {
        vec![Decoded::ports(self.place.port, LEN, self)]
    }

    /// The power button, and the generic event device that notifies it.
    fn aml(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        aml::Device::new(
            Path::new("_SB_.PWRB"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
                &Name::new(Path::new("_UID"), &0_u8),
            ],
        )
        .to_aml_bytes(&mut bytes);
        let port = u64::from(self.place.port).saturating_add(EVENT_STATUS);
        Scope::new(
            Path::new("_SB_"),
            vec![&aml::Device::new(
                Path::new("GED_"),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0013"),
                    &Name::new(Path::new("_UID"), &0_u8),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&Interrupt::new(
                            true,
                            true,
                            false,
                            false,
                            self.place.gsi,
                        )]),
                    ),
                    &OpRegion::new(Path::new("GEDR"), OpRegionSpace::SystemIO, &port, &4_u8),
                    &Field::new(
                        Path::new("GEDR"),
                        FieldAccessType::DWord,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        vec![FieldEntry::Named(*b"GSTA", 32)],
                    ),
                    &Method::new(
                        Path::new("_EVT"),
                        1,
                        true,
                        vec![
                            // Reading the register clears it.
                            &Store::new(&Local(0), &Path::new("GSTA")),
                            &If::new(
                                &Equal::new(&Local(0), &EVENT_POWER_BUTTON),
                                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80_u8)],
                            ),
                        ],
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut bytes);
        bytes
    }

    fn reset(&self) -> Result<(), ResetError> {
        self.status.store(0, Ordering::Release);
        Ok(())
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == EVENT_STATUS
            && let Some(word) = data.first_chunk_mut::<4>()
        {
            *word = self.status.swap(0, Ordering::AcqRel).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match offset {
            SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 =>
            {
                self.events.raise(MachineEvent::PowerOff);
            }
            RESET if value == RESET_VALUE => self.events.raise(MachineEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::EventLatch;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn registers() -> (Arc<EventLatch>, EventFd, AcpiRegisters) {
        let latch = Arc::new(EventLatch::new());
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let place = Place { port: 0x620, gsi: 16 };
        let registers = AcpiRegisters::new(place, latch.clone(), interrupt.try_clone().unwrap());
        (latch, interrupt, registers)
    }

    #[test]
    fn writes_raise_the_event_they_mean() {
        let (latch, _, registers) = registers();
        let check = |offset, value, expect| {
            registers.write(offset, &[value]);
            assert_eq!(latch.take(), expect, "{value:#x} at {offset}");
        };
        check(SLEEP_CONTROL, (5 << 2) | (1 << 5), Some(MachineEvent::PowerOff));
        check(SLEEP_CONTROL, 5 << 2, None);
        check(SLEEP_CONTROL, (3 << 2) | (1 << 5), None);
        check(SLEEP_STATUS, (5 << 2) | (1 << 5), None);
        check(RESET, RESET_VALUE, Some(MachineEvent::Reset));
        check(RESET, 0, None);
        check(EVENT_STATUS, 0xff, None);
    }

    #[test]
    fn the_power_button_interrupts_and_is_cleared_by_reading() {
        let (_, interrupt, registers) = registers();
        let status = || {
            let mut data = [0; 4];
            registers.read(EVENT_STATUS, &mut data);
            u32::from_le_bytes(data)
        };
        assert!(interrupt.read().is_err(), "no signal yet");
        registers.press_power_button().unwrap();
        assert_eq!(interrupt.read().unwrap(), 1);
        let mut byte = [0; 1];
        registers.read(EVENT_STATUS, &mut byte);
        assert_eq!(status(), EVENT_POWER_BUTTON, "a byte access does not clear it");
        assert_eq!(status(), 0);
        registers.press_power_button().unwrap();
        registers.reset().unwrap();
        assert_eq!(status(), 0);
    }
}
