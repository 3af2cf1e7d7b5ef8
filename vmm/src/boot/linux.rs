// SPDX-License-Identifier: Apache-2.0

//! The zero page of Linux' boot protocol (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Placed, usable_ram};
use crate::{layout, memory::GuestMemory};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// The type of a loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Writes the zero page. `header` is the kernel's own, or None for an ELF image.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    header: Option<setup_header>,
    initramfs: Option<Placed>,
    cmdline: usize,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: 0x100_0000,
            ..setup_header::default()
        }),
        acpi_rsdp_addr: layout::ACPI.start,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    #[expect(clippy::cast_possible_truncation, reason = "all of these are below 4 GiB by construction")]
    {
        params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
        params.hdr.cmdline_size = cmdline as u32;
        if let Some(placed) = initramfs {
            params.hdr.ramdisk_image = placed.address as u32;
            params.hdr.ramdisk_size = placed.size as u32;
        }
    }
    let ram = usable_ram(memory).into_iter().map(|range| (range, E820_RAM));
    let reserved = [(layout::FIRMWARE, E820_RESERVED), (layout::ECAM, E820_RESERVED)];
    let mut count = 0;
    for (slot, (range, type_)) in params.e820_table.iter_mut().zip(ram.chain(reserved)) {
        *slot = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: type_ };
        count += 1;
    }
    params.e820_entries = count;
    memory.write_obj(params, GuestAddress(layout::BOOT_PARAMS)).map_err(BootError::Memory)
}
