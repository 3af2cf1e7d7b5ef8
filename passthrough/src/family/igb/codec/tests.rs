// SPDX-License-Identifier: Apache-2.0

use proptest::prelude::*;

use super::*;
use crate::family::igb::fuzz;

fn mac(last: u8) -> MacAddress {
    MacAddress::new([2, 0xaa, 0xbb, 0xcc, 0xdd, last])
}

fn message(words: &[u32]) -> [u32; BUFFER_WORDS] {
    let mut all = [0xdead_beef; BUFFER_WORDS];
    all[..words.len()].copy_from_slice(words);
    all
}

fn check(words: &[u32], expected: Result<Request, Malformed>, canonical: Option<&[u32]>) {
    let decoded = decode(&message(words));
    assert_eq!(decoded, expected, "{words:x?}");
    let encoded = decoded.ok().and_then(|request| encode(&request, mac(0x11)));
    assert_eq!(encoded.as_ref().map(|words| words.as_slice()), canonical, "{words:x?}");
}

#[test]
fn addresses_are_in_memory_order() {
    check(&[2, 0xccbb_aa02, 0x1dd], Ok(Request::SetMac(mac(1))), Some(&[2, 0xccbb_aa02, 0x1dd]));
    check(
        &[0x2_0002, 0xccbb_aa02, 0xffff_01dd],
        Ok(Request::AddUnicastFilter(mac(1))),
        Some(&[0x2_0002, 0xccbb_aa02, 0x1dd]),
    );
    check(&[0x1_0002, 0, 0], Ok(Request::ClearUnicastFilters), Some(&[0x1_0002, 0xccbb_aa02, 0x11dd]));
}

#[test]
fn lengths_are_fixed_and_words_behind_them_zero() {
    check(&[1], Ok(Request::Reset), Some(&[1]));
    check(&[0x1_0004, 4094], Ok(Request::SetVlan { vid: 4094, add: true }), Some(&[0x1_0004, 4094]));
    check(&[5, 9728], Ok(Request::SetMaxFrame(9728)), Some(&[5, 9728]));
    let mode = PromiscuousMode { multicast: true, unicast: true };
    check(&[0x3_0006], Ok(Request::SetPromiscuous(mode)), Some(&[0x3_0006]));
    let multicast = [0x3_0003, 0xf222_0111, 0x0444_0333];
    let request = Request::SetMulticast { count: 3, hashes: vec![0x111, 0x222, 0x333] };
    let mut canonical = [0; BUFFER_WORDS];
    canonical[..3].copy_from_slice(&[0x3_0003, 0x0222_0111, 0x333]);
    check(&multicast, Ok(request), Some(&canonical));
}

#[test]
fn what_has_no_meaning_says_why() {
    for (words, expected) in [
        (&[0x8000_0001][..], Malformed::Answer(0x8000_0001)),
        (&[0x4000_0003], Malformed::Answer(0x4000_0003)),
        (&[0x2000_0001], Malformed::ClearToSend(0x2000_0001)),
        (&[0x1_0001], Malformed::Argument(0x1_0001)),
        (&[0x3_0002, 2, 1], Malformed::Argument(0x3_0002)),
        (&[0x100_0003], Malformed::Argument(0x100_0003)),
        (&[2, 1, 1], Malformed::Mac { mac: MacAddress::new([1, 0, 0, 0, 1, 0]), filter: false }),
        (&[0x2_0002, 0, 0], Malformed::Mac { mac: MacAddress::ZERO, filter: true }),
        (&[0x1_0004, 4095], Malformed::Vlan(4095)),
        (&[0x1_0004, 0x1_0001], Malformed::Vlan(0x1_0001)),
        (&[5, 67], Malformed::Frame(67)),
        (&[5, u32::MAX], Malformed::Frame(u32::MAX)),
        (&[0x4_0006], Malformed::Argument(0x4_0006)),
    ] {
        check(words, Err(expected), None);
    }
    for opcode in [0u16, 7, 0x100, 0xffff] {
        check(&[opcode.into()], Ok(Request::Unknown { opcode }), None);
    }
}

#[test]
fn what_no_message_says_is_not_encoded() {
    for request in [
        Request::SetMac(MacAddress::ZERO),
        Request::AddUnicastFilter(MacAddress::new([1, 0, 0, 0, 0, 1])),
        Request::SetVlan { vid: 4095, add: true },
        Request::SetMaxFrame(10_000),
        Request::Unknown { opcode: 1 },
    ] {
        assert_eq!(encode(&request, mac(1)), None, "{request:?}");
    }
    assert_eq!(encode(&Request::ClearUnicastFilters, MacAddress::ZERO), None);
    let long = Request::SetMulticast { count: 31, hashes: vec![1; 31] };
    assert_eq!(encode(&long, mac(1)).map(|words| words.first()), Some(0x1e_0003));
}

#[test]
fn changes_have_the_messages_of_their_requests() {
    let vlan = VlanId::new(100).expect("a VLAN");
    for (change, words) in [
        (Change::LeaveVlan(vlan), Some(&[0x0004, 100][..])),
        (Change::JoinVlan(vlan), Some(&[0x1_0004, 100])),
        (Change::ClearUnicast, Some(&[0x1_0002, 0xccbb_aa02, 0x11dd])),
        (Change::SetPromiscuous(PromiscuousMode::OFF), Some(&[6])),
        (Change::SetMaxFrame(1522), Some(&[5, 1522])),
        (Change::SetMulticast(vec![]), Some(&[3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        (Change::Reset, None),
        (Change::SetMac(mac(1)), None),
        (Change::SetTrust(true), None),
    ] {
        let encoded = encode_change(&change, mac(0x11));
        assert_eq!(encoded.as_ref().map(|encoded| encoded.as_slice()), words, "{change:?}");
    }
}

#[test]
fn a_reset_is_answered_exactly_as_the_driver_compares() {
    assert_eq!(reset_reply(Some(mac(1))).as_slice(), [0x8000_0001, 0xccbb_aa02, 0x1dd]);
    assert_eq!(reset_reply(None).as_slice(), [0x4000_0001, 0, 0]);
    for (words, expected) in [
        (&[0x8000_0001, 0xccbb_aa02, 0x1dd][..], Some(Some(mac(1)))),
        (&[0x4000_0001, 0, 0], Some(None)),
        (&[0x8000_0001, 0, 0], Some(None)),
        (&[0x8000_0002, 0xccbb_aa02, 0x1dd], None),
        (&[0x2000_0100], None),
    ] {
        assert_eq!(parse_reset_reply(&Words::new(words)), expected, "{words:x?}");
    }
}

proptest! {
    #[test]
    fn the_codec_keeps_its_laws(words in proptest::collection::vec(any::<u32>(), 16), opcode in 0u32..8, argument in 0u32..40) {
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        fuzz::fuzz_words(&bytes(&words));
        // Mostly known opcodes; otherwise most inputs are rejected.
        let mut likely = words;
        likely[0] = opcode | argument << 16;
        fuzz::fuzz_words(&bytes(&likely));
        likely[1] &= 0x3ffe;
        fuzz::fuzz_words(&bytes(&likely));
    }
}
