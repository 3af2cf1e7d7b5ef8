// SPDX-License-Identifier: Apache-2.0

//! The table of messages, word by word.

use proptest::prelude::*;

use super::*;
use crate::family::ixgbe::fuzz;

const AT_1_0: Session = Session { version: 0 };
const AT_1_1: Session = Session { version: VERSION_1_1 };
const AT_1_2: Session = Session { version: VERSION_1_2 };
const AT_1_3: Session = Session { version: VERSION_1_3 };
const RUBBISH: u32 = 0xdead_beef;
const CLEAR: bool = true;

fn mac(last: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, last])
}

fn message(words: &[u32]) -> [u32; BUFFER_WORDS] {
    let mut all = [RUBBISH; BUFFER_WORDS];
    all[..words.len()].copy_from_slice(words);
    all
}

fn at(session: Session) -> Context {
    Context { effective: mac(0x11), session }
}

/// Checks the request of a message, and its canonical form and the words of the reply to it.
fn request(words: &[u32], expected: Request, canonical: &[u32], reply_words: usize) {
    let decoded = Ixgbevf.decode(&message(words), AT_1_3);
    assert_eq!(decoded, Ok(Incoming::Request(expected.clone())), "{words:x?}");
    let encoded = Ixgbevf.encode(&expected, at(AT_1_3)).unwrap_or_else(|| panic!("{words:x?}"));
    assert_eq!((encoded.words, encoded.reply_words), (Words::new(canonical), reply_words), "{words:x?}");
}

#[test]
fn requests_have_these_canonical_forms() {
    request(&[1], Request::Reset, &[1], 4);
    request(&[2, 2, 0x1100], Request::SetMac(mac(0x11)), &[2, 2, 0x1100], 1);
    request(&[2, 2, RUBBISH << 16 | 0x1100], Request::SetMac(mac(0x11)), &[2, 2, 0x1100], 1);
    let mut list = [0; BUFFER_WORDS];
    list[..3].copy_from_slice(&[0x3_0003, 0x0222_0111, 0x333]);
    let hashes = Request::SetMulticast { count: 3, hashes: vec![0x111, 0x222, 0x333] };
    request(&[0x3_0003, 0xf222_e111, 0xdead_1333], hashes, &list, 1);
    request(&[0x1_0004, 100], Request::SetVlan { vid: 100, add: true }, &[0x1_0004, 100], 1);
    request(&[4, 4094], Request::SetVlan { vid: 4094, add: false }, &[4, 4094], 1);
    // Messages lack the tag, which requests have.
    request(&[5, 0x5ee], Request::SetMaxFrame(1522), &[5, 0x5ee], 1);
    request(&[5, 68], Request::SetMaxFrame(72), &[5, 68], 1);
    request(&[5, 9728], Request::SetMaxFrame(9732), &[5, 9728], 1);
    request(&[6], Request::ClearUnicastFilters, &[6, 0, 0], 1);
    // Linux counts the addresses of its list; the PF gets index 2 for each.
    for index in [1, 2, 3, 255] {
        let add = Request::AddUnicastFilter(mac(0x22));
        request(&[index << 16 | 6, 2, 0x2200], add, &[0x2_0006, 2, 0x2200], 1);
    }
    let all_groups = PromiscuousMode { multicast: true, unicast: false };
    let all_frames = PromiscuousMode { multicast: true, unicast: true };
    request(&[0xc, 0], Request::SetPromiscuous(PromiscuousMode::OFF), &[0xc, 0], 2);
    request(&[0xc, 1], Request::SetPromiscuous(PromiscuousMode::OFF), &[0xc, 0], 2);
    request(&[0xc, 2], Request::SetPromiscuous(all_groups), &[0xc, 2], 2);
    request(&[0xc, 3], Request::SetPromiscuous(all_frames), &[0xc, 3], 2);
}

#[test]
fn a_count_of_hashes_beyond_the_message_stays_visible_to_the_policy() {
    let Ok(Incoming::Request(Request::SetMulticast { count, hashes })) =
        Ixgbevf.decode(&message(&[0xff_0003, 1]), AT_1_0)
    else {
        panic!("no list")
    };
    assert_eq!((count, hashes.len()), (255, 30));
}

