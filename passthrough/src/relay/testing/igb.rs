// SPDX-License-Identifier: Apache-2.0

//! igb's part of a fake VF: its messages, and the administrator's address latch that refuses even the equal address.

use netpolicy::MacAddress;

use super::{
    driver::Offsets,
    fake_vf::{Double, Pf},
};
use crate::{
    channel::mailbox::{
        message::BUFFER_WORDS,
        register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE},
    },
    family::{Family, igb::IGBVF},
};

/// igbvf and igb.
pub struct Igb;

impl Double for Igb {
    fn family(&self) -> &'static Family {
        &IGBVF
    }

    fn offsets(&self) -> Offsets {
        Offsets::IGBVF
    }

    fn reset_message(&self, pf: &mut Pf) -> Vec<u32> {
        let [a, b, c, d, e, f] = pf.mac.bytes();
        if pf.mac.is_zero() {
            return vec![1 | NACK_MESSAGE, 0, 0];
        }
        vec![1 | ACK_MESSAGE, u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])]
    }

    fn handle(&self, pf: &mut Pf, words: &[u32; BUFFER_WORDS]) -> Vec<u32> {
        let accepted = pf.handle_as_igb(words);
        // igb clears promiscuous multicast in the argument once it is on.
        let repeated = if words[0] & 0xffff == 6 { words[0] & !0x2_0000 } else { words[0] };
        vec![repeated | CTS | if accepted { ACK_MESSAGE } else { NACK_MESSAGE }]
    }
}

impl Pf {
    fn handle_as_igb(&mut self, words: &[u32; BUFFER_WORDS]) -> bool {
        let (opcode, argument) = (words[0] & 0xffff, (words[0] >> 16) & 0xff);
        let ([a, b, c, d], [e, f, ..]) = (words[1].to_le_bytes(), words[2].to_le_bytes());
        let mac = MacAddress::new([a, b, c, d, e, f]);
        let may_set = !self.mac_latched || self.trusted;
        let accepted = match (opcode, argument) {
            (2, 0) => {
                let accepted = may_set && mac.is_assignable();
                if accepted {
                    self.mac = mac;
                }
                accepted
            }
            (2, 1) => {
                let accepted = may_set && mac.is_assignable();
                if accepted {
                    self.filters.clear();
                }
                accepted
            }
            (2, 2) => {
                let accepted = may_set && mac.is_assignable();
                if accepted {
                    self.filters.push(mac);
                }
                accepted
            }
            (3, count) => {
                // igb stores any count; above 30 it means all-multicast.
                self.all_multicast |= count > 30;
                let hashes = words[1..].iter().flat_map(|word| {
                    let [a, b, c, d] = word.to_le_bytes();
                    [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
                });
                self.multicast = hashes.take(count as usize).collect();
                true
            }
            (4, add) => {
                if !self.port_vlan {
                    let vid = words[1] & 0xfff;
                    if add != 0 {
                        self.vlans.insert(vid);
                    } else {
                        self.vlans.remove(&vid);
                    }
                }
                !self.port_vlan
            }
            (5, _) => {
                // igb accepts any size.
                self.max_frame = words[1];
                true
            }
            (6, mode) => {
                self.all_multicast = mode & 2 != 0;
                mode & !2 == 0
            }
            _ => {
                self.unhandled += 1;
                false
            }
        };
        self.warnings += u64::from(!accepted);
        accepted
    }
}
