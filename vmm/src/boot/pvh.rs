// SPDX-License-Identifier: Apache-2.0

//! The start info of the PVH boot protocol.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Placed, usable_ram};
use crate::{layout, memory::GuestMemory};

/// "xEn3" with the top bit of the E set.
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Writes start info, module list and memory map.
pub(super) fn write_start_info(memory: &GuestMemory, initramfs: Option<Placed>) -> Result<(), BootError> {
    let mut at = layout::PVH_TABLES;
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI.start,
        ..hvm_start_info::default()
    };
    if let Some(placed) = initramfs {
        let module = hvm_modlist_entry { paddr: placed.address, size: placed.size, ..Default::default() };
        memory.write_obj(module, GuestAddress(at)).map_err(BootError::Memory)?;
        info.nr_modules = 1;
        info.modlist_paddr = at;
        at += size_of::<hvm_modlist_entry>() as u64;
    }
    info.memmap_paddr = at;
    let ram = usable_ram(memory).into_iter().map(|range| (range, RAM));
    for (range, type_) in ram.chain([(layout::FIRMWARE, RESERVED), (layout::ECAM, RESERVED)]) {
        let entry =
            hvm_memmap_table_entry { addr: range.start, size: range.end - range.start, type_, reserved: 0 };
        memory.write_obj(entry, GuestAddress(at)).map_err(BootError::Memory)?;
        info.memmap_entries += 1;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    memory.write_obj(info, GuestAddress(layout::BOOT_PARAMS)).map_err(BootError::Memory)
}