#[test]
fn protocol_messages_go_to_the_pf_in_versions_that_have_them() {
    let forward =
        |words: &[u32], reply_words| Step::Forward(Exchange { words: Words::new(words), reply_words });
    let queues = || forward(&[9, 0, 0, 0, 0], 5);
    let link = || forward(&[0x10, 0], 2);
    for (words, session, name, step) in [
        (&[8, 0][..], AT_1_0, "api_version", forward(&[8, 0, 0], 1)),
        (&[8, 2], AT_1_0, "api_version", forward(&[8, 2, 0], 1)),
        (&[8, 3], AT_1_0, "api_version", forward(&[8, 3, 0], 1)),
        (&[8, 4], AT_1_0, "api_version", forward(&[8, 4, 0], 1)),
        (&[8, 4], AT_1_3, "api_version", forward(&[8, 4, 0], 1)),
        // 2.0, 1.4, 1.5, 1.6, 1.7 and a version to come.
        (&[8, 1], AT_1_0, "api_version", Step::Refuse),
        (&[8, 5], AT_1_0, "api_version", Step::Refuse),
        (&[8, 6], AT_1_0, "api_version", Step::Refuse),
        (&[8, 7], AT_1_0, "api_version", Step::Refuse),
        (&[8, 8], AT_1_0, "api_version", Step::Refuse),
        (&[8, u32::MAX], AT_1_0, "api_version", Step::Refuse),
        (&[9], AT_1_0, "queues", Step::Refuse),
        (&[9], AT_1_1, "queues", queues()),
        (&[9], AT_1_3, "queues", queues()),
        (&[0x10], AT_1_1, "link_state", Step::Refuse),
        (&[0x10], AT_1_2, "link_state", link()),
        (&[0xa], AT_1_3, "rss", Step::Refuse),
        (&[0xb], AT_1_3, "rss", Step::Refuse),
        (&[0x11], AT_1_3, "pf_link_state", Step::Refuse),
        (&[0x12, 3], AT_1_3, "features", Step::Refuse),
        (&[0xc, 0], AT_1_1, "receive_mode", Step::Refuse),
        (&[0xc, 3], AT_1_2, "receive_mode", Step::Refuse),
    ] {
        let decoded = Ixgbevf.decode(&message(words), session);
        assert_eq!(decoded, Ok(Incoming::Protocol(Protocol { name, step })), "{words:x?} at {session:?}");
    }
}

#[test]
fn messages_without_a_meaning_name_the_reason() {
    for (words, expected) in [
        (&[0x8000_0001][..], Malformed::Answer(0x8000_0001)),
        (&[0x4000_0008, 4], Malformed::Answer(0x4000_0008)),
        (&[0x2000_0001], Malformed::ClearToSend(0x2000_0001)),
        (&[0x1_0001], Malformed::Argument(0x1_0001)),
        (&[0x1_0002, 2, 0x1100], Malformed::Argument(0x1_0002)),
        (&[0x100_0003], Malformed::Argument(0x100_0003)),
        (&[0x2_0004, 1], Malformed::Argument(0x2_0004)),
        (&[0x1_0005, 1518], Malformed::Argument(0x1_0005)),
        (&[0x100_0006], Malformed::Argument(0x100_0006)),
        (&[0x1_0008, 4], Malformed::Argument(0x1_0008)),
        (&[0x1_0009], Malformed::Argument(0x1_0009)),
        (&[0x1_000c, 0], Malformed::Argument(0x1_000c)),
        (&[2, 3, 0x2200], Malformed::Mac { mac: MacAddress::new([3, 0, 0, 0, 0, 0x22]), filter: false }),
        (&[2, 0, 0], Malformed::Mac { mac: MacAddress::ZERO, filter: false }),
        (&[0x1_0006, 0, 0], Malformed::Mac { mac: MacAddress::ZERO, filter: true }),
        (&[0x1_0004, 4095], Malformed::Vlan(4095)),
        (&[0x1_0004, 0x1064], Malformed::Vlan(0x1064)),
        (&[5, 67], Malformed::Frame(67)),
        (&[5, 9729], Malformed::Frame(9729)),
        (&[5, u32::MAX], Malformed::Frame(u32::MAX)),
        (&[0xc, 4], Malformed::Mode(4)),
        (&[0xc, u32::MAX], Malformed::Mode(u32::MAX)),
    ] {
        assert_eq!(Ixgbevf.decode(&message(words), AT_1_3), Err(expected), "{words:x?}");
    }
    for opcode in [0u16, 7, 0xd, 0xe, 0xf, 0x13, 0x100, 0xffff] {
        let decoded = Ixgbevf.decode(&message(&[opcode.into()]), AT_1_3);
        assert_eq!(decoded, Ok(Incoming::Request(Request::Unknown { opcode })));
        assert_eq!(Ixgbevf.encode(&Request::Unknown { opcode }, at(AT_1_3)), None);
    }
}

