// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets, which take any bytes and assert laws. Property tests run them too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use std::time::Duration;

use netpolicy::MacAddress;
use passthrough::channel::mailbox::message::BUFFER_WORDS;
use sriov::VfChange;

pub use super::vf::fuzz_transmit;
use super::{
    pf::{Frame, Port, SimPfState},
    wire::{self, MAX_FRAME, Packet},
};

/// A packet between a VF and its PF: a decoded packet is the same after it is encoded and decoded again.
pub fn fuzz_packet(data: &[u8]) {
    let Some(packet) = wire::decode(data) else { return };
    let mut written = Vec::new();
    packet.encode(&mut written);
    assert_eq!(wire::decode(&written), Some(packet));
    if let Packet::Frame { frame, .. } = packet {
        assert!(frame.bytes.len() <= MAX_FRAME);
    }
}

/// The number of VFs of the PF below.
const VFS: u16 = 3;

const RESET: [u32; BUFFER_WORDS] = {
    let mut words = [0; BUFFER_WORDS];
    words[0] = 1;
    words
};

fn own(vf: u16) -> MacAddress {
    let [_, low] = vf.to_be_bytes();
    MacAddress::new([2, 0, 0, 0, 0, low])
}

/// The PF, for any packets from VFs: a VF keeps the address that the administrator set, sends under no other, and does
/// not hear itself.
pub fn fuzz_pf(data: &[u8]) {
    let mut pf = SimPfState::new(VFS);
    for vf in 0..VFS {
        assert_eq!(pf.set(vf, VfChange::Mac(Some(own(vf)))), Ok(()));
        // Its driver has started.
        assert!(pf.message(vf, &RESET, Duration::ZERO).is_some());
    }
    let before = pf.settings();
    let (mut now, mut rest) = (Duration::ZERO, data);
    while let Some((&[kind, vf, len, at], body)) = rest.split_first_chunk() {
        // Include a VF that does not exist.
        let vf = u16::from(vf) % (VFS + 1);
        let (body, after) = body.split_at(usize::from(len).min(body.len()));
        rest = after;
        now += Duration::from_millis(u64::from(at) * 20);
        match kind % 8 {
            0 => pf.vf_reset(vf, now),
            1..=4 => {
                let mut words = [0; BUFFER_WORDS];
                for (word, bytes) in words.iter_mut().zip(body.chunks(4)) {
                    *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
                }
                let answer = pf.message(vf, &words, now);
                assert!(answer.is_none() || vf < VFS);
            }
            5 => pf.receive(body, &mut |port, frame| check(VFS, port, frame)),
            _ => {
                let tag = (kind >= 128).then(|| u16::from_be_bytes([kind, at]));
                let mut bytes = body.to_vec();
                if let (6, Some(addresses)) = (kind % 8, bytes.first_chunk_mut::<12>()) {
                    // Mostly addresses in use.
                    let to =
                        if at & 1 == 0 { MacAddress::new([0xff; 6]) } else { own(u16::from(at >> 1) % VFS) };
                    let (front, back) = addresses.split_at_mut(6);
                    front.copy_from_slice(&to.bytes());
                    back.copy_from_slice(&own(vf).bytes());
                }
                pf.transmit(vf, Frame { tag, bytes: &bytes }, now, &mut |port, frame| {
                    check(vf, port, frame);
                    assert_eq!(frame.bytes.get(6..12), Some(own(vf).bytes().as_slice()), "spoofed");
                });
            }
        }
        assert_eq!(pf.settings(), before, "no VF changes the administrator's settings");
    }
}

/// Asserts the properties of every delivered frame.
fn check(sender: u16, port: Port, frame: Frame<'_>) {
    assert!(port != Port::Vf(sender), "a VF does not hear itself");
    // The uplink gets the tag inside the frame.
    assert!((60..=MAX_FRAME + 4).contains(&frame.bytes.len()), "{}", frame.bytes.len());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_bodies_hold(data in proptest::collection::vec(any::<u8>(), 0..1500), dext: bool) {
            fuzz_packet(&data);
            fuzz_pf(&data);
            let mut transmit = data;
            // Mostly existing kinds of descriptors.
            if let (true, Some(head)) = (dext, transmit.first_chunk_mut::<32>()) {
                (head[10], head[11]) = (0x20, 0x20);
                (head[26], head[27]) = (0x30, head[27] | 0x20);
            }
            fuzz_transmit(&transmit);
        }
    }

    /// The body finds a real packet in its bytes.
    #[test]
    fn a_segmented_packet_is_sent_whole() {
        let mut data = vec![0; 32 + 14 + 20 + 20 + 1000];
        // Context: 14 + 20 bytes before TCP's 20, segments of 100. Data: with segmentation.
        data[..4].copy_from_slice(&u32::to_le_bytes(14 << 9 | 20));
        data[8..12].copy_from_slice(&u32::to_le_bytes(1 << 29 | 2 << 20 | 1 << 11 | 1 << 10));
        data[12..16].copy_from_slice(&u32::to_le_bytes(100 << 16 | 20 << 8));
        data[24..28].copy_from_slice(&u32::to_le_bytes(1 << 31 | 1 << 29 | 3 << 20));
        assert_eq!(fuzz_transmit(&data), 10);
    }
}
