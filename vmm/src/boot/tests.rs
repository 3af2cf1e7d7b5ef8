// SPDX-License-Identifier: Apache-2.0

use std::{fs::File, io::Write};

use linux_loader::loader::{bootparam::boot_params, elf::start_info::hvm_modlist_entry};

use super::*;
use crate::{board, memory};

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn payload(kernel: &[u8], initramfs: Option<&[u8]>) -> Payload {
    Payload {
        source: Source::Files { kernel: file(kernel), initramfs: initramfs.map(file).into_iter().collect() },
        cmdline: "console=ttyS0".into(),
        smbios: Vec::new(),
    }
}

fn machine() -> acpi::Description {
    acpi::Description { cpus: 1, devices: Vec::new() }
}

/// A bzImage with one setup sector and `body` as its compressed kernel.
fn bzimage(xloadflags: u16, init_size: u32, body: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x400];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    image.extend_from_slice(body);
    image
}

/// An ELF image with one segment at 1 MiB, and a PVH note in front of it if wanted.
pub(crate) fn elf(pvh: bool, code: &[u8]) -> Vec<u8> {
    let headers = if pvh { 2 } else { 1 };
    let mut image = Vec::new();
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend_from_slice(&2_u16.to_le_bytes());
    image.extend_from_slice(&62_u16.to_le_bytes());
    image.extend_from_slice(&1_u32.to_le_bytes());
    image.extend_from_slice(&0x10_0000_u64.to_le_bytes());
    image.extend_from_slice(&64_u64.to_le_bytes());
    image.extend_from_slice(&0_u64.to_le_bytes());
    image.extend_from_slice(&0_u32.to_le_bytes());
    for value in [64_u16, 56, headers, 64, 0, 0] {
        image.extend_from_slice(&value.to_le_bytes());
    }
    let note = [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000];
    let notes_at = 64 + 56 * u64::from(headers);
    let code_at = if pvh { notes_at + 20 } else { notes_at };
    let mut program_header = |kind: u32, offset: u64, address: u64, size: u64| {
        image.extend_from_slice(&kind.to_le_bytes());
        image.extend_from_slice(&7_u32.to_le_bytes());
        for value in [offset, address, address, size, size, 4] {
            image.extend_from_slice(&value.to_le_bytes());
        }
    };
    if pvh {
        program_header(4, notes_at, 0, 20);
    }
    program_header(1, code_at, 0x10_0000, code.len() as u64);
    if pvh {
        note.iter().for_each(|word| image.extend_from_slice(&word.to_le_bytes()));
    }
    image.extend_from_slice(code);
    image
}

#[test]
fn kernels_are_told_apart() {
    let memory = memory::reserve(16 << 20, memory::Pages::Ordinary, None).unwrap();
    let entry = |image: &[u8]| load(&memory, &mut payload(image, None), &machine());
    assert_eq!(entry(&elf(true, &[0xf4])).unwrap(), Entry::Pvh { rip: 0x10_0000 });
    assert_eq!(entry(&elf(false, &[0xf4])).unwrap(), Entry::Linux64 { rip: 0x10_0000 });
    assert_eq!(entry(&bzimage(1, 0x1000, &[0xf4; 600])).unwrap(), Entry::Linux64 { rip: 0x10_0200 });
    assert!(matches!(entry(&bzimage(0, 0x1000, &[0xf4])), Err(BootError::NotSixtyFourBit)));
    for rubbish in [&b""[..], b"#!/bin/sh\n", &[0; 4096]] {
        assert!(matches!(entry(rubbish), Err(BootError::NotAKernel)), "{} bytes", rubbish.len());
    }
    let cut = &elf(true, &[0x90; 4096])[..1000];
    assert!(matches!(entry(cut), Err(BootError::Load(_))));
    let mut other = elf(true, &[0xf4]);
    other[18..20].copy_from_slice(&183_u16.to_le_bytes());
    assert!(matches!(entry(&other), Err(BootError::OtherMachine(183))));
    // 40 paragraphs behind two sectors, without the last byte.
    let mut whole = bzimage(1, 0x1000, &[0xf4; 640]);
    whole[0x1f4..0x1f8].copy_from_slice(&40_u32.to_le_bytes());
    assert_eq!(entry(&whole).unwrap(), Entry::Linux64 { rip: 0x10_0200 });
    let cut = &whole[..whole.len() - 16];
    assert!(matches!(entry(cut), Err(BootError::Cut { size: 1648, whole: 1664 })));
}

