// SPDX-License-Identifier: Apache-2.0

//! The required result for each message: data only, for any implementation.

use netpolicy::{OnDenied, Reason};

use super::{fake_vf::Double, igb::Igb};
use crate::relay::{Decision, How};

/// The address that the VF has in all cases: 02:00:00:00:00:11.
pub const EFFECTIVE: [u8; 6] = [2, 0, 0, 0, 0, 0x11];

/// The tables of a family, with the steps around each case.
pub struct Tables {
    /// The doubles of the family's drivers.
    pub double: &'static dyn Double,
    /// The messages that the driver sends after each reset.
    pub before: &'static [&'static [u32]],
    /// The relay's table.
    pub relay: &'static [RelayCase],
    /// The PF driver's table.
    pub pf: &'static [PfCase],
    /// Word 0 of the PF's response to a frame length after VTCTRL.RST without a reset message; None for silence.
    pub after_rst: Option<u32>,
}

/// igb's tables.
pub static IGB: Tables =
    Tables { double: &Igb, before: &[], relay: RELAY_CASES, pf: PF_CASES, after_rst: None };

/// A message to a relay whose VF was reset and then requested its own address once, so that it is not "fresh".
#[derive(Clone, Copy, Debug)]
pub struct RelayCase {
    pub name: &'static str,
    /// The guest's words before REQ; the other words hold rubbish.
    pub words: &'static [u32],
    /// The authority's decision; None if the relay must not ask.
    pub decision: Option<Decision>,
    /// Word 0 as the guest reads it; None for an acknowledgement without a reply.
    pub reply: Option<u32>,
    /// The words of the reply behind word 0, as far as the driver reads them.
    pub data: &'static [u32],
    /// The message that the PF must have received, up to its last word that is not zero; None for nothing.
    pub forwarded: Option<&'static [u32]>,
}

pub(super) const LOCAL: Option<Decision> = Some(Decision::Grant { how: How::Local });
pub(super) const FORWARD: Option<Decision> = Some(Decision::Grant { how: How::Forward });
pub(super) const NACK: Option<Decision> = refuse(OnDenied::Nack);
pub(super) const SILENT: Option<Decision> = refuse(OnDenied::Silent);

const fn refuse(tell: OnDenied) -> Option<Decision> {
    Some(Decision::Refuse { tell, reason: Reason::LimitExceeded })
}

macro_rules! cases {
    ($($name:literal: $words:expr, $decision:expr => $reply:expr, $forwarded:expr $(, data $data:expr)?;)*) => {
        &[$($crate::relay::testing::table::RelayCase {
            name: $name,
            words: &$words,
            decision: $decision,
            reply: $reply,
            data: cases!(@data $($data)?),
            forwarded: $forwarded,
        }),*]
    };
    (@data) => { &[] };
    (@data $data:expr) => { &$data };
}
pub(super) use cases;

