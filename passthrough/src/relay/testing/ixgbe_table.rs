// SPDX-License-Identifier: Apache-2.0

//! The required result for each message of ixgbevf: data only, for any implementation. The guest has agreed on version
//! 1.3.

use super::{
    ixgbe::Ixgbe,
    table::{FORWARD, LOCAL, NACK, PfCase, RelayCase, SILENT, Tables, cases, pf_cases},
};

/// ixgbe's tables.
pub static IXGBE: Tables = Tables {
    double: &Ixgbe,
    before: &[&[8, 4, 0]],
    relay: RELAY_CASES,
    pf: PF_CASES,
    // "Clear to send" survives resets of the VF.
    after_rst: Some(0xa000_0005),
};

/// The relay's table.
const RELAY_CASES: &[RelayCase] = cases! {
    "other address, granted": [2, 0x2, 0x2200], LOCAL => Some(0xa000_0002), None;
    "other address, nack": [2, 0x2, 0x2200], NACK => Some(0x6000_0002), None;
    "other address, silent": [2, 0x2, 0x2200], SILENT => Some(0xa000_0002), None;
    "equal address": [2, 0x2, 0x1100], None => Some(0xa000_0002), None;
    "equal address, rubbish behind it": [2, 0x2, 0xdead_1100], None => Some(0xa000_0002), None;
    "group address": [2, 0x3, 0x2200], None => Some(0x6000_0002), None;
    "zero address": [2, 0, 0], None => Some(0x6000_0002), None;
    "address with an argument": [0x1_0002, 0x2, 0x2200], None => Some(0x6001_0002), None;
    "address forwarded to a PF that refuses": [2, 0x2, 0x2200], FORWARD => Some(0x6000_0002), Some(&[2, 0x2, 0x2200]);
    "multicast": [0x3_0003, 0x0222_0111, 0x0444_0333], FORWARD
        => Some(0xa003_0003), Some(&[0x3_0003, 0x0222_0111, 0x333]);
    "multicast, stack contents behind the hashes": [0x2_0003, 0xf222_f111], FORWARD
        => Some(0xa002_0003), Some(&[0x2_0003, 0x0222_0111]);
    "multicast, 255 claimed": [0xff_0003, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], FORWARD
        => Some(0xa0ff_0003), Some(&[0x1e_0003, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    "multicast, empty and none on record": [3], LOCAL => Some(0xa000_0003), None;
    "multicast, nack": [0x3_0003, 1, 2], NACK => Some(0x6003_0003), None;
    "VLAN joined": [0x1_0004, 100], FORWARD => Some(0xa001_0004), Some(&[0x1_0004, 100]);
    "VLAN left": [4, 100], FORWARD => Some(0xa000_0004), Some(&[4, 100]);
    "VLAN 0": [0x1_0004, 0], LOCAL => Some(0xa001_0004), None;
    // Word 0 is repeated as a whole, unlike igbvf's.
    "VLAN, nack": [0x1_0004, 100], NACK => Some(0x6001_0004), None;
    "VLAN 4095": [0x1_0004, 4095], None => Some(0x6001_0004), None;
    "VLAN with bits above": [0x1_0004, 0x1064], None => Some(0x6001_0004), None;
    "frame length": [5, 0x5ee], FORWARD => Some(0xa000_0005), Some(&[5, 0x5ee]);
    "frame length, nack": [5, 9018], NACK => Some(0x6000_0005), None;
    "frame length beyond the adapter's": [5, 9729], None => Some(0x6000_0005), None;
    "frame length of nothing": [5, 0], None => Some(0x6000_0005), None;
    "further addresses cleared, none there": [6, 0, 0], None => Some(0xa000_0006), None;
    "first further address, nack": [0x1_0006, 0x2, 0x2200], NACK => Some(0x6001_0006), None;
    "further address, nack": [0x2_0006, 0x2, 0x2200], NACK => Some(0x6002_0006), None;
    "further address, group": [0x2_0006, 0x1, 0], None => Some(0x6002_0006), None;
    "further address, the PF refuses": [0x3_0006, 0x2, 0x2200], FORWARD
        => Some(0x6003_0006), Some(&[0x2_0006, 0x2, 0x2200]);
    "version 1.0": [8, 0], None => Some(0xa000_0008), Some(&[8]);
    "version 1.1": [8, 2], None => Some(0xa000_0008), Some(&[8, 2]);
    "version 1.2": [8, 3], None => Some(0xa000_0008), Some(&[8, 3]);
    "version 1.3": [8, 4], None => Some(0xa000_0008), Some(&[8, 4]);
    "version 2.0": [8, 1], None => Some(0x6000_0008), None;
    "version 1.4": [8, 5], None => Some(0x6000_0008), None;
    "version 1.5": [8, 6], None => Some(0x6000_0008), None;
    "version 1.6": [8, 7], None => Some(0x6000_0008), None;
    "version 1.7": [8, 8], None => Some(0x6000_0008), None;
    "version with an argument": [0x1_0008, 4], None => Some(0x6001_0008), None;
    "queues": [9, 0xdead, 0xdead, 0xdead, 0xdead], None => Some(0xa000_0009), Some(&[9]), data [2, 2, 0, 0];
    "RSS table": [0xa], None => Some(0x6000_000a), None;
    "RSS key": [0xb], None => Some(0x6000_000b), None;
    "no multicast": [0xc, 0], LOCAL => Some(0xa000_000c), None, data [0];
    "some multicast": [0xc, 1], LOCAL => Some(0xa000_000c), None, data [1];
    "some multicast, no other mode remains": [0xc, 1], FORWARD => Some(0xa000_000c), Some(&[0xc]), data [1];
    "all multicast, nack": [0xc, 2], NACK => Some(0x6000_000c), None;
    "all multicast, silent": [0xc, 2], SILENT => Some(0xa000_000c), None, data [1];
    "all multicast, the PF lowers it": [0xc, 2], FORWARD => Some(0x6000_000c), Some(&[0xc, 2]);
    "all frames, silent": [0xc, 3], SILENT => Some(0xa000_000c), None, data [1];
    "a mode that does not exist": [0xc, 4], None => Some(0x6000_000c), None;
    "a negative mode": [0xc, 0xffff_ffff], None => Some(0x6000_000c), None;
    "IPsec offload": [0xd, 1], None => Some(0x6000_000d), None, data [0xffff_fff3];
    "IPsec offload ends": [0xe, 1], None => Some(0x6000_000e), None, data [0xffff_fff3];
    "link": [0x10, 0xdead], None => Some(0xa000_0010), Some(&[0x10]), data [1];
    "link of an E610": [0x11, 0, 0], None => Some(0x6000_0011), None;
    "features": [0x12, 3], None => Some(0x6000_0012), None;
    "unknown opcode": [7], None => Some(0x6000_0007), None;
    "opcode zero": [0], None => Some(0x6000_0000), None;
    "the PF's own opcode": [0x100], None => Some(0x6000_0100), None;
    "marked as accepted": [0x8000_0002, 0x2, 0x2200], None => None, None;
    "marked as refused": [0x4000_0002, 0x2, 0x2200], None => None, None;
    "marked as clear to send": [0x2000_0005, 1518], None => Some(0x6000_0005), None;
    "reset with an argument": [0x1_0001], None => Some(0x6001_0001), None;
    "bits between argument and marks": [0x0100_0004, 100], None => Some(0x6100_0004), None;
};

/// The answers of ixgbe (Linux 6.12). The VF has its address latched and is not trusted; each message follows a reset
/// and an agreement on version 1.3.
const PF_CASES: &[PfCase] = pf_cases! {
    "equal address": [2, 2, 0x1100] => Some(0xa000_0002);
    "other address": [2, 2, 0x2200] => Some(0x6000_0002);
    "group address": [2, 3, 0x2200] => Some(0x6000_0002);
    "multicast": [0x1_0003, 0x111] => Some(0xa001_0003);
    "multicast, more than fit": [0xff_0003, 0x111] => Some(0xa0ff_0003);
    "VLAN joined": [0x1_0004, 0x64] => Some(0xa001_0004);
    "VLAN left, never joined": [4, 0x64] => Some(0xa000_0004);
    "VLAN 0 left": [4, 0] => Some(0xa000_0004);
    "VLAN with bits above": [0x1_0004, 0x1064] => Some(0xa001_0004);
    "frame length": [5, 0x5ee] => Some(0xa000_0005);
    "frame length of nothing": [5, 0x43] => Some(0x6000_0005);
    "frame length beyond the adapter's": [5, 0x2601] => Some(0x6000_0005);
    "further addresses cleared": [6] => Some(0xa000_0006);
    "first further address": [0x1_0006, 2, 0x2200] => Some(0x6001_0006);
    "further address": [0x2_0006, 2, 0x2200] => Some(0x6002_0006);
    "version 1.0": [8, 0] => Some(0xa000_0008);
    "version 1.1": [8, 2] => Some(0xa000_0008);
    "version 1.2": [8, 3] => Some(0xa000_0008);
    "version 1.3": [8, 4] => Some(0xa000_0008);
    "version 1.4": [8, 5] => Some(0xa000_0008);
    "version 2.0": [8, 1] => Some(0x6000_0008);
    "version 1.5": [8, 6] => Some(0x6000_0008);
    "RSS table": [0xa] => Some(0x6000_000a);
    "RSS key": [0xb] => Some(0x6000_000b);
    "no multicast": [0xc, 0] => Some(0xa000_000c), data [0];
    "some multicast": [0xc, 1] => Some(0xa000_000c), data [1];
    "all multicast, lowered": [0xc, 2] => Some(0xa000_000c), data [1];
    "all frames, lowered": [0xc, 3] => Some(0xa000_000c), data [1];
    "a mode that does not exist, lowered": [0xc, 7] => Some(0xa000_000c), data [1];
    "a negative mode": [0xc, 0xffff_ffff] => Some(0x6000_000c);
    "link": [0x10, 0] => Some(0xa000_0010), data [1];
    "IPsec offload": [0xd] => Some(0x6000_000d), data [0xffff_fff3];
    "unknown opcode": [7] => Some(0x6000_0007);
    "reset with an argument": [0x1_0001] => Some(0x6001_0001);
    "marked as clear to send": [0x2000_0005, 0x5ee] => Some(0xa000_0005);
    "marked as accepted": [0x8000_0005, 0x5ee] => None;
    "marked as refused": [0x4000_0005, 0x5ee] => None;
};
