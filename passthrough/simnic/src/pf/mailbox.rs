// SPDX-License-Identifier: Apache-2.0

//! Answers to mailbox messages, as Linux' igb (6.12) gives them.

use std::time::Duration;

use netpolicy::MacAddress;
use passthrough::channel::mailbox::{
    message::{BUFFER_WORDS, Words},
    register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE, PF_CONTROL},
};

use super::{SimPfState, Vf};

const RESET: u32 = 0x01;
const SET_MAC: u32 = 0x02;
const SET_MULTICAST: u32 = 0x03;
const SET_VLAN: u32 = 0x04;
const SET_MAX_FRAME: u32 = 0x05;
const SET_PROMISC: u32 = 0x06;

const FILTER_CLEAR: u8 = 1;
const FILTER_ADD: u8 = 2;
const PROMISC_MULTICAST: u8 = 2;

/// The most hashes that igb keeps of a multicast message.
const MAX_MULTICAST: u8 = 30;
/// The interval between two NACKs to a VF before its reset message. In between igb is silent.
const SILENCE: Duration = Duration::from_secs(2);
/// VMOLR.RLPML has 14 bits.
const MAX_FRAME_MASK: u32 = 0x3fff;

impl SimPfState {
    /// Notes a reset of the VF (VTCTRL.RST or FLR): the PF forgets an address of its own choice and turns its queues
    /// off.
    pub fn vf_reset(&mut self, vf: u16, now: Duration) {
        let Some(vf) = self.vf(vf) else { return };
        vf.counters.resets = vf.counters.resets.saturating_add(1);
        if !vf.mac_latched {
            vf.mac = MacAddress::ZERO;
        }
        vf.forget(now);
    }

    /// Handles a message of the VF. Returns None for a message that is acknowledged without an answer.
    pub fn message(&mut self, index: u16, words: &[u32; BUFFER_WORDS], now: Duration) -> Option<Words> {
        let vf = self.vf(index)?;
        vf.counters.messages = vf.counters.messages.saturating_add(1);
        let word = words[0];
        if word & (ACK_MESSAGE | NACK_MESSAGE) != 0 {
            return None;
        }
        if word == RESET {
            return Some(vf.reset_message(now));
        }
        if !vf.clear_to_send {
            if vf.last_nack.is_some_and(|last| now <= last.saturating_add(SILENCE)) {
                return None;
            }
            vf.last_nack = Some(now);
            vf.counters.refused = vf.counters.refused.saturating_add(1);
            return Some(Words::new(&[word | NACK_MESSAGE]));
        }
        let accepted = self.handle(index, words);
        if let (false, Some(vf)) = (accepted, self.vf(index)) {
            vf.counters.refused = vf.counters.refused.saturating_add(1);
        }
        let verdict = if accepted { ACK_MESSAGE } else { NACK_MESSAGE };
        Some(Words::new(&[repeated(word) | CTS | verdict]))
    }

    /// The PF's message after a change of its link.
    #[must_use]
    pub fn ping(&self, vf: u16) -> Option<Words> {
        let vf = self.vfs.get(usize::from(vf))?;
        Some(Words::new(&[PF_CONTROL | if vf.clear_to_send { CTS } else { 0 }]))
    }

    fn handle(&mut self, index: u16, words: &[u32; BUFFER_WORDS]) -> bool {
        let [word, first, second, ..] = *words;
        let [.., argument, _] = word.to_le_bytes();
        let vid = u16::try_from(first & 0xfff).unwrap_or(0);
        let filters: usize = self.vfs.iter().map(|vf| vf.filters.len()).sum();
        let room = (self.filter_room() > filters, self.has_room_for_vlan(vid));
        let Some(vf) = self.vf(index) else { return false };
        match word & 0xffff {
            SET_MAC => vf.set_mac(argument, mac(first, second), room.0),
            SET_MULTICAST => {
                vf.multicast_count = argument;
                let hashes = words.iter().skip(1).flat_map(|word| {
                    let [a, b, c, d] = word.to_le_bytes();
                    [u16::from_le_bytes([a, b]) & 0xfff, u16::from_le_bytes([c, d]) & 0xfff]
                });
                vf.multicast = hashes.take(argument.min(MAX_MULTICAST).into()).collect();
                true
            }
            // A VF cannot escape the administrator's tag.
            SET_VLAN if vf.port_vlan.id != 0 => false,
            // VLAN 0 has an entry of its own in the table.
            SET_VLAN if vid == 0 => true,
            SET_VLAN if argument == 0 => {
                vf.vlans.remove(&vid);
                true
            }
            SET_VLAN => {
                if room.1 {
                    vf.vlans.insert(vid);
                }
                room.1
            }
            SET_MAX_FRAME => {
                vf.max_frame = first & MAX_FRAME_MASK;
                true
            }
            SET_PROMISC => {
                vf.promiscuous_multicast = argument & PROMISC_MULTICAST != 0;
                argument & !PROMISC_MULTICAST == 0
            }
            _ => false,
        }
    }
}

impl Vf {
    /// Clears the state that igb clears at every reset, whether the adapter or a message reports it. igb keeps further
    /// addresses (its list of filters) and the longest frame (VMOLR.RLPML, which only SET_LPE writes).
    fn forget(&mut self, now: Duration) {
        self.clear_to_send = false;
        self.last_nack = Some(now);
        self.vlans.clear();
        self.multicast.clear();
        self.multicast_count = 0;
        self.promiscuous_multicast = false;
    }

    fn reset_message(&mut self, now: Duration) -> Words {
        self.forget(now);
        self.clear_to_send = true;
        if self.mac.is_zero() {
            return Words::new(&[RESET | NACK_MESSAGE, 0, 0]);
        }
        let [a, b, c, d, e, f] = self.mac.bytes();
        let (first, second) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0]));
        Words::new(&[RESET | ACK_MESSAGE, first, second])
    }

    fn set_mac(&mut self, argument: u8, mac: MacAddress, room: bool) -> bool {
        // igb refuses even the equal address.
        if (self.mac_latched && !self.trusted) || !mac.is_assignable() {
            return false;
        }
        match argument {
            0 => self.mac = mac,
            FILTER_CLEAR => self.filters.clear(),
            FILTER_ADD if room => self.filters.push(mac),
            _ => return false,
        }
        true
    }
}

/// The part of word 0 that igb's answer repeats: igb clears promiscuous multicast once it is set.
fn repeated(word: u32) -> u32 {
    if word & 0xffff == SET_PROMISC { word & !(u32::from(PROMISC_MULTICAST) << 16) } else { word }
}

fn mac(first: u32, second: u32) -> MacAddress {
    let ([a, b, c, d], [e, f, ..]) = (first.to_le_bytes(), second.to_le_bytes());
    MacAddress::new([a, b, c, d, e, f])
}
