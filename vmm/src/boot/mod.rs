// SPDX-License-Identifier: Apache-2.0

//! Loads a kernel into guest memory: bzImage by the 64-bit Linux protocol, ELF by PVH or, without a PVH note, like
//! Linux' 64-bit entry.

pub mod acpi;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
mod linux;
mod pvh;
pub mod smbios;
mod source;

use std::{io::SeekFrom, ops::Range};

use devices::smbios::SmbiosError;
use linux_loader::loader::{
    self, KernelLoader,
    elf::{Elf, PvhBootCapability},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use self::source::{KernelImage, Load, Part};
use crate::{
    layout,
    memory::GuestMemory,
    vcpu::state::{self, Entry},
};

pub use self::source::{InstalledKernel, Source};

/// A bzImage's 64-bit entry lies this far behind its load address (Documentation/arch/x86/boot.rst).
const ENTRY_64: u64 = 0x200;
/// `xloadflags` bit 0: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;
/// Linux on hardware-reduced ACPI tries to reboot by EFI and, finding none, jumps to the BIOS in real mode. There it
/// finds `mov al, 0xfe; out 0x64, al; hlt; jmp` back to the `hlt`: the keyboard controller's reset.
const RESET_STUB: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// The longest ACPI tables.
const ACPI_MAX: u64 = layout::ACPI.end - layout::ACPI.start;
/// The longest SMBIOS tables: the stub lies behind them.
const SMBIOS_MAX: u64 = layout::SMBIOS.end - layout::SMBIOS.start;
/// Page size, for the place of the initramfs.
const PAGE: u64 = 4096;

/// Errors of loading a kernel.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither ELF nor bzImage.
    #[error("The kernel is neither an x86-64 ELF image nor a bzImage")]
    NotAKernel,
    /// The image contradicts itself or does not fit.
    #[error("The kernel image cannot be loaded: it is damaged or larger than the guest's memory")]
    Load(#[source] loader::Error),
    /// A bzImage that ends before its kernel does.
    #[error("The kernel is truncated: it has {size} of {whole} bytes")]
    Cut {
        /// Its size.
        size: u64,
        /// The size in its header.
        whole: u64,
    },
    /// An ELF image for another processor.
    #[error("The kernel is an ELF image for another processor (machine {0}), not for x86-64 (62)")]
    OtherMachine(u16),
    /// A bzImage without 64-bit entry.
    #[error("The kernel is a 32-bit bzImage; use an x86-64 one")]
    NotSixtyFourBit,
    /// The disk to boot from has no kernel.
    #[error(
        "The disk {disk} boots no kernel; install one in the guest, or boot a file of the host (boot.kernel)"
    )]
    NoKernelOnDisk {
        /// The disk's name.
        disk: String,
        /// The places that were looked at.
        source: boot_disk::FindError,
    },
    /// The kernel on a disk, or its initramfs, cannot be loaded.
    #[error("The kernel {path} on the disk {disk} ({volume}) cannot be loaded")]
    Installed {
        /// The disk's name.
        disk: String,
        /// The partition and its file system.
        volume: String,
        /// The kernel's path in the file system.
        path: String,
        /// The fault.
        source: Box<BootError>,
    },
    /// A file of the host, or the initramfs on a disk, cannot be read.
    #[error("Cannot read the {0}")]
    Read(&'static str, #[source] std::io::Error),
    /// The initramfs does not fit.
    #[error(
        "The initramfs of {size} bytes does not fit between the kernel's end ({kernel_end:#x}) and {limit:#x}; \
         give the VM more memory"
    )]
    InitramfsTooLarge {
        /// Its size.
        size: u64,
        /// End of the kernel in memory.
        kernel_end: u64,
        /// Highest address that it may reach.
        limit: u64,
    },
    /// The command line is too long.
    #[error("The kernel command line has {0} bytes, at most {max} are possible", max = layout::CMDLINE_MAX - 1)]
    CmdlineTooLong(usize),
    /// The command line is longer than the kernel's own limit.
    #[error("The kernel command line has {size} bytes, and this kernel takes at most {max}: make it shorter")]
    CmdlineTooLongForKernel {
        /// Its length in bytes.
        size: usize,
        /// The kernel's limit (`cmdline_size` of its header).
        max: u32,
    },
    /// The command line has a NUL or a newline in it.
    #[error("The kernel command line contains a control character")]
    CmdlineCharacter,
    /// The ACPI tables do not fit below the SMBIOS tables.
    #[error(
        "The ACPI tables have {size} bytes, at most {max} are possible; give the VM fewer devices or vCPUs",
        max = ACPI_MAX
    )]
    TablesTooLong {
        /// Their size.
        size: u64,
    },
    /// The SMBIOS tables do not fit below the reset vector.
    #[error("The SMBIOS tables have {size} bytes, at most {max} are possible; give the VM fewer credentials", max = SMBIOS_MAX)]
    StringsTooLong {
        /// Their size.
        size: u64,
    },
    /// The SMBIOS tables cannot hold a string of the agent's.
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    /// Guest memory is too small for the kernel and the tables.
    #[error("The guest's memory is too small to boot; give it at least 2 MiB")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// The source of a boot and of reboots.
