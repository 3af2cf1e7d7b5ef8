// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets, which take any bytes and assert laws. Property tests run them too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use super::{
    layout::Access,
    message::Words,
    register_bits::{CONTROL_RST, CTS, PFACK, PFSTS, PFU, REQ},
    registers::{Effect, Read, Registers},
};
use crate::family::igb::IGBVF;

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
                    Effect::None | Effect::Interrupt => {}
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
            3 | 4 if IGBVF.layout.passes(offset, len, Access::Read) => {
                assert!(offset == 0 || offset == 8 || offset >= 0xf10, "{offset:#x}");
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
