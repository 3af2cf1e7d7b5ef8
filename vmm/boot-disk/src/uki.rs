// SPDX-License-Identifier: Apache-2.0

//! Unified kernel images (the UAPI group's "Unified Kernel Image"): a kernel, its initramfs and its command line in the
//! sections of a PE file (Microsoft's "PE Format").

use std::rc::Rc;

use crate::{
    bls::in_entry,
    entry::Draft,
    error::{Fault, printable},
    filesystem::{Contents, FileSystem, Part},
    volume::{u16_at, u32_at},
};

/// Bytes of the DOS header, of the COFF header with its signature, and of a section's header.
const DOS: usize = 64;
const COFF: usize = 24;
const SECTION: usize = 40;
/// The most sections that are looked at.
const SECTIONS: usize = 96;
/// The machine x86-64.
const AMD64: u16 = 0x8664;
/// The longest command line in a section.
const CMDLINE: u64 = 64 << 10;

/// The kernel in a unified image.
pub(crate) fn draft(files: &dyn FileSystem, path: &str) -> Result<Draft, Fault> {
    let in_file = |fault: Fault| in_entry(path, fault);
    let contents = files.open(path).map_err(in_file)?;
    let sections = sections(&contents).map_err(in_file)?;
    let part = |name: &[u8]| {
        let found =
            sections.iter().find(|(section, _, _)| section.split(|byte| *byte == 0).next() == Some(name));
        let Some((_, offset, size)) = found else { return Ok(None) };
        let part = Part::range(Rc::clone(&contents), *offset, *size);
        part.map(Some).ok_or_else(|| in_file(Fault::Entry("a section ends behind the file".to_owned())))
    };
    let kernel =
        part(b".linux")?.ok_or_else(|| in_file(Fault::Entry("it has no section .linux".to_owned())))?;
    let cmdline = match part(b".cmdline")? {
        Some(part) => part.all(".cmdline", CMDLINE)?,
        None => Vec::new(),
    };
    let cmdline = String::from_utf8_lossy(&cmdline).trim_end_matches('\0').to_owned();
    let initramfs = part(b".initrd")?.into_iter().collect();
    Ok(Draft { title: printable(path), path: printable(path), kernel, initramfs, cmdline })
}

/// The sections: their names, offsets and lengths in the file.
fn sections(contents: &Rc<dyn Contents>) -> Result<Vec<([u8; 8], u64, u64)>, Fault> {
    let invalid = || Fault::Entry("it is no PE file for x86-64".to_owned());
    let read = |offset: u64, len: usize| {
        let end = offset.checked_add(len as u64).filter(|end| *end <= contents.size());
        end.ok_or_else(invalid)?;
        let mut bytes = vec![0; len];
        contents.read(offset, &mut bytes)?;
        Ok::<_, Fault>(bytes)
    };
    let dos = read(0, DOS)?;
    let header = u64::from(u32_at(&dos, 60));
    let coff = read(header, COFF)?;
    if !dos.starts_with(b"MZ") || !coff.starts_with(b"PE\0\0") || u16_at(&coff, 4) != AMD64 {
        return Err(invalid());
    }
    let count = usize::from(u16_at(&coff, 6));
    if count > SECTIONS {
        return Err(invalid());
    }
    let table = header.saturating_add(COFF as u64).saturating_add(u16_at(&coff, 20).into());
    let headers = read(table, count * SECTION)?;
    let section = |header: &[u8]| {
        // The data on the disk is padded; in memory it is as long as it was.
        let (memory, disk) = (u64::from(u32_at(header, 8)), u64::from(u32_at(header, 16)));
        let size = if memory == 0 { disk } else { memory.min(disk) };
        (crate::volume::field(header, 0), u64::from(u32_at(header, 20)), size)
    };
    Ok(headers.chunks_exact(SECTION).map(section).collect())
}

#[cfg(test)]
mod tests;
