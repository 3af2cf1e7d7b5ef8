// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets, which take any bytes and assert laws. Property tests run them too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use netpolicy::{MacAddress, Request};

use super::codec;
use crate::channel::mailbox::{
    message::BUFFER_WORDS,
    register_bits::{ACK_MESSAGE, CTS, NACK_MESSAGE},
};

/// Laws of the codec: a decoded message has a canonical encoding, which decodes to the same
/// request.
pub fn fuzz_words(data: &[u8]) {
    let mut words = [0; BUFFER_WORDS];
    for (word, bytes) in words.iter_mut().zip(data.chunks_exact(4)) {
        *word = bytes.try_into().map_or(0, u32::from_le_bytes);
    }
    let effective = MacAddress::new([2, 0, 0, 0, 0, 0x11]);
    let Ok(request) = codec::decode(&words) else { return };
    assert_eq!(words[0] & (ACK_MESSAGE | NACK_MESSAGE | CTS), 0);
    let Some(encoded) = codec::encode(&request, effective) else {
        assert!(matches!(request, Request::Unknown { .. }), "{request:?} has no canonical form");
        return;
    };
    assert_canonical(encoded.padded());
    let again = codec::decode(encoded.padded());
    match (request, again) {
        // The message claims more hashes than it can carry; the codec cuts the rest.
        (
            Request::SetMulticast { count, hashes },
            Ok(Request::SetMulticast { count: kept, hashes: same }),
        ) => {
            assert_eq!(hashes, same);
            assert_eq!(usize::from(kept), usize::from(count).min(codec::MAX_MULTICAST));
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