/// The relay's table.
pub const RELAY_CASES: &[RelayCase] = cases! {
    "other address, granted": [2, 0x2, 0x2200], LOCAL => Some(0xa000_0002), None;
    "other address, nack": [2, 0x2, 0x2200], NACK => Some(0x6000_0002), None;
    "other address, silent": [2, 0x2, 0x2200], SILENT => Some(0xa000_0002), None;
    "equal address": [2, 0x2, 0x1100], None => Some(0xa000_0002), None;
    "equal address, rubbish behind it": [2, 0x2, 0xdead_1100], None => Some(0xa000_0002), None;
    "group address": [2, 0x3, 0x2200], None => Some(0x6000_0002), None;
    "zero address": [2, 0, 0], None => Some(0x6000_0002), None;
    "address forwarded to a PF that refuses": [2, 0x2, 0x2200], FORWARD => Some(0x6000_0002), Some(&[2, 0x2, 0x2200]);
    "filters cleared, none there": [0x1_0002, 0, 0], None => Some(0xa001_0002), None;
    "filter, nack": [0x2_0002, 0x2, 0x2200], NACK => Some(0x6002_0002), None;
    "filter, group address": [0x2_0002, 0x1, 0], None => Some(0x6002_0002), None;
    "address with unknown argument": [0x3_0002, 0x2, 0x2200], None => Some(0x6003_0002), None;
    "multicast": [0x3_0003, 0x0222_0111, 0x0444_0333], FORWARD => Some(0xa003_0003), Some(&[0x3_0003, 0x0222_0111, 0x333]);
    "multicast, bits above the hash": [0x2_0003, 0xf222_f111], FORWARD => Some(0xa002_0003), Some(&[0x2_0003, 0x0222_0111]);
    "multicast, empty": [0x0003, 0x0222_0111], FORWARD => Some(0xa000_0003), Some(&[0x0003]);
    "multicast, 255 claimed": [0xff_0003, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], FORWARD
        => Some(0xa0ff_0003), Some(&[0x1e_0003, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    "multicast, nack": [0x3_0003, 1, 2], NACK => Some(0x6003_0003), None;
    "multicast, silent": [0x3_0003, 1, 2], SILENT => Some(0xa003_0003), None;
    "VLAN joined": [0x1_0004, 100], FORWARD => Some(0xa001_0004), Some(&[0x1_0004, 100]);
    "VLAN left": [0x0004, 100], FORWARD => Some(0xa000_0004), Some(&[0x0004, 100]);
    "priority tag": [0x1_0004, 0], LOCAL => Some(0xa001_0004), None;
    "VLAN, nack": [0x1_0004, 100], NACK => Some(0x6000_0004), None;
    "VLAN 4095": [0x1_0004, 4095], None => Some(0x6000_0004), None;
    "VLAN with bits above": [0x1_0004, 0x1_0064], None => Some(0x6000_0004), None;
    "VLAN with unknown argument": [0x2_0004, 100], None => Some(0x6000_0004), None;
    "frame size": [5, 1522], FORWARD => Some(0xa000_0005), Some(&[5, 1522]);
    "frame size, nack": [5, 9000], NACK => Some(0x6000_0005), None;
    "frame size beyond the adapter's": [5, 9729], None => Some(0x6000_0005), None;
    "frame size of nothing": [5, 0], None => Some(0x6000_0005), None;
    "multicast promiscuous": [0x2_0006, 7], FORWARD => Some(0xa000_0006), Some(&[0x2_0006]);
    "multicast promiscuous, nack": [0x2_0006], NACK => Some(0x6000_0006), None;
    "promiscuous off": [0x0006], FORWARD => Some(0xa000_0006), Some(&[0x0006]);
    "unicast promiscuous, the PF refuses": [0x1_0006], FORWARD => Some(0x6001_0006), Some(&[0x1_0006]);
    "promiscuous with unknown argument": [0x4_0006], None => Some(0x6004_0006), None;
    "unknown opcode": [0x0007], None => Some(0x6000_0007), None;
    "opcode zero": [0], None => Some(0x6000_0000), None;
    "opcode above the byte": [0x0101], None => Some(0x6000_0101), None;
    "the PF's own opcode": [0x0100], None => Some(0x6000_0100), None;
    "marked as accepted": [0x8000_0002, 0x2, 0x2200], None => None, None;
    "marked as refused": [0x4000_0002, 0x2, 0x2200], None => None, None;
    "marked as both": [0xc000_0001], None => None, None;
    "marked as clear to send": [0x2000_0002, 0x2, 0x1100], None => Some(0x6000_0002), None;
    "reset with an argument": [0x1_0001], None => Some(0x6001_0001), None;
    "bits between argument and marks": [0x0100_0004, 100], None => Some(0x6000_0004), None;
};

/// A message to a PF that has the VF's [`EFFECTIVE`] address latched, does not trust it, and has seen its reset.
#[derive(Clone, Copy, Debug)]
pub struct PfCase {
    pub name: &'static str,
    pub words: &'static [u32],
    /// Word 0 of the reply; None for an acknowledgement without a reply.
    pub reply: Option<u32>,
    /// The words of the reply behind word 0, as far as they matter.
    pub data: &'static [u32],
}

macro_rules! pf_cases {
    ($($name:literal: $words:expr => $reply:expr $(, data $data:expr)?;)*) => {
        &[$($crate::relay::testing::table::PfCase {
            name: $name,
            words: &$words,
            reply: $reply,
            data: pf_cases!(@data $($data)?),
        }),*]
    };
    (@data) => { &[] };
    (@data $data:expr) => { &$data };
}
pub(super) use pf_cases;

/// The answers of igb (Linux 6.12), and of every PF that stands in for it. Each message follows a reset.
pub const PF_CASES: &[PfCase] = pf_cases! {
    "equal address": [2, 0x2, 0x1100] => Some(0x6000_0002);
    "other address": [2, 0x2, 0x2200] => Some(0x6000_0002);
    "group address": [2, 0x3, 0x2200] => Some(0x6000_0002);
    "filter": [0x2_0002, 0x2, 0x2200] => Some(0x6002_0002);
    "filters cleared": [0x1_0002, 0x2, 0x1100] => Some(0x6001_0002);
    "filters cleared, as igbvf says it": [0x1_0002, 0, 0] => Some(0x6001_0002);
    "address with unknown argument": [0x3_0002, 0x2, 0x2200] => Some(0x6003_0002);
    "multicast": [0x1_0003, 0x111] => Some(0xa001_0003);
    "multicast, empty": [0x0003] => Some(0xa000_0003);
    "multicast, more than fit": [0xff_0003, 0x111] => Some(0xa0ff_0003);
    "VLAN joined": [0x1_0004, 100] => Some(0xa001_0004);
    "VLAN left, never joined": [0x0004, 100] => Some(0xa000_0004);
    "VLAN 0": [0x1_0004, 0] => Some(0xa001_0004);
    "frame size": [5, 1522] => Some(0xa000_0005);
    "frame size beyond the adapter's": [5, 9729] => Some(0xa000_0005);
    "multicast promiscuous": [0x2_0006] => Some(0xa000_0006);
    "unicast promiscuous": [0x1_0006] => Some(0x6001_0006);
    "promiscuous in both ways": [0x3_0006] => Some(0x6001_0006);
    "promiscuous off": [0x0006] => Some(0xa000_0006);
    "promiscuous with unknown argument": [0x4_0006] => Some(0x6004_0006);
    "unknown opcode": [0x0007] => Some(0x6000_0007);
    "opcode zero": [0] => Some(0x6000_0000);
    "opcode above the byte": [0x0101] => Some(0x6000_0101);
    "reset with an argument": [0x1_0001] => Some(0x6001_0001);
    "marked as clear to send": [0x2000_0005, 1522] => Some(0xa000_0005);
    "marked as accepted": [0x8000_0005, 1522] => None;
    "marked as refused": [0x4000_0005, 1522] => None;
};