#[test]
fn the_initramfs_lies_high_and_clear_of_the_kernel() {
    let memory = memory::reserve(16 << 20, memory::Pages::Ordinary, None).unwrap();
    let initramfs = vec![0xab; 5000];
    load(&memory, &mut payload(&bzimage(1, 8 << 20, &[0xf4]), Some(&initramfs)), &machine()).unwrap();
    let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
    let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!((image, size), ((16 << 20) - 8192, 5000));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::from(image) + 4999)).unwrap(), 0xab);
    let e820 = params.e820_table;
    let table = e820[..usize::from(params.e820_entries)]
        .iter()
        .map(|entry| (entry.addr, entry.size, entry.r#type))
        .collect::<Vec<_>>();
    assert_eq!(
        table,
        [(0, 0xa_0000, 1), (0x10_0000, 15 << 20, 1), (0xe_0000, 0x2_0000, 2), (0xe000_0000, 0x10_0000, 2)]
    );

    let large = vec![0; 8 << 20];
    let result = load(&memory, &mut payload(&bzimage(1, 8 << 20, &[0xf4]), Some(&large)), &machine());
    assert!(matches!(result, Err(BootError::InitramfsTooLarge { .. })));
}

/// Memory of the last boot shows padding that is not written.
#[test]
fn initramfs_files_follow_each_other_at_multiples_of_four() {
    let memory = memory::reserve(16 << 20, memory::Pages::Ordinary, None).unwrap();
    let end = 16_u64 << 20;
    let load_with = |parts: &[&[u8]], kernel: &[u8]| {
        memory.write_slice(&[0xee; 8192], GuestAddress(end - 8192)).unwrap();
        let mut payload = payload(kernel, None);
        let initramfs = parts.iter().map(|part| file(part)).collect();
        payload.source = Source::Files { kernel: file(kernel), initramfs };
        load(&memory, &mut payload, &machine())
    };
    let read = |at: u64, size: usize| {
        let mut bytes = vec![0; size];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    };
    let large = vec![b'l'; 4097];
    for (parts, expect) in [
        (vec![&b"abcde"[..], b"fg", b"hijk", b"l"], b"abcde\0\0\0fg\0\0hijkl".to_vec()),
        (vec![b"", b"abc", b"", b"d"], b"abc\0d".to_vec()),
        (vec![&large, b"x"], [&large[..], b"\0\0\0x"].concat()),
    ] {
        load_with(&parts, &bzimage(1, 0x1000, &[0xf4])).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
        let (at, size) = (u64::from(params.hdr.ramdisk_image), params.hdr.ramdisk_size as usize);
        assert_eq!((at % 4096, size), (0, expect.len()));
        assert!(read(at, size) == expect, "{:?}", String::from_utf8_lossy(&read(at, size)));
        // The same for PVH: one module.
        load_with(&parts, &elf(true, &[0xf4])).unwrap();
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(layout::PVH_TABLES)).unwrap();
        assert_eq!((module.paddr, module.size), (at, size as u64));
        assert!(read(at, size) == expect);
    }
    let half = vec![0; 8 << 20];
    let error = load_with(&[&half, &half], &elf(true, &[0xf4])).unwrap_err();
    assert!(matches!(error, BootError::InitramfsTooLarge { size: 0x100_0000, .. }), "{error}");
}

#[test]
fn a_kernel_s_own_limit_of_the_command_line_holds() {
    let memory = memory::reserve(4 << 20, memory::Pages::Ordinary, None).unwrap();
    let with = |limit: u32, size: usize| {
        let mut image = bzimage(1, 0x1000, &[0xf4]);
        image[0x238..0x23c].copy_from_slice(&limit.to_le_bytes());
        let mut payload = payload(&image, None);
        payload.cmdline = "x".repeat(size);
        load(&memory, &mut payload, &machine()).map(|_| ())
    };
    with(255, 255).unwrap();
    with(2047, 2047).unwrap();
    with(0, 2047).unwrap();
    let error = with(255, 256).unwrap_err().to_string();
    assert!(error.contains("256") && error.contains("255"), "{error}");
}

#[test]
fn command_lines_are_checked() {
    let memory = memory::reserve(4 << 20, memory::Pages::Ordinary, None).unwrap();
    let with = |cmdline: &str| {
        let mut payload = payload(&elf(true, &[0xf4]), None);
        payload.cmdline = cmdline.to_owned();
        load(&memory, &mut payload, &machine()).map(|_| ())
    };
    assert!(with(&"x".repeat(layout::CMDLINE_MAX - 1)).is_ok());
    assert!(matches!(with(&"x".repeat(layout::CMDLINE_MAX)), Err(BootError::CmdlineTooLong(2048))));
    assert!(matches!(with("a\0b"), Err(BootError::CmdlineCharacter)));
}

