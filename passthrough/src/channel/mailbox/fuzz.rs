// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets, which take any bytes and assert laws. Property tests run them too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use netpolicy::{MacAddress, Request};

use super::{
    layout::IGBVF,
    message::{BUFFER_WORDS, Words},
    register_bits::{ACK_MESSAGE, CONTROL_RST, CTS, NACK_MESSAGE, PFACK, PFSTS, PFU, REQ},
    registers::{Effect, Read, Registers},
};
use crate::family::igb::codec as igbvf;

/// The codec: a decoded message is encoded canonically, and has the same meaning when decoded
/// again.
pub fn fuzz_words(data: &[u8]) {
    let mut words = [0; BUFFER_WORDS];
    for (word, bytes) in words.iter_mut().zip(data.chunks_exact(4)) {
        *word = bytes.try_into().map_or(0, u32::from_le_bytes);
    }
    let effective = MacAddress::new([2, 0, 0, 0, 0, 0x11]);
    let Ok(request) = igbvf::decode(&words) else { return };
    assert_eq!(words[0] & (ACK_MESSAGE | NACK_MESSAGE | CTS), 0);
    let Some(encoded) = igbvf::encode(&request, effective) else {
        assert!(matches!(request, Request::Unknown { .. }), "{request:?} has no canonical form");
        return;
    };
    assert_canonical(encoded.padded());
    let again = igbvf::decode(encoded.padded());
    match (request, again) {
        // The message claims more hashes than it can carry; the codec cuts the rest.
        (
            Request::SetMulticast { count, hashes },
            Ok(Request::SetMulticast { count: kept, hashes: same }),
        ) => {
            assert_eq!(hashes, same);
            assert_eq!(usize::from(kept), usize::from(count).min(igbvf::MAX_MULTICAST));
        }
        (request, again) => assert_eq!(again, Ok(request)),
    }
}

/// Asserts the properties of every message that may reach the PF. Written without the codec.
pub fn assert_canonical(words: &[u32; BUFFER_WORDS]) {
    let (opcode, argument) = (words[0] & 0xffff, words[0] >> 16);
    let used = match (opcode, argument) {
        (1 | 6, 0) | (6, 1..=3) => 1,
        (2, 0..=2) => {
            assert!(
                words[1] & 1 == 0 && words[2] >> 16 == 0 && (words[1], words[2]) != (0, 0),
                "address {words:x?}"
            );
            3
        }
        (3, count @ 0..=30) => {
            assert!(words[1..].iter().all(|word| word & 0xf000_f000 == 0), "hashes {words:x?}");
            assert!(count % 2 == 0 || words.get(1 + count as usize / 2).is_some_and(|word| word >> 16 == 0));
            1 + count.div_ceil(2) as usize
        }
        (4, 0 | 1) => {
            assert!(words[1] <= 4094, "VLAN {words:x?}");
            2
        }
        (5, 0) => {
            assert!((68..=9728).contains(&words[1]), "frame size {words:x?}");
            2
        }
        _ => panic!("message {words:x?} must not reach the PF"),
    };
    assert!(words[used..].iter().all(|word| *word == 0), "unused words {words:x?}");
}

/// The registers: any accesses of the guest, interleaved with the relay's actions.
pub fn fuzz_registers(data: &[u8]) {
    let mut registers = Registers::new(&IGBVF);
    let mut in_flight: Option<u64> = None;
    let mut newest = 0;
    // Events since the last read that PFACK or PFSTS may announce.
    let (mut acknowledged, mut sent, mut from_pf) = (false, false, false);
    // "Clear to send" was withdrawn.
    let mut must_reset = false;
    for step in data.chunks_exact(8) {
        let [kind, low, high, len, v0, v1, v2, v3] = *step else { return };
        let value = u32::from_le_bytes([v0, v1, v2, v3]);
        // Mostly the relevant registers.
        let offset = match low % 8 {
            0..=2 => 0xc40,
            3 => 0,
            4 | 5 => 0x800 + u64::from(high % 16) * 4,
            _ => u64::from(u16::from_le_bytes([low, high])),
        };
        let len = if len < 200 { 4 } else { usize::from(len) };
        match kind % 8 {
            0..=2 => {
                let (effect, _) = registers.write(offset, len, value);
                match effect {
                    Effect::None => {}
                    Effect::Ring(snapshot) => {
                        assert_eq!(in_flight, None, "one message in flight");
                        assert_eq!((offset, len, value & REQ), (0xc40, 4, REQ));
                        assert!(snapshot.seq > newest, "sequence numbers never repeat");
                        in_flight = Some(snapshot.seq);
                        newest = snapshot.seq;
                    }
                    Effect::Reset(seq) => {
                        assert_eq!((offset, len, value & CONTROL_RST), (0, 4, CONTROL_RST));
                        assert!(seq > newest);
                        in_flight = None;
                        newest = seq;
                    }
                }
            }
            3 | 4 => match registers.read(offset, len) {
                Read::Shadow { value, hint } => {
                    assert!(!hint || in_flight.is_none());
                    if offset == 0xc40 && len == 4 {
                        assert_eq!(value & PFU, 0, "PFU is never shown");
                        assert!(acknowledged || value & PFACK == 0, "PFACK without an answer");
                        assert!(sent || from_pf || value & PFSTS == 0, "PFSTS without a message");
                        (acknowledged, sent) = (false, false);
                        let again = registers.read(offset, len);
                        let Read::Shadow { value: again, .. } = again else { panic!("{again:?}") };
                        assert_eq!(again & 0xb0, 0, "cleared by reading");
                    }
                }
                Read::Hardware => assert!(offset == 0 || offset == 8 || offset >= 0xf10, "{offset:#x}"),
                Read::Unknown { .. } => {}
            },
            5 => {
                let seq = if value & 1 == 0 { newest } else { u64::from(value >> 1) };
                let reply = (value & 2 == 0).then(|| Words::new(&[value]));
                let done = match &reply {
                    Some(reply) if value & 4 != 0 => registers.complete_reset(seq, reply),
                    _ => registers.complete(seq, reply.as_ref()),
                };
                assert_eq!(done, in_flight == Some(seq));
                if done {
                    in_flight = None;
                    acknowledged = true;
                    sent |= reply.is_some();
                    must_reset &= reply.is_none() || value & 4 == 0;
                }
                if done && reply.is_some() && value & 8 != 0 {
                    let Read::Shadow { value, .. } = registers.read(0x800, 4) else { panic!("no word 0") };
                    assert!(!must_reset || value & CTS == 0, "clear to send without a reset: {value:#x}");
                }
            }
            6 => {
                from_pf = true;
                registers.pf_message(value);
            }
            _ if value & 0xff == 0 => {
                newest = registers.function_reset();
                in_flight = None;
            }
            _ if value & 1 == 0 => {
                from_pf = true;
                must_reset = true;
                registers.lost_clear_to_send();
            }
            _ => registers.set_pf_resetting(value & 2 != 0),
        }
        assert_eq!((registers.in_flight(), registers.seq()), (in_flight.is_some(), newest));
    }
}