#[test]
fn requests_without_a_form_in_this_version_are_not_encoded() {
    let all_frames = PromiscuousMode { multicast: true, unicast: true };
    let unicast = PromiscuousMode { multicast: false, unicast: true };
    for (request, session) in [
        (Request::SetMac(MacAddress::ZERO), AT_1_3),
        (Request::AddUnicastFilter(MacAddress::new([1, 0, 0, 0, 0, 1])), AT_1_3),
        (Request::SetVlan { vid: 4095, add: true }, AT_1_3),
        (Request::SetMaxFrame(3), AT_1_3),
        (Request::SetMaxFrame(71), AT_1_3),
        (Request::SetMaxFrame(9733), AT_1_3),
        (Request::SetPromiscuous(unicast), AT_1_3),
        (Request::SetPromiscuous(all_frames), AT_1_2),
        (Request::SetPromiscuous(PromiscuousMode::OFF), AT_1_1),
    ] {
        assert_eq!(Ixgbevf.encode(&request, at(session)), None, "{request:?}");
    }
}

#[test]
fn changes_have_the_messages_of_their_requests_after_an_agreement() {
    let vlan = VlanId::new(100).expect("a VLAN");
    let off = Change::SetPromiscuous(PromiscuousMode::OFF);
    let empty = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (change, words, needs_agreement) in [
        (Change::LeaveVlan(vlan), Some(&[4, 100][..]), false),
        (Change::JoinVlan(vlan), Some(&[0x1_0004, 100]), false),
        (Change::ClearUnicast, Some(&[6, 0, 0]), false),
        (Change::AddUnicast(mac(1)), Some(&[0x2_0006, 2, 0x100]), false),
        (off, Some(&[0xc, 0]), true),
        (Change::SetMaxFrame(1522), Some(&[5, 1518]), true),
        (Change::SetMulticast(vec![]), Some(&empty), false),
        (Change::Reset, None, false),
        (Change::SetMac(mac(1)), None, false),
        (Change::SetTrust(true), None, false),
    ] {
        let encoded = Ixgbevf.encode_change(&change, at(AT_1_3));
        assert_eq!(encoded.as_ref().map(|encoded| encoded.words.as_slice()), words, "{change:?}");
        let before: Vec<Words> =
            Ixgbevf.before_change(&change, AT_1_0).iter().map(|exchange| exchange.words).collect();
        let versions = [[8, 4, 0], [8, 3, 0], [8, 2, 0]].map(|words| Words::new(&words));
        assert_eq!(before, if needs_agreement { versions.to_vec() } else { vec![] }, "{change:?}");
        assert_eq!(Ixgbevf.before_change(&change, AT_1_1), [], "{change:?}");
    }
}

#[test]
fn a_reset_is_answered_exactly_as_the_driver_compares() {
    let mut expected = [0; BUFFER_WORDS];
    expected[..4].copy_from_slice(&[0x8000_0001, 2, 0x1100, 3]);
    let extra = |extra| Some(ResetReply { mac: None, extra: Some(extra) });
    assert_eq!(Ixgbevf.reset_reply(Some(mac(0x11)), extra(0xffff_fff3)).as_slice(), expected);
    expected[..4].copy_from_slice(&[0x4000_0001, 0, 0, 0]);
    assert_eq!(Ixgbevf.reset_reply(None, None).as_slice(), expected);
    let reply = |mac, extra| Some(ResetReply { mac, extra: Some(extra) });
    for (words, parsed) in [
        (&[0x8000_0001, 2, 0x1100, 2][..], reply(Some(mac(0x11)), 2)),
        (&[0x8000_0001, 2, 0x1100, 0x1_0005], reply(Some(mac(0x11)), 1)),
        // ixgbe sends no address that the VF has chosen itself.
        (&[0x4000_0001, 0, 0, 0], reply(None, 0)),
        (&[0x8000_0001, 0, 0, 0], reply(None, 0)),
        (&[0x8000_0002, 2, 0x1100, 0], None),
        (&[0x100], None),
    ] {
        assert_eq!(Ixgbevf.parse_reset(&Words::new(words)), parsed, "{words:x?}");
    }
}

#[test]
fn replies_repeat_word_0_and_have_the_words_that_drivers_read() {
    for (words, accepted, from_pf, expected) in [
        (&[2, 2, 0x2200][..], true, None, &[0xa000_0002][..]),
        (&[2, 2, 0x2200], false, None, &[0x6000_0002]),
        // Unlike igbvf's: word 0 is repeated as a whole.
        (&[0x1_0004, 100], false, None, &[0x6001_0004]),
        (&[0x3_0006, 2, 0x2200], false, None, &[0x6003_0006]),
        (&[0x1f00_0007], false, None, &[0x7f00_0007]),
        (&[0xc, 0], true, None, &[0xa000_000c, 0]),
        (&[0xc, 1], true, None, &[0xa000_000c, 1]),
        (&[0xc, 1], true, Some([0xa000_000c, 0]), &[0xa000_000c, 1]),
        (&[0xc, 2], true, Some([0xa000_000c, 2]), &[0xa000_000c, 2]),
        (&[0xc, 3], true, Some([0xa000_000c, 0xffff_fffd]), &[0xa000_000c, 1]),
        // Denied silently: as ixgbe does with an untrusted VF.
        (&[0xc, 3], true, None, &[0xa000_000c, 1]),
        (&[0xc, 3], false, None, &[0x6000_000c]),
        (&[0xd, 1], false, None, &[0x6000_000d, 0xffff_fff3]),
        (&[0xe, 1], false, None, &[0x6000_000e, 0xffff_fff3]),
    ] {
        let outcome = Outcome { accepted, clear_to_send: CLEAR };
        let from_pf = from_pf.map(|words| Words::new(&words));
        let reply = Ixgbevf.reply(&message(words), outcome, from_pf.as_ref());
        assert_eq!(reply.as_slice(), expected, "{words:x?}");
    }
    let lost = Outcome { accepted: false, clear_to_send: !CLEAR };
    assert_eq!(Ixgbevf.reply(&message(&[5, 1518]), lost, None).as_slice(), [0x4000_0005]);
}

