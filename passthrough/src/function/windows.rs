// SPDX-License-Identifier: Apache-2.0

//! The windows through which the guest reaches a function's registers without an exit.

use std::{io, ops::Range, sync::Arc};

use devices::{
    memory::{GuestMapper, HostMemory, MappingId},
    pci::bar::{BARS, Bars},
};

const PAGE: u64 = 4096;
/// The most refusals to log: a guest causes them by overlapping BARs.
const LOGGED_REFUSALS: u64 = 4;

/// Pages of a BAR that can be mapped into the guest.
struct Piece {
    bar: usize,
    offset: u64,
    memory: Arc<dyn HostMemory>,
    /// The current place in the guest.
    shown: Option<(u64, MappingId)>,
}

/// The mappable pieces of a function's BARs.
pub(super) struct Windows {
    mapper: Arc<dyn GuestMapper>,
    pieces: Vec<Piece>,
    refusals: u64,
}

impl Windows {
    pub(super) fn new(
        mapper: Arc<dyn GuestMapper>,
        pieces: impl IntoIterator<Item = (usize, u64, Arc<dyn HostMemory>)>,
    ) -> Self {
        let piece = |(bar, offset, memory)| Piece { bar, offset, memory, shown: None };
        Self { mapper, pieces: pieces.into_iter().map(piece).collect(), refusals: 0 }
    }

    /// Brings the windows in line with the decoded BARs. Obsolete windows go first.
    ///
    /// # Errors
    /// When a window cannot be removed. (A window that cannot be made is no error: its accesses exit.)
    pub(super) fn sync(&mut self, bars: &Bars) -> io::Result<()> {
        let wanted: Vec<Option<u64>> = self.pieces.iter().map(|piece| place(bars, piece)).collect();
        let mapper = &self.mapper;
        for (piece, wanted) in self.pieces.iter_mut().zip(&wanted) {
            if let Some((gpa, id)) = piece.shown
                && Some(gpa) != *wanted
            {
                mapper.unmap(id)?;
                piece.shown = None;
            }
        }
        for (piece, wanted) in self.pieces.iter_mut().zip(wanted) {
            let Some(gpa) = wanted.filter(|_| piece.shown.is_none()) else { continue };
            match mapper.map(gpa, piece.memory.clone()) {
                Ok(id) => piece.shown = Some((gpa, id)),
                Err(error) => {
                    self.refusals = self.refusals.saturating_add(1);
                    if self.refusals <= LOGGED_REFUSALS {
                        tracing::warn!(gpa, bar = piece.bar, %error, "Cannot map a BAR into the guest: its accesses exit to the vmm");
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes every window.
    ///
    /// # Errors
    /// The kernel's first refusal; the other windows are still tried.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for piece in &mut self.pieces {
            let Some((_, id)) = piece.shown else { continue };
            match self.mapper.unmap(id) {
                Ok(()) => piece.shown = None,
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }

    /// Removes every window and releases the hardware's memory.
    pub(super) fn close(&mut self) -> io::Result<()> {
        let result = self.clear();
        self.pieces.retain(|piece| piece.shown.is_some());
        result
    }
}

/// The guest-physical address of a piece. None if its BAR does not decode, or if an earlier BAR, which takes
/// precedence, decodes in the same pages.
fn place(bars: &Bars, piece: &Piece) -> Option<u64> {
    let bar = bars.decoded(piece.bar)?;
    let gpa = bar.start.checked_add(piece.offset)?;
    let window = gpa..gpa.checked_add(piece.memory.len())?;
    if !gpa.is_multiple_of(PAGE) || window.end > bar.end {
        return None;
    }
    let pages = |range: Range<u64>| range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE);
    let covered = (0..BARS.min(piece.bar))
        .filter_map(|earlier| bars.decoded(earlier).map(pages))
        .any(|earlier| earlier.start < window.end && window.start < earlier.end);
    (!covered).then_some(gpa)
}
