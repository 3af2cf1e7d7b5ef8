// SPDX-License-Identifier: Apache-2.0

//! VFs of 82599, X540, X550, X552 and X553 (Linux drivers ixgbevf and ixgbe).
//!
//! The mailbox page also has the interrupt registers, so most of its registers pass in both directions. The guest gets
//! version 1.3 of the mailbox protocol at most: 1.4 offers IPsec offload, which no policy covers, and 1.5 has a
//! handshake that ixgbe does not know.

mod codec;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
#[cfg(test)]
mod tests;

use super::{AddressRule, Family, LostWords};
use crate::channel::mailbox::{
    layout::{Layout, Passed},
    register_bits::{NACK_MESSAGE, PF_CONTROL},
};

/// 82599, X540, X550, X552 and X553 VFs. Offsets as in Linux' `ixgbevf/regs.h`. The ids of VFs under Hyper-V, which
/// have no mailbox, are not here, nor is that of the E610, whose link state needs version 1.6.
pub static IXGBEVF: Family = Family {
    driver: "ixgbevf",
    ids: &[(0x8086, 0x10ed), (0x8086, 0x1515), (0x8086, 0x1565), (0x8086, 0x15a8), (0x8086, 0x15c5)],
    layout: Layout {
        bar: 0,
        control: 0x0000,
        mailbox: 0x02fc,
        buffer: 0x0200,
        passed: &[
            Passed::read(0x0008),          // VFSTATUS
            Passed::read(0x0010),          // VFLINKS
            Passed::read(0x0048),          // VFFRTIMER
            Passed::both(0x0100..0x0104),  // VTEICR, which a read clears: the relay never reads it
            Passed::write(0x0104..0x0108), // VTEICS
            Passed::both(0x0108..0x010c),  // VTEIMS
            Passed::write(0x010c..0x0110), // VTEIMC
            Passed::both(0x0110..0x0118),  // VTEIAC, VTEIAM
            Passed::both(0x0120..0x0130),  // VTIVAR 0 to 3
            Passed::both(0x0140..0x0144),  // VTIVAR_MISC
            Passed::both(0x0180..0x018c),  // VTRSCINT 0 to 2
            Passed::write(0x0300..0x0304), // VFPSRTYPE
            Passed::write(0x0820..0x082c), // VTEITR 0 to 2
        ],
        trigger: 0x0104,
        mailbox_vector: 0x0140,
    },
    codec: &codec::Ixgbevf,
    address: AddressRule::Adopts,
    // DPDK resets after the first word, which it compares exactly. Linux' driver acknowledges it without a look at it,
    // and resets after the second, which is ixgbe's response to that acknowledgement.
    lost: LostWords { first: PF_CONTROL, acknowledged: Some(NACK_MESSAGE) },
};
