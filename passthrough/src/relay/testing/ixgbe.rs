// SPDX-License-Identifier: Apache-2.0

//! ixgbe's part of a fake VF (Linux 6.12, `ixgbe_sriov.c`): its messages, and habits that igb does not have. "Clear to
//! send" survives resets of the VF. A change of trust, and each setting of the link, revoke it. While it is lost, ixgbe
//! refuses a message at once, and responds to each acknowledgement with another message.

use std::time::Duration;

use netpolicy::MacAddress;

use super::{
    driver::Offsets,
    fake_vf::{Double, FakeVf, Pf},
};
use crate::{
    channel::mailbox::{
        message::BUFFER_WORDS,
        register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE},
    },
    family::{Family, ixgbe::IXGBEVF},
};

/// State of ixgbe for one VF, beyond igb's.
#[derive(Clone, Debug, Default)]
pub struct IxgbePf {
    /// The code of the protocol's version: 0 is 1.0, and 2 to 5 are 1.1 to 1.4.
    pub version: u32,
    /// The receive mode. No reset changes it.
    pub receive_mode: u32,
    /// VMOLR.ROMPE: the VF receives the groups of the port's shared table.
    pub groups: bool,
    /// VFRE: the VF receives at all.
    pub receiver: bool,
    /// VFTE: the VF sends.
    pub transmitter: bool,
    /// The adapter is an 82599.
    pub is_82599: bool,
    /// The PF's MTU is above 1500.
    pub long_frames: bool,
    /// IFLA_VF_LINK_STATE is "disable".
    pub link_disabled: bool,
    /// A further address has switched the spoof check off, which netlink does not show.
    pub spoof_check_off: bool,
}

/// ixgbevf and ixgbe.
pub struct Ixgbe;

/// Codes of versions.
const V1_1: u32 = 2;
const V1_2: u32 = 3;
const V1_3: u32 = 4;
const V1_4: u32 = 5;
/// Queues that ixgbe gives a VF if there are at least 32 VFs.
pub const QUEUES: u32 = 2;

impl Ixgbe {
    /// IFLA_VF_TRUST. Nothing happens if it is equal.
    pub fn set_trust(vf: &FakeVf, on: bool) {
        if vf.pf().trusted != on {
            vf.with_pf(|pf| (pf.trusted, pf.clear_to_send) = (on, false));
            vf.ping();
        }
    }

    /// IFLA_VF_LINK_STATE, also if it is equal.
    pub fn set_link(vf: &FakeVf, disabled: bool) {
        vf.with_pf(|pf| {
            pf.ixgbe.link_disabled = disabled;
            pf.enable_queues();
            pf.clear_to_send = false;
        });
        vf.ping();
    }
}

impl Double for Ixgbe {
    fn family(&self) -> &'static Family {
        &IXGBEVF
    }

    fn offsets(&self) -> Offsets {
        Offsets::IXGBEVF
    }

    fn reset_message(&self, pf: &mut Pf) -> Vec<u32> {
        pf.reset_event();
        pf.enable_queues();
        let [a, b, c, d, e, f] = pf.mac.bytes();
        let mut reply = vec![0; BUFFER_WORDS];
        reply[0] = 1 | NACK_MESSAGE;
        if pf.mac_latched {
            reply[0] = 1 | ACK_MESSAGE;
            reply[1] = u32::from_le_bytes([a, b, c, d]);
            reply[2] = u32::from_le_bytes([e, f, 0, 0]);
        }
        reply
    }

    fn handle(&self, pf: &mut Pf, words: &[u32; BUFFER_WORDS]) -> Vec<u32> {
        let mut reply = *words;
        let accepted = pf.handle_as_ixgbe(&mut reply);
        pf.warnings += u64::from(!accepted);
        reply[0] |= CTS | if accepted { ACK_MESSAGE } else { NACK_MESSAGE };
        reply.to_vec()
    }

    fn vf_reset(&self, pf: &mut Pf, _now: Duration) {
        pf.reset_event();
    }

    fn pf_reset(&self, pf: &mut Pf) {
        pf.clear_to_send = false;
        (pf.ixgbe.receiver, pf.ixgbe.transmitter) = (false, false);
    }

    fn unheard(&self, _pf: &mut Pf, word: u32, _now: Duration) -> Option<Vec<u32>> {
        Some(vec![word | NACK_MESSAGE])
    }

    fn acknowledged(&self) -> Option<Vec<u32>> {
        Some(vec![NACK_MESSAGE])
    }
}

