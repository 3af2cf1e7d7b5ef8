// SPDX-License-Identifier: Apache-2.0

//! The kind of file system of a volume, by its magic number.

use std::rc::Rc;

use crate::{error::Fault, ext4::Ext4, fat::Fat, filesystem::FileSystem, volume::Volume};

/// Opens the file system of a volume. None for a volume without one that is known.
pub(crate) fn open(volume: &Volume) -> Result<Option<Rc<dyn FileSystem>>, Fault> {
    // Magic numbers: their offset, their bytes, their name.
    const OTHERS: [(u64, &[u8], &str); 9] = [
        (0, b"XFSB", "the file system XFS"),
        (0x1_0040, b"_BHRfS_M", "the file system Btrfs"),
        (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
        (512, b"LABELONE", "a physical volume of LVM"),
        (1024, &[0x10, 0x20, 0xf5, 0xf2], "the file system F2FS"),
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "the file system EROFS"),
        (0, b"hsqs", "the file system SquashFS"),
        (0x8001, b"CD001", "the file system ISO 9660"),
        (3, b"NTFS    ", "the file system NTFS"),
    ];
    for (at, magic, name) in OTHERS {
        let mut found = [0; 8];
        let found = found.get_mut(..magic.len()).unwrap_or_default();
        if at.saturating_add(found.len() as u64) <= volume.size() {
            volume.read(at, found)?;
            if found == magic {
                return Err(Fault::Unsupported(name.to_owned()));
            }
        }
    }
    if let Some(found) = Ext4::open(volume)? {
        return Ok(Some(Rc::new(found)));
    }
    if let Some(found) = Fat::open(volume)? {
        return Ok(Some(Rc::new(found)));
    }
    Ok(None)
}
