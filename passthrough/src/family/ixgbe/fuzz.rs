// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets, which take any bytes and assert laws. Property tests run them too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use netpolicy::{MacAddress, Request};

use super::{IXGBEVF, codec};
use crate::{
    channel::mailbox::{
        message::{BUFFER_WORDS, Words},
        register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE},
    },
    family::{Context, Incoming, Outcome, Session, Step},
};

/// Laws of the codec, for a message of the guest and a reply of the PF: the first byte chooses the version of the
/// protocol, 64 bytes each are the message and the reply.
pub fn fuzz_words(data: &[u8]) {
    let Some((version, data)) = data.split_first() else { return };
    let mut session = Session { version: [0, 2, 3, 4].get(usize::from(version % 4)).copied().unwrap_or(0) };
    let words = |data: &[u8]| {
        let mut words = [0; BUFFER_WORDS];
        for (word, bytes) in words.iter_mut().zip(data.chunks_exact(4)) {
            *word = bytes.try_into().map_or(0, u32::from_le_bytes);
        }
        words
    };
    let (message, from_pf) = data.split_at(data.len().min(4 * BUFFER_WORDS));
    let (message, from_pf) = (words(message), Words::new(&words(from_pf)));

    let reset = IXGBEVF.codec.parse_reset(&from_pf);
    let shown = IXGBEVF.codec.reset_reply(reset.and_then(|reply| reply.mac), reset);
    assert!(shown.padded()[3] <= 3 && shown.padded()[4..].iter().all(|word| *word == 0), "{shown:x?}");

    for accepted in [false, true] {
        let outcome = Outcome { accepted, clear_to_send: true };
        let reply = IXGBEVF.codec.reply(&message, outcome, Some(&from_pf));
        let verdict = if accepted { ACK_MESSAGE } else { NACK_MESSAGE };
        assert_eq!(reply.first() & (ACK_MESSAGE | NACK_MESSAGE | CTS), verdict | CTS);
        assert!(IXGBEVF.codec.answers(reply.first(), message[0]));
    }
    match IXGBEVF.codec.decode(&message, session) {
        Ok(Incoming::Request(request)) => {
            assert_eq!(message[0] & (ACK_MESSAGE | NACK_MESSAGE | CTS), 0);
            check_request(request, session);
        }
        Ok(Incoming::Protocol(protocol)) => {
            let Step::Forward(exchange) = protocol.step else { return };
            assert_canonical(exchange.words.padded());
            let again = IXGBEVF.codec.decode(exchange.words.padded(), session);
            assert_eq!(
                again,
                Ok(Incoming::Protocol(crate::family::Protocol { step: Step::Forward(exchange), ..protocol }))
            );
            if let Some(reply) = IXGBEVF.codec.protocol_reply(&exchange.words, &from_pf, &mut session) {
                assert!(reply.padded()[1..].iter().all(|word| *word <= 8), "{reply:x?}");
                assert!(session.version <= 4, "{session:?}");
            }
        }
        Err(_) => {}
    }
}

/// A decoded request has a canonical encoding, which decodes to the same request.
fn check_request(request: Request, session: Session) {
    let context = Context { effective: MacAddress::new([2, 0, 0, 0, 0, 0x11]), session };
    let Some(encoded) = IXGBEVF.codec.encode(&request, context) else {
        assert!(matches!(request, Request::Unknown { .. }), "{request:?} has no canonical form");
        return;
    };
    assert_canonical(encoded.words.padded());
    match (request, IXGBEVF.codec.decode(encoded.words.padded(), session)) {
        // The message claims more hashes than it can carry; the codec cuts the rest.
        (
            Request::SetMulticast { count, hashes },
            Ok(Incoming::Request(Request::SetMulticast { count: kept, hashes: same })),
        ) => {
            assert_eq!(hashes, same);
            assert_eq!(usize::from(kept), usize::from(count).min(codec::MAX_MULTICAST));
        }
        (request, again) => assert_eq!(again, Ok(Incoming::Request(request))),
    }
}

/// Asserts the properties of every message that may reach the PF. Written without the codec.
pub fn assert_canonical(words: &[u32; BUFFER_WORDS]) {
    let (opcode, argument) = (words[0] & 0xffff, words[0] >> 16);
    let used = match (opcode, argument) {
        (1 | 9, 0) | (0x10, 0) => 1,
        (2, 0) | (6, 2) => {
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
        // Clears all further addresses.
        (6, 0) => 1,
        (8, 0) => {
            assert!([0, 2, 3, 4].contains(&words[1]), "version {words:x?}");
            2
        }
        // Mode 1 would give the VF the groups of all VFs.
        (0xc, 0) => {
            assert!([0, 2, 3].contains(&words[1]), "mode {words:x?}");
            2
        }
        _ => panic!("message {words:x?} must not reach the PF"),
    };
    assert!(words[used..].iter().all(|word| *word == 0), "unused words {words:x?}");
}