pub struct Payload {
    /// The kernel and its initramfs.
    pub source: Source,
    /// The kernel command line. That of a disk's boot entry comes before it.
    pub cmdline: String,
    /// The SMBIOS tables, for [`layout::SMBIOS`].
    pub smbios: Vec<u8>,
}

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    address: u64,
    size: u64,
}

/// Loads the kernel, the initramfs and all tables. Returns the entry of the boot processor.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    memory: &GuestMemory,
    payload: &mut Payload,
    machine: &acpi::Description,
) -> Result<Entry, BootError> {
    let tables = acpi::tables(machine);
    let size = tables.len() as u64;
    if size > ACPI_MAX {
        return Err(BootError::TablesTooLong { size });
    }
    let size = payload.smbios.len() as u64;
    if size > SMBIOS_MAX {
        return Err(BootError::StringsTooLong { size });
    }
    let kernel = Kernel { memory, cmdline: &payload.cmdline };
    let entry = payload.source.open(memory_size(memory), &payload.cmdline, kernel)?;
    let write =
        |bytes: &[u8], at: u64| memory.write_slice(bytes, GuestAddress(at)).map_err(BootError::Memory);
    write(&tables, layout::ACPI.start)?;
    write(&payload.smbios, layout::SMBIOS.start)?;
    write(&RESET_STUB, layout::RESET_VECTOR)?;
    for (at, descriptor) in (layout::GDT..).step_by(8).zip(state::gdt(entry)) {
        write(&descriptor.to_le_bytes(), at)?;
    }
    if matches!(entry, Entry::Linux64 { .. }) {
        identity_map(memory)?;
    }
    Ok(entry)
}

/// Loads a kernel with its initramfs and command line.
struct Kernel<'a> {
    memory: &'a GuestMemory,
    /// The command line of the specification.
    cmdline: &'a str,
}

impl Load for Kernel<'_> {
    type Output = Entry;

    fn load(
        self,
        kernel: &mut impl KernelImage,
        initramfs: Vec<Part<'_>>,
        cmdline: &str,
    ) -> Result<Entry, BootError> {
        let words = [cmdline, self.cmdline].into_iter().filter(|words| !words.is_empty());
        let text = words.collect::<Vec<_>>().join(" ");
        let bytes = self::cmdline(&text)?;
        let entry = match image_kind(kernel)? {
            Kind::Elf => load_elf(self.memory, kernel, initramfs, text.len())?,
            Kind::BzImage => load_bzimage(self.memory, kernel, initramfs, text.len())?,
        };
        self.memory.write_slice(&bytes, GuestAddress(layout::CMDLINE)).map_err(BootError::Memory)?;
        Ok(entry)
    }
}

fn cmdline(text: &str) -> Result<Vec<u8>, BootError> {
    if text.len() >= layout::CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong(text.len()));
    }
    if text.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(BootError::CmdlineCharacter);
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    Ok(bytes)
}

enum Kind {
    Elf,
    BzImage,
}

fn image_kind(kernel: &mut impl KernelImage) -> Result<Kind, BootError> {
    let read = |e| BootError::Read("kernel", e);
    let mut magic = [0; 4];
    kernel.rewind().map_err(read)?;
    match kernel.read_exact(&mut magic) {
        Ok(()) if magic == *b"\x7fELF" => return Ok(Kind::Elf),
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Err(BootError::NotAKernel),
        Err(e) => return Err(read(e)),
    }
    // "HdrS" at 0x202: boot protocol 2.00 and newer.
    kernel.seek(SeekFrom::Start(0x202)).map_err(read)?;
    match kernel.read_exact(&mut magic) {
        Ok(()) if magic == *b"HdrS" => Ok(Kind::BzImage),
        Ok(()) => Err(BootError::NotAKernel),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(BootError::NotAKernel),
        Err(e) => Err(read(e)),
    }
}

/// `e_machine` of x86-64 (System V ABI, AMD64 supplement, table 4.1), and its place in the header.
const EM_X86_64: u16 = 62;
const E_MACHINE: u64 = 18;

fn load_elf(
    memory: &GuestMemory,
    kernel: &mut impl KernelImage,
    initramfs: Vec<Part<'_>>,
    cmdline: usize,
) -> Result<Entry, BootError> {
    let read = |e| BootError::Read("kernel", e);
    let mut machine = [0; 2];
    kernel.seek(SeekFrom::Start(E_MACHINE)).map_err(read)?;
    // Leave an image that is too short for this header to the loader, which refuses it.
    if kernel.read_exact(&mut machine).is_ok() && u16::from_le_bytes(machine) != EM_X86_64 {
        return Err(BootError::OtherMachine(u16::from_le_bytes(machine)));
    }
    kernel.rewind().map_err(read)?;
    let loaded =
        Elf::load(memory, None, kernel, Some(GuestAddress(layout::HIGH_RAM))).map_err(BootError::Load)?;
    let limit = low_ram_end(memory);
    let initramfs = place_initramfs(memory, initramfs, loaded.kernel_end, limit)?;
    if let PvhBootCapability::PvhEntryPresent(rip) = loaded.pvh_boot_cap {
        pvh::write_start_info(memory, initramfs)?;
        return Ok(Entry::Pvh { rip: rip.0 });
    }
    linux::write_zero_page(memory, None, initramfs, cmdline)?;
    Ok(Entry::Linux64 { rip: loaded.kernel_load.0 })
}