impl Pf {
    /// `ixgbe_vf_reset_event`.
    fn reset_event(&mut self) {
        self.vlans.clear();
        self.filters.clear();
        self.multicast.clear();
        self.ixgbe.groups = false;
        self.ixgbe.version = 0;
    }

    /// `ixgbe_set_vf_rx_tx`.
    fn enable_queues(&mut self) {
        let ixgbe = &mut self.ixgbe;
        ixgbe.transmitter = !ixgbe.link_disabled;
        ixgbe.receiver = ixgbe.transmitter && !(ixgbe.is_82599 && ixgbe.long_frames);
    }

    fn handle_as_ixgbe(&mut self, words: &mut [u32; BUFFER_WORDS]) -> bool {
        let (opcode, argument) = (words[0] & 0xffff, (words[0] >> 16) & 0xff);
        let ([a, b, c, d], [e, f, ..]) = (words[1].to_le_bytes(), words[2].to_le_bytes());
        let mac = MacAddress::new([a, b, c, d, e, f]);
        let may_set = !self.mac_latched || self.trusted;
        match opcode {
            2 => {
                let accepted = mac.is_assignable() && (may_set || mac == self.mac);
                if accepted {
                    self.mac = mac;
                }
                accepted
            }
            3 => {
                let hashes = words[1..].iter().flat_map(|word| {
                    let [a, b, c, d] = word.to_le_bytes();
                    [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
                });
                self.multicast = hashes.take(argument.min(30) as usize).collect();
                self.ixgbe.groups = true;
                true
            }
            4 => self.join(words[1] & 0xfff, argument != 0),
            5 => self.set_lpe(words[1]),
            6 => self.set_macvlan(mac, argument, may_set),
            8 => {
                let known = matches!(words[1], 0 | V1_1 | V1_2 | V1_3 | V1_4);
                if known {
                    self.ixgbe.version = words[1];
                }
                known
            }
            9 => {
                let known = self.ixgbe.version >= V1_1;
                if known {
                    words[1..5].copy_from_slice(&[QUEUES, QUEUES, u32::from(self.port_vlan), 0]);
                }
                known
            }
            // The administrator permits no VF to read these.
            0xa | 0xb => false,
            0xc => self.set_receive_mode(words),
            0xd | 0xe => {
                words[1] = 0xffff_fff3;
                false
            }
            0x10 => {
                let known = self.ixgbe.version >= V1_2;
                if known {
                    words[1] = u32::from(!self.ixgbe.link_disabled);
                }
                known
            }
            _ => {
                self.unhandled += 1;
                false
            }
        }
    }

    fn join(&mut self, vlan: u32, add: bool) -> bool {
        if self.port_vlan {
            return false;
        }
        if add {
            self.vlans.insert(vlan);
        } else {
            self.vlans.remove(&vlan);
        }
        true
    }

    fn set_lpe(&mut self, length: u32) -> bool {
        if !(68..=9728).contains(&length) {
            return false;
        }
        let ixgbe = &mut self.ixgbe;
        if ixgbe.is_82599 {
            let mixed = ixgbe.version >= V1_1 && ixgbe.long_frames;
            ixgbe.receiver = mixed || !(ixgbe.long_frames || length > 1518);
            if !ixgbe.receiver {
                return false;
            }
        }
        self.max_frame = self.max_frame.max(length);
        true
    }

    fn set_macvlan(&mut self, mac: MacAddress, index: u32, may_set: bool) -> bool {
        if index > 0 && !(may_set && mac.is_assignable()) {
            return false;
        }
        if index <= 1 {
            self.filters.clear();
        }
        if index > 0 {
            self.ixgbe.spoof_check_off = true;
            self.filters.push(mac);
        }
        true
    }

    fn set_receive_mode(&mut self, words: &mut [u32; BUFFER_WORDS]) -> bool {
        let version = self.ixgbe.version;
        if version < V1_2 || version < V1_3 && words[1] == 3 {
            return false;
        }
        // ixgbe's mode is a signed number.
        let mode = if words[1].cast_signed() > 1 && !self.trusted { 1 } else { words[1] };
        if mode != self.ixgbe.receive_mode {
            // The PF of this double is not promiscuous, so no VF may be.
            if mode > 2 {
                return false;
            }
            self.ixgbe.receive_mode = mode;
            self.ixgbe.groups = mode > 0;
            self.all_multicast = mode == 2;
        }
        words[1] = mode;
        true
    }
}
