// SPDX-License-Identifier: Apache-2.0

//! A family for tests only: the proof that a family is a folder and a line in a table.
//!
//! It differs from igbvf wherever a family may: another BAR and other offsets, registers that pass in both directions,
//! replies with data, a protocol message, a driver that adopts the address of a reset, two words for a lost "clear to
//! send".

mod codec;
mod double;
mod tests;

use super::{AddressRule, Family, LostWords};
use crate::channel::mailbox::layout::{Layout, Passed};

/// The family.
pub(super) static SAMPLE: Family = Family {
    driver: "samplevf",
    ids: &[(0xfffe, 0x0001)],
    layout: Layout {
        bar: 2,
        control: 0x0010,
        mailbox: 0x02fc,
        buffer: 0x0200,
        passed: &[
            Passed::read(0x0008),
            Passed { offsets: 0x0104..0x0118, read: true, write: true },
            Passed { offsets: 0x0140..0x0144, read: true, write: true },
            Passed { offsets: 0x0820..0x0824, read: false, write: true },
        ],
        trigger: 0x0104,
        mailbox_vector: 0x0140,
    },
    codec: &codec::Sample,
    address: AddressRule::Adopts,
    lost: LostWords { first: 0x0000_0100, acknowledged: Some(0x4000_0000) },
};
