// SPDX-License-Identifier: Apache-2.0

//! Names in a directory. An index (`dir_index`) hides in entries without an inode, so that a linear scan works, too.

use std::cell::Cell;

use super::{Inode, Shared};
use crate::{
    error::Fault,
    volume::{u16_at, u32_at},
};

/// The most bytes of a directory that are looked at: some ten thousand names.
const MOST: u64 = 4 << 20;
/// Bytes of an entry before its name.
const HEADER: usize = 8;

/// Calls `take(name, inode)` for each entry until it returns false.
pub(super) fn visit(
    shared: &Shared,
    inode: &Inode,
    mut take: impl FnMut(&[u8], u32) -> bool,
) -> Result<(), Fault> {
    inode.check()?;
    if inode.size > MOST {
        return Err(Fault::Unsupported(format!("a directory of {} bytes", inode.size)));
    }
    let known = Cell::default();
    let size = usize::try_from(shared.block).unwrap_or_default();
    let mut block = vec![0; size];
    for number in 0..inode.size / shared.block {
        shared.contents(inode, &known, number.saturating_mul(shared.block), &mut block)?;
        let mut rest = block.as_slice();
        while rest.len() >= HEADER {
            let (number, length) = (u32_at(rest, 0), usize::from(u16_at(rest, 4)));
            // 65536 does not fit into its field.
            let length = if length == 0 || length == 65535 { size.min(rest.len()) } else { length };
            let name_length = usize::from(rest.get(6).copied().unwrap_or(0));
            let name = rest.get(HEADER..HEADER.saturating_add(name_length));
            let (Some(name), true) = (name, length >= HEADER && length <= rest.len()) else {
                return Err(Fault::Damaged("a directory"));
            };
            if number != 0 && !name.is_empty() && !take(name, number) {
                return Ok(());
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
    Ok(())
}

/// The inode of a name.
pub(super) fn find(shared: &Shared, directory: &Inode, name: &str) -> Result<Option<u32>, Fault> {
    let mut found = None;
    visit(shared, directory, |other, inode| {
        found = (other == name.as_bytes()).then_some(inode);
        found.is_none()
    })?;
    Ok(found)
}
