// SPDX-License-Identifier: Apache-2.0

//! ACPI tables, which describe CPUs, PCI, the serial port and the power button to the guest.
//!
//! Hardware-reduced ACPI 6.5: no SCI, no PM timer; sleep, reset and the event device are port registers.

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
        FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
        OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace as GasSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use devices::acpi;
use std::ops::Range;

use crate::layout;

const OEM: [u8; 6] = *b"PRTCLS";
const TABLE: [u8; 8] = *b"PORTCULL";
const REVISION: u32 = 1;
/// DSDT revision 2 and up: integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// Length of an SDT's header (ACPI 6.5, 5.2.6).
const HEADER: u32 = 36;
/// FADT IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3): no VGA, no CMOS clock. Linux would wait for the clock for seconds.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;

/// The machine's properties that the tables describe.
#[derive(Clone, Debug)]
pub struct Description {
    /// vCPUs; a vCPU's index is its APIC id.
    pub cpus: u8,
    /// 64-bit PCI window; may be empty.
    pub pci_window_64: Range<u64>,
}

/// Builds all tables as bytes for [`layout::ACPI`]; the root pointer comes first.
#[must_use]
pub fn tables(description: &Description) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        // Tables begin on 16-byte borders.
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let address = layout::ACPI.start + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        address
    };
    let dsdt = place(&dsdt(description));
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(description.cpus));
    let mcfg = place(&mcfg());
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for address in [fadt, madt, mcfg] {
        xsdt.add_entry(address);
    }
    let xsdt = place(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    for (to, from) in bytes.iter_mut().zip(root) {
        *to = from;
    }
    bytes
}

fn port_register(offset: u64) -> GAS {
    let port = u64::from(layout::ACPI_PORT).saturating_add(offset);
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set: no fixed-hardware power button; there is a device for it.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port_register(acpi::RESET);
    fadt.reset_value = acpi::RESET_VALUE;
    fadt.sleep_control_reg = port_register(acpi::SLEEP_CONTROL);
    fadt.sleep_status_reg = port_register(acpi::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    // KVM's own IOAPIC has id 0, which Linux changes at will. No vCPU has APIC id 255.
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    mcfg
}

fn dsdt(description: &Description) -> Sdt {
    let mut body = Vec::new();
    pci_host_bridge(description).to_bytes(&mut body);
    reserved_ecam(&mut body);
    serial_port(&mut body);
    power_button(&mut body);
    processors(description.cpus, &mut body);
    Name::new(Path::new("_S5_"), &Package::new(vec![&acpi::SLEEP_TYPE_S5])).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
}

struct HostBridge<'a>(&'a Description);

fn pci_host_bridge(description: &Description) -> HostBridge<'_> {
    HostBridge(description)
}

impl HostBridge<'_> {
    fn to_bytes(&self, sink: &mut Vec<u8>) {
        #[expect(clippy::cast_possible_truncation, reason = "the window ends below 4 GiB")]
        let memory_32 = AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            layout::PCI_WINDOW_32.start as u32,
            (layout::PCI_WINDOW_32.end - 1) as u32,
            None,
        );
        let window = &self.0.pci_window_64;
        let memory_64 = (!window.is_empty()).then(|| {
            AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                window.start,
                window.end - 1,
                None,
            )
        });
        let bus = AddressSpace::new_bus_number(0_u16, 0);
        let config = IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8);
        let low = AddressSpace::new_io(0_u16, layout::PCI_CONFIG_PORT - 1, None);
        let high = AddressSpace::new_io(layout::PCI_CONFIG_PORT + 8, 0xffff, None);
        let mut resources: Vec<&dyn Aml> = vec![&bus, &config, &low, &high, &memory_32];
        if let Some(memory_64) = &memory_64 {
            resources.push(memory_64);
        }
        Device::new(
            Path::new("_SB_.PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_SEG"), &0_u8),
                &Name::new(Path::new("_BBN"), &0_u8),
                &Name::new(Path::new("_UID"), &0_u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Linux uses ECAM only where a motherboard resource reserves it.
fn reserved_ecam(sink: &mut Vec<u8>) {
    #[expect(clippy::cast_possible_truncation, reason = "below 4 GiB")]
    let range =
        Memory32Fixed::new(true, layout::ECAM.start as u32, (layout::ECAM.end - layout::ECAM.start) as u32);
    Device::new(
        Path::new("_SB_.MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&range])),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial_port(sink: &mut Vec<u8>) {
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// The button and the generic event device (ACPI 6.5, 5.6.9) that notifies it.
fn power_button(sink: &mut Vec<u8>) {
    Device::new(
        Path::new("_SB_.PWRB"),
        vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")), &Name::new(Path::new("_UID"), &0_u8)],
    )
    .to_aml_bytes(sink);
    let port = u64::from(layout::ACPI_PORT).saturating_add(acpi::EVENT_STATUS);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
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
                        layout::ACPI_EVENT_GSI,
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
                            &Equal::new(&Local(0), &acpi::EVENT_POWER_BUTTON),
                            vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80_u8)],
                        ),
                    ],
                ),
            ],
        )],
    )
    .to_aml_bytes(sink);
}

fn processors(cpus: u8, sink: &mut Vec<u8>) {
    for cpu in 0..cpus {
        Device::new(
            Path::new(&format!("_SB_.C{cpu:03X}")),
            vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &cpu)],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    #[test]
    fn the_root_pointer_leads_to_every_table_and_the_checksums_hold() {
        for (cpus, window) in [(1, 0..0), (4, 0x1_0000_0000..0x10_0000_0000), (254, 0..0)] {
            let bytes = tables(&Description { cpus, pci_window_64: window });
            assert!(bytes.len() as u64 <= layout::ACPI.end - layout::ACPI.start);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert!(sums_to_zero(&bytes[..20]) && sums_to_zero(&bytes[..36]));
            let table = |address: u64| {
                let at = usize::try_from(address - layout::ACPI.start).unwrap();
                let len = u32_at(&bytes, at + 4) as usize;
                assert!(sums_to_zero(&bytes[at..at + len]), "{:?}", &bytes[at..at + 4]);
                &bytes[at..at + len]
            };
            let xsdt = table(u64_at(&bytes, 24));
            let entries = xsdt[36..].chunks(8).map(|at| table(u64_at(at, 0))).collect::<Vec<_>>();
            let names = entries.iter().map(|table| &table[..4]).collect::<Vec<_>>();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
            assert_eq!(&table(u64_at(entries[0], 140))[..4], b"DSDT");
            // Local APIC structures have 8 bytes, the IOAPIC 12.
            assert_eq!(entries[1].len(), 44 + usize::from(cpus) * 8 + 12);
            assert_eq!(u64_at(entries[2], 44), layout::ECAM.start);
        }
    }
}