#[test]
fn only_a_reply_to_the_same_word_is_an_answer() {
    for (reply, message, answers) in [
        (0xa001_0004, 0x1_0004, true),
        (0x6001_0004, 0x1_0004, true),
        (0x4001_0004, 0x1_0004, true),
        (0x6000_0004, 0x1_0004, false),
        (0x2001_0004, 0x1_0004, false),
        (0x8000_0001, 1, true),
        (0x4000_0000, 1, false),
        (0x2000_0100, 1, false),
    ] {
        assert_eq!(Ixgbevf.answers(reply, message), answers, "{reply:x} {message:x}");
    }
}

#[test]
fn a_lowered_receive_mode_is_a_refusal() {
    for (message, reply, carried_out) in [
        (&[0xc, 2][..], &[0xa000_000c, 2][..], true),
        (&[0xc, 2], &[0xa000_000c, 1], false),
        (&[0xc, 0], &[0xa000_000c, 0], true),
        (&[0xc, 2], &[0x6000_000c, 2], false),
        (&[5, 1518], &[0xa000_0005], true),
    ] {
        let (message, reply) = (Words::new(message), Words::new(reply));
        assert_eq!(Ixgbevf.carried_out(&message, &reply), carried_out, "{message:x?} {reply:x?}");
    }
}

#[test]
fn numbers_of_the_pf_are_bounded() {
    let mut session = AT_1_0;
    for (message, from_pf, expected, version) in [
        (&[8, 3, 0][..], &[0xa000_0008, 3, 0][..], &[0xa000_0008][..], VERSION_1_2),
        (&[9, 0, 0, 0, 0], &[0xa000_0009, 2, 2, 0, 0], &[0xa000_0009, 2, 2, 0, 0], VERSION_1_2),
        (&[9, 0, 0, 0, 0], &[0xa000_0009, 9, 99, 999, 9999], &[0xa000_0009, 8, 8, 8, 7], VERSION_1_2),
        (&[0x10, 0], &[0xa000_0010, 0xffff_ffff], &[0xa000_0010, 1], VERSION_1_2),
        (&[0x10, 0], &[0xa000_0010, 2], &[0xa000_0010, 0], VERSION_1_2),
        (&[8, 0, 0], &[0xa000_0008], &[0xa000_0008], 0),
    ] {
        let reply = Ixgbevf.protocol_reply(&Words::new(message), &Words::new(from_pf), &mut session);
        assert_eq!(reply.as_ref().map(Words::as_slice), Some(expected), "{message:x?}");
        assert_eq!(session.version, version, "{message:x?}");
    }
    assert_eq!(Ixgbevf.protocol_reply(&Words::new(&[2]), &Words::new(&[0xa000_0002]), &mut session), None);
}

proptest! {
    #[test]
    fn the_codec_keeps_its_laws(
        version in any::<u8>(),
        words in proptest::collection::vec(any::<u32>(), 32),
        opcode in 0u32..0x14,
        argument in 0u32..40,
        small in 0u32..10,
    ) {
        let bytes = |words: &[u32]| {
            [version].into_iter().chain(words.iter().flat_map(|word| word.to_le_bytes())).collect::<Vec<u8>>()
        };
        fuzz::fuzz_words(&bytes(&words));
        // Mostly known opcodes; otherwise most inputs are rejected.
        let mut likely = words;
        likely[0] = opcode | argument << 16;
        fuzz::fuzz_words(&bytes(&likely));
        likely[1] &= 0x3ffe;
        fuzz::fuzz_words(&bytes(&likely));
        // Mostly no argument; a reset's and other replies of the PF.
        (likely[0], likely[1]) = (opcode, small);
        likely[16] = if small % 2 == 0 { 0x8000_0001 } else { 0xa000_0000 | opcode };
        fuzz::fuzz_words(&bytes(&likely));
    }
}
