// SPDX-License-Identifier: Apache-2.0

//! VFs of 82576 and i350 (Linux drivers igbvf and igb).

mod codec;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;

use super::{AddressRule, Family, LostWords};
use crate::channel::mailbox::{
    layout::{Layout, Passed},
    register_bits::{NACK_MESSAGE, PF_CONTROL},
};

/// 82576 and i350 VFs. Offsets as in Linux' `igbvf/regs.h`.
pub static IGBVF: Family = Family {
    driver: "igbvf",
    ids: &[(0x8086, 0x10ca), (0x8086, 0x1520)],
    layout: Layout {
        bar: 0,
        control: 0x0000,
        mailbox: 0x0c40,
        buffer: 0x0800,
        passed: &[
            Passed::read(0x0008), // STATUS
            Passed::read(0x0f10), // VFGPRC
            Passed::read(0x0f14), // VFGPTC
            Passed::read(0x0f18), // VFGORC
            Passed::read(0x0f34), // VFGOTC
            Passed::read(0x0f3c), // VFMPRC
            Passed::read(0x0f40), // VFGPRLBC
            Passed::read(0x0f44), // VFGPTLBC
            Passed::read(0x0f48), // VFGORLBC
            Passed::read(0x0f50), // VFGOTLBC
        ],
        trigger: 0x1520,
        mailbox_vector: 0x1740,
    },
    codec: &codec::Igbvf,
    address: AddressRule::Restores,
    // The driver's link check schedules a reset if word 0 is a nack without "clear to send".
    lost: LostWords { first: PF_CONTROL | NACK_MESSAGE, acknowledged: None },
};
