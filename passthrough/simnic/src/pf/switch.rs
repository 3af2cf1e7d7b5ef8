// SPDX-License-Identifier: Apache-2.0

//! Receive filters, checks of sent frames, and forwarding between VFs and the uplink.

use std::time::Duration;

use netpolicy::MacAddress;

use super::{Frame, SimPfState, Vf};
use crate::wire::{MAX_FRAME, MIN_FRAME};

/// The destination of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The VF of this number.
    Vf(u16),
    /// The wire.
    Uplink,
}

const TAG_TYPE: [u8; 2] = [0x81, 0x00];
const TAG: usize = 4;
const ADDRESSES: usize = 12;
const CHECKSUM: usize = 4;
/// Shorter frames are padded on the wire.
const SHORTEST: usize = 60;
const VLAN_MASK: u16 = 0xfff;
/// More hashes than igb stores: igb then lets all multicast pass.
const ALL_MULTICAST: u8 = 31;

impl SimPfState {
    /// Forwards a frame from a VF. Calls `deliver` for each destination; for the uplink, the bytes include the tag.
    pub fn transmit(
        &mut self,
        vf: u16,
        frame: Frame<'_>,
        now: Duration,
        deliver: &mut dyn FnMut(Port, Frame<'_>),
    ) {
        let mut buffer = std::mem::take(&mut self.scratch);
        self.send(vf, frame, now, &mut buffer, deliver);
        self.scratch = buffer;
    }

    /// Forwards a frame from the wire.
    pub fn receive(&mut self, bytes: &[u8], deliver: &mut dyn FnMut(Port, Frame<'_>)) {
        let mut buffer = std::mem::take(&mut self.scratch);
        if self.link_up
            && let Some(tag) = normalise(Frame { tag: None, bytes }, &mut buffer)
        {
            self.deliver_to_vfs(None, tag, &buffer, deliver);
        }
        self.scratch = buffer;
    }

    fn send(
        &mut self,
        index: u16,
        frame: Frame<'_>,
        now: Duration,
        buffer: &mut Vec<u8>,
        deliver: &mut dyn FnMut(Port, Frame<'_>),
    ) {
        let link_up = self.link_up;
        let Some(vf) = self.vf(index) else { return };
        let Some(tag) = normalise(frame, buffer).filter(|_| vf.clear_to_send && link_up) else {
            vf.counters.not_sent = vf.counters.not_sent.saturating_add(1);
            return;
        };
        let Some((to, from)) = addresses(buffer) else { return };
        let Some(tag) = vf.checked(from, tag) else {
            vf.counters.spoofed = vf.counters.spoofed.saturating_add(1);
            return;
        };
        if !vf.bucket.take(vf.max_tx_rate, buffer.len(), now) {
            vf.counters.not_sent = vf.counters.not_sent.saturating_add(1);
            return;
        }
        vf.counters.sent = vf.counters.sent.saturating_add(1);
        let own = vf.has_address(to);
        let found = self.deliver_to_vfs(Some(index), tag, buffer, deliver);
        if !to.is_unicast() || !(found || own) {
            if let Some(tag) = tag {
                // At most 4 bytes beyond the longest frame.
                let tail = buffer.split_off(ADDRESSES);
                buffer.extend_from_slice(&TAG_TYPE);
                buffer.extend_from_slice(&tag.to_be_bytes());
                buffer.extend_from_slice(&tail);
            }
            deliver(Port::Uplink, Frame { tag: None, bytes: buffer });
        }
    }

    /// Delivers to all VFs with a matching filter. Returns whether there is one.
    fn deliver_to_vfs(
        &mut self,
        sender: Option<u16>,
        tag: Option<u16>,
        bytes: &[u8],
        deliver: &mut dyn FnMut(Port, Frame<'_>),
    ) -> bool {
        let Some((to, _)) = addresses(bytes) else { return false };
        let vlan = tag.unwrap_or(0) & VLAN_MASK;
        // All VFs share one hash table: a hash that one VF set lets the frame through to every VF with any hash.
        let hash = hash(to);
        let hash_set = self.vfs.iter().any(|vf| vf.multicast.contains(&hash));
        let mut found = false;
        for (index, vf) in (0u16..).zip(&mut self.vfs) {
            if Some(index) == sender || !vf.takes(to, vlan, hash_set) || bytes.len() > vf.longest(tag) {
                continue;
            }
            found = true;
            vf.counters.received = vf.counters.received.saturating_add(1);
            // The administrator's tag is invisible to the VF.
            let tag = tag.filter(|_| vf.port_vlan.id == 0);
            deliver(Port::Vf(index), Frame { tag, bytes });
        }
        found
    }
}

impl Vf {
    fn has_address(&self, mac: MacAddress) -> bool {
        (!mac.is_zero() && self.mac == mac) || self.filters.contains(&mac)
    }

    /// The tag that a frame of this VF gets; None if the VF may not send it.
    #[expect(clippy::option_option, reason = "the frame is dropped, has no tag, or has one")]
    fn checked(&self, from: MacAddress, tag: Option<u16>) -> Option<Option<u16>> {
        if self.spoof_check && !self.has_address(from) {
            return None;
        }
        let vlan = tag.unwrap_or(0) & VLAN_MASK;
        match self.port_vlan.id {
            0 if vlan != 0 && self.spoof_check && !self.vlans.contains(&vlan) => None,
            0 => Some(tag),
            // A tag of its own never gets a VF out of its access VLAN.
            _ if vlan != 0 => None,
            id => Some(Some(id | u16::from(self.port_vlan.qos) << 13)),
        }
    }

    fn takes(&self, to: MacAddress, vlan: u16, hash_set: bool) -> bool {
        let in_vlan = match self.port_vlan.id {
            0 => vlan == 0 || self.vlans.contains(&vlan),
            id => vlan == id,
        };
        let addressed = if to.is_unicast() {
            self.has_address(to)
        } else if to == MacAddress::new([0xff; 6]) {
            true
        } else {
            self.promiscuous_multicast
                || self.multicast_count >= ALL_MULTICAST
                || (self.multicast_count > 0 && hash_set)
        };
        self.clear_to_send && in_vlan && addressed
    }

    /// The longest frame for this VF, without checksum and tag.
    fn longest(&self, tag: Option<u16>) -> usize {
        // The VF's limit includes the checksum and its own tag; the port's tag comes on top.
        let own_tag = if tag.is_some() && self.port_vlan.id == 0 { TAG } else { 0 };
        usize::try_from(self.max_frame).unwrap_or(usize::MAX).saturating_sub(CHECKSUM + own_tag)
    }
}

/// The multicast hash of an address: its bits 47:36, the index into igb's `MTA`.
fn hash(mac: MacAddress) -> u16 {
    let [.., e, f] = mac.bytes();
    (u16::from(e) >> 4 | u16::from(f) << 4) & 0xfff
}

fn addresses(bytes: &[u8]) -> Option<(MacAddress, MacAddress)> {
    let (to, rest) = bytes.split_first_chunk::<6>()?;
    let (from, _) = rest.split_first_chunk::<6>()?;
    Some((MacAddress::new(*to), MacAddress::new(*from)))
}

/// Puts the frame into `buffer` without its tag, padded to the shortest length. Returns the tag; None if it is no
/// frame.
#[expect(clippy::option_option, reason = "no frame, a frame without a tag, or one with it")]
fn normalise(frame: Frame<'_>, buffer: &mut Vec<u8>) -> Option<Option<u16>> {
    buffer.clear();
    let (head, rest) = frame.bytes.split_at_checked(ADDRESSES)?;
    buffer.extend_from_slice(head);
    let inside = match *rest {
        [t0, t1, high, low, ..] if frame.tag.is_none() && [t0, t1] == TAG_TYPE => {
            buffer.extend_from_slice(rest.get(TAG..)?);
            Some(u16::from_be_bytes([high, low]))
        }
        _ => {
            buffer.extend_from_slice(rest);
            None
        }
    };
    if !(MIN_FRAME..=MAX_FRAME).contains(&buffer.len()) {
        return None;
    }
    if buffer.len() < SHORTEST {
        buffer.resize(SHORTEST, 0);
    }
    Some(frame.tag.or(inside))
}
