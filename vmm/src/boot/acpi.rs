// SPDX-License-Identifier: Apache-2.0

//! ACPI tables, which describe CPUs and devices to the guest. Devices bring their own part of the DSDT.
//!
//! Hardware-reduced ACPI 6.5: no SCI, no PM timer; sleep, reset and the event device are port registers.

use acpi_tables::{
    Aml,
    aml::{Device, Name, Package, Path},
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace as GasSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use devices::acpi;

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
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// vCPUs; a vCPU's index is its APIC id.
    pub cpus: u8,
    /// The devices' parts of the DSDT (AML).
    pub devices: Vec<u8>,
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
    let mut body = description.devices.clone();
    processors(description.cpus, &mut body);
    Name::new(Path::new("_S5_"), &Package::new(vec![&acpi::SLEEP_TYPE_S5])).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
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
        for (cpus, devices) in [(1, vec![]), (4, vec![0; 1000]), (254, vec![])] {
            let bytes = tables(&Description { cpus, devices });
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
