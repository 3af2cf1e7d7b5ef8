// SPDX-License-Identifier: Apache-2.0

//! The layout of the guest's physical address space and of its port bus.
//!
//! ```text
//! 0x0000_0000  page tables, GDT, boot parameters, command line (below 640 KiB)
//! 0x000a_0000  hole (legacy video, ROMs); ACPI tables from 0x000e_0000 on, SMBIOS tables from 0x000f_0000 on
//! 0x0010_0000  kernel, initramfs, RAM … at most to 0xc000_0000
//! 0xc000_0000  32-bit PCI window
//! 0xe000_0000  ECAM (bus 0)
//! 0xfec0_0000  IOAPIC, local APICs, KVM's own pages
//! 0x1_0000_0000  RAM that did not fit below, then the 64-bit PCI window up to the CPU's last address
//! ```

use std::ops::Range;

/// GDT for the first instructions of the boot processor.
pub const GDT: u64 = 0x500;
/// Zero page (`struct boot_params`) or PVH start info.
pub const BOOT_PARAMS: u64 = 0x7000;
/// PVH module list and memory map.
pub const PVH_TABLES: u64 = 0x8000;
/// Page tables of the 64-bit Linux entry: one PML4, one PDPT, four page directories (4 GiB identity).
pub const PAGE_TABLES: u64 = 0x9000;
/// Initial stack of the boot processor.
pub const STACK: u64 = 0x8ff0;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its final NUL (Linux' `COMMAND_LINE_SIZE` on x86).
pub const CMDLINE_MAX: usize = 2048;
/// End of the conventional memory that the guest may use.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// ACPI tables. The root pointer is the first of them; the guest searches it at 16-byte boundaries.
pub const ACPI: Range<u64> = 0xe_0000..0xf_0000;
/// SMBIOS tables. The entry point comes first; the guest searches it in these 64 KiB at 16-byte boundaries.
pub const SMBIOS: Range<u64> = 0xf_0000..RESET_VECTOR;
/// The address at which a real-mode processor starts after a reset; SMBIOS tables end below.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// The tables and the reset vector: no memory of the guest's own.
pub const FIRMWARE: Range<u64> = ACPI.start..HIGH_RAM;
/// Kernels are loaded here or above.
pub const HIGH_RAM: u64 = 0x10_0000;

/// End of RAM below 4 GiB and start of the 32-bit PCI window.
pub const PCI_WINDOW_32: Range<u64> = 0xc000_0000..0xe000_0000;
/// Memory-mapped configuration space of bus 0: 4 KiB for each of 256 functions.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The one IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page for KVM's identity map, three for its TSS (Intel only).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: usize = 0xfffb_d000;
/// The continuation of RAM that does not fit below the PCI window.
pub const RAM_64: u64 = 0x1_0000_0000;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The registers of [`devices::acpi`]. Firmware expects its own at 0x600 to 0x60b: power-off, PM1 control, PM timer.
pub const ACPI_PORT: u16 = 0x620;
/// Interrupt of the ACPI event device.
pub const ACPI_EVENT_GSI: u32 = 16;

/// The pins of the IOAPIC; message-signalled routes get numbers from here on.
pub const IOAPIC_PINS: u32 = 24;

/// The smallest guest memory in bytes: too little for a Linux kernel, but enough for small test guests.
pub const MEMORY_MIN: u64 = 2 << 20;
/// The unit of guest memory in bytes: whole huge pages.
pub const MEMORY_STEP: u64 = 2 << 20;

/// RAM as ranges of guest-physical addresses, for `memory` bytes.
#[must_use]
pub fn ram(memory: u64) -> Vec<Range<u64>> {
    let low = memory.min(PCI_WINDOW_32.start);
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges that starts with one")]
    let mut ranges = vec![0..low];
    if memory > low {
        ranges.push(RAM_64..RAM_64.saturating_add(memory - low));
    }
    ranges
}

/// The 64-bit PCI window behind `memory` bytes of RAM on a CPU with `physical_bits` address bits; empty when
/// nothing is left.
#[must_use]
pub fn pci_window_64(memory: u64, physical_bits: u8) -> Range<u64> {
    const GIB: u64 = 1 << 30;
    let ram_end = ram(memory).last().map_or(RAM_64, |range| range.end).max(RAM_64);
    // KVM's shadow paging handles 46 bits everywhere, and no BAR here needs more.
    let end = 1_u64 << physical_bits.clamp(32, 46);
    let start = ram_end.checked_next_multiple_of(GIB).unwrap_or(end);
    start.min(end)..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_four_gib() {
        assert_eq!(ram(512 << 20), vec![0..512 << 20]);
        assert_eq!(ram(3 << 30), vec![0..3 << 30]);
        assert_eq!(ram(4 << 30), vec![0..0xc000_0000, RAM_64..RAM_64 + (1 << 30)]);
    }

    #[test]
    fn the_upper_window_follows_ram_and_ends_with_the_cpu() {
        assert_eq!(pci_window_64(512 << 20, 36), RAM_64..1 << 36);
        assert_eq!(pci_window_64(4 << 30, 40), 0x1_4000_0000..1 << 40);
        assert_eq!(pci_window_64((3 << 30) + (2 << 20), 40).start, 0x1_4000_0000);
        assert!(pci_window_64(512 << 20, 32).is_empty());
        assert_eq!(pci_window_64(1 << 30, 52).end, 1 << 46);
    }
}