#[test]
fn a_jump_to_the_bios_finds_the_reset() {
    let memory = memory::reserve(4 << 20, memory::Pages::Ordinary, None).unwrap();
    load(&memory, &mut payload(&elf(true, &[0xf4]), None), &machine()).unwrap();
    let mut stub = [0; 7];
    memory.read_slice(&mut stub, GuestAddress(0xf_fff0)).unwrap();
    assert_eq!(stub, RESET_STUB);
}

#[test]
fn acpi_tables_end_before_the_smbios_tables() {
    let memory = memory::reserve(4 << 20, memory::Pages::Ordinary, None).unwrap();
    let devices = board::tests::board().aml();
    assert!(!devices.is_empty());
    let load_with = |devices: Vec<u8>| {
        let machine = acpi::Description { cpus: 254, devices };
        load(&memory, &mut payload(&elf(true, &[0xf4]), None), &machine).map(|_| ())
    };
    load_with(devices.clone()).unwrap();
    let tables = acpi::tables(&acpi::Description { cpus: 254, devices: devices.clone() });
    // The tables behind the DSDT begin at multiples of 16.
    let rest = (ACPI_MAX - tables.len() as u64) & !15;
    let with = |more: u64| [devices.clone(), vec![0; usize::try_from(rest + more).unwrap()]].concat();
    load_with(with(0)).unwrap();
    let mut stub = [0; 7];
    memory.read_slice(&mut stub, GuestAddress(layout::RESET_VECTOR)).unwrap();
    assert_eq!(stub, RESET_STUB);
    let error = load_with(with(16)).unwrap_err();
    assert!(matches!(error, BootError::TablesTooLong { size } if size > ACPI_MAX), "{error}");
}

#[test]
fn smbios_tables_end_before_the_reset_vector() {
    let memory = memory::reserve(4 << 20, memory::Pages::Ordinary, None).unwrap();
    let load_with = |size: u64| {
        let mut payload = payload(&elf(true, &[0xf4]), None);
        payload.smbios = vec![0xab; usize::try_from(size).unwrap()];
        load(&memory, &mut payload, &machine()).map(|_| ())
    };
    load_with(SMBIOS_MAX).unwrap();
    let mut bytes = [0; 8];
    memory.read_slice(&mut bytes, GuestAddress(layout::RESET_VECTOR - 1)).unwrap();
    assert_eq!((bytes[0], &bytes[1..]), (0xab, &RESET_STUB[..]));
    let error = load_with(SMBIOS_MAX + 1).unwrap_err();
    assert!(matches!(error, BootError::StringsTooLong { size: 0xfff1 }), "{error}");
}

#[test]
fn the_area_of_the_smbios_tables_has_room_for_the_longest_strings() {
    let text = |size: usize| "x".repeat(size);
    let machine = devices::smbios::Identity {
        manufacturer: text(64),
        product: text(64),
        serial: text(64),
        uuid: [0; 16],
    };
    let strings = vec![b'x'; protocol::files::OEM_STRINGS_MAX];
    let strings: Vec<&[u8]> = strings.chunks(strings.len() / 200).collect();
    let tables = devices::smbios::tables(layout::SMBIOS.start, &machine, &strings).unwrap();
    assert!(tables.len() as u64 <= SMBIOS_MAX, "{}", tables.len());
}

#[test]
fn memory_beyond_the_hole_is_listed() {
    let memory = memory::reserve(4 << 30, memory::Pages::Ordinary, None).unwrap();
    assert_eq!(usable_ram(&memory), [0..0xa_0000, 0x10_0000..0xc000_0000, 0x1_0000_0000..0x1_4000_0000]);
}

#[test]
fn a_disk_that_cannot_be_read_is_no_missing_kernel() {
    use crate::machine::MachineError;
    let code = |source| {
        let error = BootError::NoKernelOnDisk { disk: "root".to_owned(), source };
        MachineError::Boot(error).failure().code
    };
    let unreadable = boot_disk::FindError::Read(std::io::ErrorKind::InvalidData.into());
    assert_eq!(code(unreadable), protocol::FailureCode::Disk);
    let slow = boot_disk::FindError::Late(std::time::Duration::from_secs(60));
    assert_eq!(code(slow), protocol::FailureCode::Disk, "to install a kernel would not help");
    assert_eq!(code(boot_disk::FindError::Budget(1)), protocol::FailureCode::NoKernelOnDisk);
}
