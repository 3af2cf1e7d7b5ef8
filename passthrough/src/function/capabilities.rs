// SPDX-License-Identifier: Apache-2.0

//! A function's capability lists, and the part of them that the guest sees.

use std::ops::Range;

use devices::pci::{
    config::{self, capability},
    msi::MsiShape,
    msix,
};

use super::FunctionError;
use crate::hardware::{IrqKind, VfHardware};

/// Bound of the walk: more capabilities than fit into 192 bytes at 4 each.
const MAX_CAPABILITIES: usize = 48;
/// The same for extended capabilities, of 8 bytes at least.
const MAX_EXTENDED: usize = 480;

/// Extended capabilities that the guest may see: error reporting, serial number, vendor specific. Hidden are SR-IOV and
/// ARI (there is one function on the guest's bus), resizable BARs (they are emulated at one size), ATS, PRI and PASID
/// (the guest has no IOMMU).
const SHOWN_EXTENDED: [u16; 3] = [0x0001, 0x0003, 0x000b];
const SHOWN: [u8; 5] = [
    capability::POWER_MANAGEMENT,
    capability::VPD,
    capability::VENDOR,
    capability::EXPRESS,
    capability::ADVANCED_FEATURES,
];

/// Bytes of an MSI-X capability (PCI Local Bus 3.0, 6.8.2).
const MSIX_SIZE: u16 = 12;

const EXPRESS_DEVICE_CAPABILITIES: u16 = 4;
const EXPRESS_FLR: u32 = 1 << 28;
const ADVANCED_FLR: u8 = 1 << 1;

/// The place of the MSI-X structures: index of the BAR and offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsixLocation {
    pub(super) capability: u16,
    pub(super) vectors: u16,
    /// Vectors in the hardware's own table: the guest may see fewer.
    hardware_vectors: u16,
    pub(super) table: (usize, u64),
    pub(super) pending: (usize, u64),
}

impl MsixLocation {
    pub(super) fn table_range(&self) -> Range<u64> {
        self.table.1..self.table.1.saturating_add(u64::from(self.hardware_vectors) * msix::ENTRY)
    }

    pub(super) fn pending_range(&self) -> Range<u64> {
        self.pending.1..self.pending.1.saturating_add(u64::from(self.hardware_vectors).div_ceil(64) * 8)
    }
}

/// The capabilities of a function.
#[derive(Clone, Debug, Default)]
pub(super) struct Capabilities {
    pub(super) msi: Option<(u16, MsiShape)>,
    pub(super) msix: Option<MsixLocation>,
    pub(super) power_management: Option<u16>,
    /// PCI Express, and whether it offers function level reset.
    pub(super) express: Option<(u16, bool)>,
    /// Advanced features, and whether they offer function level reset.
    pub(super) advanced: Option<(u16, bool)>,
    /// Offset of each visible capability, and of the next one (0 at the end).
    pub(super) chain: Vec<(u16, u8)>,
    /// Extended capability headers as the guest reads them.
    pub(super) extended: Vec<(u16, u32)>,
    /// Bytes that read as zero and ignore writes.
    pub(super) hidden: Vec<Range<u16>>,
}

/// Whether this is the first capability of its kind. A function has only one (PCI Local Bus 3.0, section 6.7): the
/// guest sees the first, which is emulated.
fn take_first<T>(place: &mut Option<T>, found: T) -> bool {
    let is_first = place.is_none();
    place.get_or_insert(found);
    is_first
}

impl Capabilities {
    pub(super) fn scan(hardware: &dyn VfHardware) -> Result<Self, FunctionError> {
        let mut found = Self::default();
        let all = apart_from_msix(standard_list(hardware));
        let mut shown = Vec::new();
        for &(offset, id) in &all {
            if found.take(hardware, offset, id)? {
                shown.push(offset);
            }
        }
        let nexts = shown.iter().skip(1).copied().chain([0]);
        found.chain = shown.iter().copied().zip(nexts.map(|next| u8::try_from(next).unwrap_or(0))).collect();
        let offsets: Vec<u16> = all.iter().map(|(offset, _)| *offset).collect();
        found.hide(&offsets, &shown, config::LEGACY_SPACE);
        found.scan_extended(hardware);
        Ok(found)
    }

    /// The start of the list, 0 if it is empty.
    pub(super) fn first(&self) -> u8 {
        self.chain.first().map_or(0, |(offset, _)| u8::try_from(*offset).unwrap_or(0))
    }

    /// Notes one capability. Returns whether the guest sees it.
    fn take(&mut self, hardware: &dyn VfHardware, at: u16, id: u8) -> Result<bool, FunctionError> {
        match id {
            capability::MSI if hardware.irq_count(IrqKind::Msi) > 0 && self.msi.is_none() => {
                let control = (dword(hardware, at) >> 16) as u16;
                let mut shape = MsiShape::from_control(control);
                let limit = hardware.irq_count(IrqKind::Msi).ilog2();
                shape.messages_log2 = shape.messages_log2.min(u16::try_from(limit).unwrap_or(0));
                let end = at.saturating_add(shape.size());
                if end > config::LEGACY_SPACE {
                    return Ok(false);
                }
                self.msi = Some((at, shape));
                Ok(true)
            }
            capability::MSIX if hardware.irq_count(IrqKind::Msix) > 0 && self.msix.is_none() => {
                self.msix = Some(msix_location(hardware, at)?);
                Ok(true)
            }
            capability::MSI | capability::MSIX => Ok(false),
            capability::POWER_MANAGEMENT => Ok(take_first(&mut self.power_management, at)),
            capability::EXPRESS => {
                let flr = dword(hardware, at + EXPRESS_DEVICE_CAPABILITIES) & EXPRESS_FLR != 0;
                Ok(take_first(&mut self.express, (at, flr)))
            }
            capability::ADVANCED_FEATURES => {
                let flr = dword(hardware, at).to_le_bytes()[3] & ADVANCED_FLR != 0;
                Ok(take_first(&mut self.advanced, (at, flr)))
            }
            id => Ok(SHOWN.contains(&id)),
        }
    }

