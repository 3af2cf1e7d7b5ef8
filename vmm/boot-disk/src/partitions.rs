// SPDX-License-Identifier: Apache-2.0

//! Partitions: GPT (UEFI 2.10, chapter 5.3), or the table of a master boot record with its logical partitions.

use crate::{
    error::Fault,
    volume::{Volume, u32_at, u64_at},
};

const SECTOR: u64 = 512;
/// The most entries of a GPT that are looked at: its least, which all tools make.
const GPT_ENTRIES: u32 = 128;
/// The most logical partitions.
const LOGICAL: usize = 32;
/// Types of a GPT in the order of their bytes (the UAPI group's "Discoverable Partitions Specification"): an EFI system
/// partition, `c12a7328-f81f-11d2-ba4b-00a0c93ec93b`.
const ESP: [u8; 16] = 0x3bc9_3ec9_a000_4bba_11d2_f81f_c12a_7328_u128.to_le_bytes();
/// An extended boot loader partition, `bc13c2ff-59e6-4262-a352-b275fd6f7172`.
const XBOOTLDR: [u8; 16] = 0x7271_6ffd_75b2_52a3_4262_59e6_bc13_c2ff_u128.to_le_bytes();

/// The use of a partition, in the order in which boot loaders look at them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// An EFI system partition.
    Esp,
    /// An extended boot loader partition.
    Extended,
    Other,
}

impl Role {
    fn of(esp: bool, extended: bool) -> Self {
        match (esp, extended) {
            (true, _) => Self::Esp,
            (_, true) => Self::Extended,
            _ => Self::Other,
        }
    }
}

/// A partition, or the whole disk.
pub(crate) struct Partition {
    /// Its name in errors and logs.
    pub(crate) name: String,
    pub(crate) volume: Volume,
    pub(crate) role: Role,
}

/// The partitions of a disk; all of it, if it has none.
pub(crate) fn list(disk: &Volume) -> Result<Vec<Partition>, Fault> {
    let whole = || Partition { name: "the whole disk".to_owned(), volume: disk.clone(), role: Role::Other };
    if disk.size() < 2 * SECTOR {
        return Ok(vec![whole()]);
    }
    let sector: [u8; 512] = disk.array(0)?;
    if sector.get(510..) != Some(&[0x55, 0xaa]) {
        return Ok(vec![whole()]);
    }
    let primary: Vec<&[u8]> = sector.get(446..510).unwrap_or_default().chunks_exact(16).collect();
    if primary.iter().any(|entry| kind(entry) == 0xee) {
        return gpt(disk);
    }
    // A file system on the whole disk can end its first sector in the same way.
    let flags = primary.iter().all(|entry| entry.first().is_some_and(|flag| flag & 0x7f == 0));
    let found = if flags { mbr(disk, &primary)? } else { Vec::new() };
    Ok(if found.is_empty() { vec![whole()] } else { found })
}

fn kind(entry: &[u8]) -> u8 {
    entry.get(4).copied().unwrap_or(0)
}

fn partition(disk: &Volume, number: usize, first: u64, sectors: u64, role: Role) -> Option<Partition> {
    let volume = disk.part(first.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?)?;
    let text = if role == Role::Other { "" } else { " (for boot loaders)" };
    Some(Partition { name: format!("partition {number}{text}"), volume, role })
}

fn gpt(disk: &Volume) -> Result<Vec<Partition>, Fault> {
    let last = disk.size() / SECTOR - 1;
    for header in [1, last] {
        let header: [u8; 512] = disk.array(header * SECTOR)?;
        let (count, size) = (u32_at(&header, 80).min(GPT_ENTRIES), u32_at(&header, 84));
        if !header.starts_with(b"EFI PART") || !size.is_power_of_two() || !(128..=4096).contains(&size) {
            continue;
        }
        let table = u64_at(&header, 72).saturating_mul(SECTOR);
        let mut found = Vec::new();
        for number in 0..count {
            let at = table.saturating_add(u64::from(number).saturating_mul(size.into()));
            let entry: [u8; 128] = disk.array(at)?;
            let (first, end) = (u64_at(&entry, 32), u64_at(&entry, 40));
            let role = Role::of(entry.starts_with(&ESP), entry.starts_with(&XBOOTLDR));
            let sectors = end.checked_sub(first).and_then(|more| more.checked_add(1));
            if entry.get(..16) != Some(&[0; 16])
                && let Some(sectors) = sectors
            {
                let number = usize::try_from(number).unwrap_or(0) + 1;
                found.extend(partition(disk, number, first, sectors, role));
            }
        }
        return Ok(found);
    }
    Err(Fault::Damaged("its partition table"))
}

fn mbr(disk: &Volume, primary: &[&[u8]]) -> Result<Vec<Partition>, Fault> {
    let place = |entry: &[u8]| (u64::from(u32_at(entry, 8)), u64::from(u32_at(entry, 12)));
    let is_extended = |entry: &[u8]| matches!(kind(entry), 0x05 | 0x0f | 0x85);
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(primary) {
        let (first, sectors) = place(entry);
        if kind(entry) != 0 && !is_extended(entry) && sectors > 0 {
            found.extend(partition(disk, number, first, sectors, Role::of(kind(entry) == 0xef, false)));
        }
    }
    // Each logical partition has a table with its own entry and that of the next table.
    let extended = primary.iter().find(|entry| is_extended(entry)).map(|entry| place(entry).0);
    let (base, mut table) = (extended.unwrap_or(0), extended);
    for number in (5..).take(LOGICAL) {
        let Some(at) = table.filter(|at| at.saturating_add(1).saturating_mul(SECTOR) <= disk.size()) else {
            break;
        };
        let sector: [u8; 512] = disk.array(at.saturating_mul(SECTOR))?;
        if sector.get(510..) != Some(&[0x55, 0xaa]) {
            break;
        }
        let entries: Vec<&[u8]> = sector.get(446..478).unwrap_or_default().chunks_exact(16).collect();
        let [own, next] = entries.as_slice() else { break };
        let (first, sectors) = place(own);
        if kind(own) != 0 && sectors > 0 {
            found.extend(partition(
                disk,
                number,
                at.saturating_add(first),
                sectors,
                Role::of(kind(own) == 0xef, false),
            ));
        }
        table = is_extended(next).then(|| base.saturating_add(place(next).0));
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