fn load_bzimage(
    memory: &GuestMemory,
    kernel: &mut impl KernelImage,
    initramfs: Vec<Part<'_>>,
    cmdline: usize,
) -> Result<Entry, BootError> {
    let loaded = loader::bzimage::BzImage::load(memory, None, kernel, Some(GuestAddress(layout::HIGH_RAM)))
        .map_err(BootError::Load)?;
    let header = loaded.setup_header.ok_or(BootError::NotAKernel)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::NotSixtyFourBit);
    }
    // 0 in a header that does not say (boot.rst, `cmdline_size`: without the final NUL).
    let (size, max) = (cmdline, header.cmdline_size);
    if max != 0 && u32::try_from(size).map_or(true, |size| size > max) {
        return Err(BootError::CmdlineTooLongForKernel { size, max });
    }
    // The header counts sectors of 512 bytes for set-up, without the boot sector, and then paragraphs of 16 bytes
    // (boot.rst, `setup_sects`, `syssize`).
    let setup = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let whole = (setup + 1) * 512 + u64::from(header.syssize) * 16;
    let size = kernel.seek(SeekFrom::End(0)).map_err(|e| BootError::Read("kernel", e))?;
    // The last paragraph may be incomplete.
    if size.saturating_add(15) < whole {
        return Err(BootError::Cut { size, whole });
    }
    // The kernel unpacks itself in place: `init_size` bytes from its load address are its own.
    let kernel_end = loaded.kernel_end.max(loaded.kernel_load.0.saturating_add(u64::from(header.init_size)));
    let limit = low_ram_end(memory).min(u64::from(header.initrd_addr_max).saturating_add(1));
    let initramfs = place_initramfs(memory, initramfs, kernel_end, limit)?;
    linux::write_zero_page(memory, Some(header), initramfs, cmdline)?;
    Ok(Entry::Linux64 { rip: loaded.kernel_load.0.saturating_add(ENTRY_64) })
}

fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.last_addr().0.saturating_add(1).min(layout::PCI_WINDOW_32.start)
}

/// Each part of an initramfs begins at such an address; zeroes before it are skipped
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
const PART: u64 = 4;

/// Loads the initramfs as high as possible: the kernel's own early allocations begin below.
fn place_initramfs(
    memory: &GuestMemory,
    initramfs: Vec<Part<'_>>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<Placed>, BootError> {
    if initramfs.is_empty() {
        return Ok(None);
    }
    let (mut parts, mut size) = (Vec::new(), 0_u64);
    for part in initramfs {
        let start = size.checked_next_multiple_of(PART).unwrap_or(u64::MAX);
        let length = part.size;
        parts.push((start - size, part));
        size = start.saturating_add(length);
    }
    let too_large = || BootError::InitramfsTooLarge { size, kernel_end, limit };
    let address = limit.checked_sub(size).map(|start| start & !(PAGE - 1)).ok_or_else(too_large)?;
    if address < kernel_end {
        return Err(too_large());
    }
    let mut at = address;
    for (padding, part) in parts {
        for byte in 0..padding {
            memory.write_obj(0_u8, GuestAddress(at + byte)).map_err(BootError::Memory)?;
        }
        at += padding;
        let length = part.size;
        part.place(memory, GuestAddress(at))?;
        at += length;
    }
    Ok(Some(Placed { address, size }))
}

/// The RAM that the guest may use, without the parts that [`crate::layout`] reserves.
fn usable_ram(memory: &GuestMemory) -> Vec<Range<u64>> {
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges that starts with one")]
    let mut ranges = vec![0..layout::LOW_RAM_END];
    for ram in layout::ram(memory_size(memory)) {
        ranges.push(ram.start.max(layout::HIGH_RAM)..ram.end);
    }
    ranges
}

fn memory_size(memory: &GuestMemory) -> u64 {
    use vm_memory::GuestMemoryRegion;
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Maps the first 4 GiB with 2 MiB pages, as the 64-bit entry requires.
fn identity_map(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let write = |entry: u64, at: u64| {
        memory.write_slice(&entry.to_le_bytes(), GuestAddress(at)).map_err(BootError::Memory)
    };
    let pdpt = layout::PAGE_TABLES + PAGE;
    write(pdpt | PRESENT_WRITABLE, layout::PAGE_TABLES)?;
    for gib in 0..4 {
        let directory = pdpt + PAGE * (gib + 1);
        write(directory | PRESENT_WRITABLE, pdpt + gib * 8)?;
        for page in 0..512 {
            let address = gib << 30 | page << 21;
            write(address | LARGE | PRESENT_WRITABLE, directory + page * 8)?;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