    fn scan_extended(&mut self, hardware: &dyn VfHardware) {
        let first = config::EXTENDED_CAPABILITIES;
        if self.express.is_none() {
            self.hidden.push(first..4096);
            return;
        }
        let all = extended_list(hardware);
        let shown: Vec<(u16, u32)> = all
            .iter()
            .copied()
            .filter(|(_, header)| SHOWN_EXTENDED.contains(&((header & 0xffff) as u16)))
            .collect();
        let mut offsets: Vec<u16> = all.iter().map(|(offset, _)| *offset).collect();
        if offsets.is_empty() {
            offsets.push(first);
        }
        let visible: Vec<u16> = shown.iter().map(|(offset, _)| *offset).collect();
        self.hide(&offsets, &visible, 4096);
        let mut headers = Vec::new();
        if visible.first() != Some(&first) {
            // The list begins at a fixed offset: a null capability leads to the first visible one.
            let next = visible.first().copied().unwrap_or(0);
            headers.push((first, u32::from(next) << 20));
        }
        let nexts = visible.iter().skip(1).copied().chain([0]);
        headers.extend(
            shown
                .iter()
                .zip(nexts)
                .map(|((offset, header), next)| (*offset, (header & 0x000f_ffff) | u32::from(next) << 20)),
        );
        self.extended = headers;
    }

    /// A capability owns the bytes up to the start of the next one.
    fn hide(&mut self, all: &[u16], shown: &[u16], end: u16) {
        let mut sorted = all.to_vec();
        sorted.sort_unstable();
        let ends = sorted.iter().skip(1).copied().chain([end]);
        let hidden = sorted.iter().copied().zip(ends).filter(|(start, _)| !shown.contains(start));
        self.hidden.extend(hidden.map(|(start, end)| start..end));
    }
}

fn dword(hardware: &dyn VfHardware, offset: u16) -> u32 {
    let mut data = [0; 4];
    hardware.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// Offsets and ids of the standard list, up to the first entry that makes no sense.
fn standard_list(hardware: &dyn VfHardware) -> Vec<(u16, u8)> {
    let mut found: Vec<(u16, u8)> = Vec::new();
    let mut next = dword(hardware, config::CAPABILITIES).to_le_bytes()[0] & !3;
    while found.len() < MAX_CAPABILITIES {
        let offset = u16::from(next);
        if offset < 0x40 || found.iter().any(|(seen, _)| *seen == offset) {
            break;
        }
        let [id, after, ..] = dword(hardware, offset).to_le_bytes();
        if id == 0xff {
            break;
        }
        found.push((offset, id));
        next = after & !3;
    }
    found
}

/// Drops capabilities inside an MSI-X capability: with such broken hardware, the guest would see the table in the wrong
/// place.
fn apart_from_msix(mut all: Vec<(u16, u8)>) -> Vec<(u16, u8)> {
    if let Some(at) = all.iter().find(|(_, id)| *id == capability::MSIX).map(|(offset, _)| *offset) {
        all.retain(|(offset, _)| *offset <= at || *offset >= at.saturating_add(MSIX_SIZE));
    }
    all
}

/// Offsets and headers of the extended list, up to the first entry that makes no sense.
fn extended_list(hardware: &dyn VfHardware) -> Vec<(u16, u32)> {
    let mut found: Vec<(u16, u32)> = Vec::new();
    let mut offset = config::EXTENDED_CAPABILITIES;
    while found.len() < MAX_EXTENDED {
        let header = dword(hardware, offset);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push((offset, header));
        offset = ((header >> 20) & 0xffc) as u16;
        if offset < config::EXTENDED_CAPABILITIES || found.iter().any(|(seen, _)| *seen == offset) {
            break;
        }
    }
    found
}

fn msix_location(hardware: &dyn VfHardware, at: u16) -> Result<MsixLocation, FunctionError> {
    let size = ((dword(hardware, at) >> 16) as u16 & (msix::MAX_VECTORS - 1)) + 1;
    let place = |offset: u16| {
        let value = dword(hardware, at + offset);
        ((value & 7) as usize, u64::from(value & !7))
    };
    let shown = u16::try_from(hardware.irq_count(IrqKind::Msix)).unwrap_or(u16::MAX).min(size);
    let location = MsixLocation {
        capability: at,
        vectors: shown,
        hardware_vectors: size,
        table: place(4),
        pending: place(8),
    };
    let inside = |what, (bar, offset): (usize, u64), range: Range<u64>| {
        let info = hardware.bar(bar);
        if info.io || range.end > info.size {
            return Err(FunctionError::MsixOutside { what, bar, offset });
        }
        Ok(())
    };
    inside("table", location.table, location.table_range())?;
    inside("pending bits", location.pending, location.pending_range())?;
    Ok(location)
}
