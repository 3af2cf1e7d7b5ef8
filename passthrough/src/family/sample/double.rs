// SPDX-License-Identifier: Apache-2.0

//! The PF of the sample family. Written without its codec.

use netpolicy::MacAddress;

use super::SAMPLE;
use crate::{
    channel::mailbox::message::BUFFER_WORDS,
    family::Family,
    relay::testing::{Double, driver::Offsets, fake_vf::Pf},
};

pub(super) struct SamplePf;

/// The low byte of the word behind the address in a reset's reply.
pub(super) const FILTER_TYPE: u32 = 0x0007;
/// Queues that the PF claims.
pub(super) const CLAIMED_QUEUES: u32 = 1000;

impl Double for SamplePf {
    fn family(&self) -> &'static Family {
        &SAMPLE
    }

    fn offsets(&self) -> Offsets {
        Offsets { control: 0x10, status: 0x8, buffer: 0x200, mailbox: 0x2fc }
    }

    fn reset_message(&self, pf: &mut Pf) -> Vec<u32> {
        let [a, b, c, d, e, f] = pf.mac.bytes();
        let address = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])];
        vec![0x8000_0001, address[0], address[1], 0xabcd_0000 | FILTER_TYPE]
    }

    fn handle(&self, pf: &mut Pf, words: &[u32; BUFFER_WORDS]) -> Vec<u32> {
        let ([a, b, c, d], [e, f, ..]) = (words[1].to_le_bytes(), words[2].to_le_bytes());
        let mac = MacAddress::new([a, b, c, d, e, f]);
        match words[0] {
            2 if pf.trusted => {
                pf.mac = mac;
                vec![0xa000_0002, words[1], words[2] | 0x0005_0000]
            }
            2 => vec![0x6000_0002, 0, 0],
            8 if words[1] == 1 => vec![0xa000_0008, 1, CLAIMED_QUEUES],
            // Another version than the requested one.
            8 => vec![0xa000_0008, 9, CLAIMED_QUEUES],
            _ => {
                pf.unhandled += 1;
                vec![0x6000_0000 | words[0] & 0xffff]
            }
        }
    }
}
