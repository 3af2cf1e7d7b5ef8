// SPDX-License-Identifier: Apache-2.0

use netpolicy::MacAddress;
use proptest::prelude::*;

use super::message::{Message, get_link, parse, set_vf};
use crate::control::{PortVlan, TagProtocol, VfChange, VfLink, VfSettings};

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u32> = hex.chars().filter_map(|c| c.to_digit(16)).collect();
    digits.chunks(2).map(|pair| u8::try_from(pair[0] * 16 + pair[1]).unwrap()).collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// An attribute with its padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap();
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len() + 16).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
    bytes.extend(words(&[sequence, 0]));
    bytes.extend(payload);
    bytes
}

/// The answer of igb in a kernel 6.12 to RTM_GETLINK after `ip link set eth0 vf 0 mac 02:00:00:00:00:11 vlan 7 qos 3
/// spoofchk off trust on` and `… max_tx_rate 100`.
fn captured() -> Vec<u8> {
    bytes(include_str!("newlink.hex"))
}

#[test]
fn a_captured_answer() {
    let messages = parse(&captured()).unwrap();
    let [Message::Link { sequence: 0x4d, link }] = messages.as_slice() else { panic!("{messages:?}") };
    assert_eq!((link.index, link.name.as_deref(), link.up), (2, Some("eth0"), true));
    let vfs = link.vfs.as_ref().unwrap();
    assert_eq!(vfs.keys().copied().collect::<Vec<_>>(), [0, 1]);
    assert_eq!(
        vfs[&0],
        VfSettings {
            mac: Some(MacAddress::new([2, 0, 0, 0, 0, 0x11])),
            vlan: PortVlan { id: 7, qos: 3, protocol: TagProtocol::Dot1Q },
            spoof_check: Some(false),
            trust: Some(true),
            min_tx_rate: 0,
            max_tx_rate: 100,
            link_state: Some(VfLink::Auto),
        }
    );
    assert_eq!(
        vfs[&1],
        VfSettings {
            spoof_check: Some(true),
            trust: Some(false),
            link_state: Some(VfLink::Auto),
            ..VfSettings::default()
        }
    );
}

#[test]
fn captured_acknowledgements() {
    let check = |hex: &str, sequence: u32, errno: i32| {
        let expected = vec![Message::Ack { sequence, errno, text: None }];
        assert_eq!(parse(&bytes(hex)).unwrap(), expected, "{hex}");
    };
    check("2400000002000001500000009de039da0000000050000000130005005000000000000000", 0x50, 0);
    check("24000000020000014f0000009de039daa1ffffff34000000130005004f00000000000000", 0x4f, libc::EOPNOTSUPP);
    // The answer is not capped, so it repeats the request.
    check(
        "44000000020000004e000000c0000000deffffff30000000130005004e00000000000000\
         00000000020000000000000000000000100016000c0001000800010000000000",
        0x4e,
        libc::ERANGE,
    );
}

#[test]
fn the_kernels_words() {
    let request = message(19, 5, 9, &words(&[0, 2, 0, 0]));
    let text = attribute(1, b"VF is not ready\0");
    let offset = attribute(2, &words(&[36]));
    for (flags, repeated) in [(0x300, &request[..16]), (0x200, &request[..])] {
        let mut payload = words(&[16u32.wrapping_neg()]);
        payload.extend(repeated);
        payload.extend(&offset);
        payload.extend(&text);
        assert_eq!(
            parse(&message(2, flags, 9, &payload)).unwrap(),
            [Message::Ack { sequence: 9, errno: 16, text: Some("VF is not ready".to_owned()) }]
        );
    }
}

/// The layouts of linux/if_link.h: the number of the VF, then the values.
#[test]
fn changes_are_encoded() {
    let mac = |bytes: [u8; 6]| {
        let mut value = words(&[3]);
        value.extend(bytes);
        value.resize(36, 0);
        attribute(1, &value)
    };
    let a = [2, 0, 0, 0, 0xab, 0x11];
    let mut service = words(&[3, 5, 2]);
    service.extend([0x88, 0xa8, 0, 0]);
    let table = [
        (VfChange::Mac(Some(MacAddress::new(a))), mac(a)),
        (VfChange::Mac(None), mac([0; 6])),
        (
            VfChange::Vlan(PortVlan { id: 5, qos: 2, protocol: TagProtocol::Dot1Q }),
            attribute(2, &words(&[3, 5, 2])),
        ),
        (
            VfChange::Vlan(PortVlan { id: 5, qos: 2, protocol: TagProtocol::Dot1Ad }),
            attribute(12, &attribute(1, &service)),
        ),
        (VfChange::SpoofCheck(true), attribute(4, &words(&[3, 1]))),
        (VfChange::Trust(false), attribute(9, &words(&[3, 0]))),
        (VfChange::TxRate { min: 1, max: 100 }, attribute(6, &words(&[3, 1, 100]))),
        (VfChange::Link(VfLink::Auto), attribute(5, &words(&[3, 0]))),
        (VfChange::Link(VfLink::Enable), attribute(5, &words(&[3, 1]))),
        (VfChange::Link(VfLink::Disable), attribute(5, &words(&[3, 2]))),
    ];
    for (change, expected) in table {
        let mut payload = words(&[0, 9, 0, 0]);
        payload.extend(attribute(22, &attribute(1, &expected)));
        assert_eq!(set_vf(9, 3, change, 77), message(19, 5, 77, &payload), "{change}");
    }
    let mut payload = words(&[0, 9, 0, 0]);
    payload.extend(attribute(29, &words(&[9])));
    assert_eq!(get_link(9, 78), message(18, 1, 78, &payload));
}

fn one_vf(attributes: &[Vec<u8>]) -> Result<VfSettings, String> {
    let mut info = attribute(1, &{
        let mut value = words(&[0]);
        value.resize(36, 0);
        value
    });
    info.extend(attributes.concat());
    let mut payload = words(&[0, 9, 0, 0]);
    payload.extend(attribute(22, &attribute(1, &info)));
    match parse(&message(16, 0, 1, &payload))?.pop() {
        Some(Message::Link { link, .. }) => Ok(link.vfs.unwrap_or_default().remove(&0).unwrap_or_default()),
        other => Err(format!("{other:?}")),
    }
}

/// "Not supported" is not "off": a port group that requires the spoof check must not see it as possible.
#[test]
fn what_a_driver_does_not_say() {
    let settings =
        one_vf(&[attribute(4, &words(&[0, u32::MAX])), attribute(9, &words(&[0, u32::MAX]))]).unwrap();
    assert_eq!((settings.spoof_check, settings.trust, settings.link_state), (None, None, None));
    // An old kernel has one rate. A newer one's rates are not overwritten by it.
    let tx_rate = attribute(3, &words(&[0, 70]));
    assert_eq!(one_vf(std::slice::from_ref(&tx_rate)).unwrap().max_tx_rate, 70);
    let rate = attribute(6, &words(&[0, 5, 80]));
    for order in [[rate.clone(), tx_rate.clone()], [tx_rate, rate]] {
        let settings = one_vf(&order).unwrap();
        assert_eq!((settings.min_tx_rate, settings.max_tx_rate), (5, 80));
    }
    let mut service = words(&[0, 5, 2]);
    service.extend([0x88, 0xa8, 0, 0]);
    let settings =
        one_vf(&[attribute(2, &words(&[0, 5, 2])), attribute(12, &attribute(1, &service))]).unwrap();
    assert_eq!(settings.vlan, PortVlan { id: 5, qos: 2, protocol: TagProtocol::Dot1Ad });
}

#[test]
fn nonsense_is_refused() {
    one_vf(&[attribute(4, &words(&[0]))]).unwrap_err();
    one_vf(&[attribute(2, &words(&[0, 0x1_0000, 0]))]).unwrap_err();
    // A second list entry for the same VF.
    let info = attribute(1, &attribute(1, &[0; 36]));
    let mut payload = words(&[0, 9, 0, 0]);
    payload.extend(attribute(22, &[info.clone(), info].concat()));
    parse(&message(16, 0, 1, &payload)).unwrap_err();
    parse(&[1, 2, 3]).unwrap_err();
}

#[test]
fn news_and_the_rest() {
    let gone = message(17, 0, 0, &words(&[0, 9, 0, 0]));
    let datagram =
        [gone, message(4, 0, 0, &[]), message(3, 2, 5, &words(&[0])), message(99, 0, 0, &[1])].concat();
    let expected =
        [Message::LinkGone { index: 9 }, Message::Overrun, Message::Done { sequence: 5 }, Message::Other];
    assert_eq!(parse(&datagram).unwrap(), expected);
}

proptest! {
    /// A cut or damaged answer is an error or less information, never a panic, and never another VF's settings.
    #[test]
    fn damage_does_no_harm(cut in 0..1508usize, at in 0..1508usize, value: u8) {
        let mut datagram = captured();
        datagram.truncate(cut);
        let _ = parse(&datagram);
        let mut datagram = captured();
        datagram[at] = value;
        let _ = parse(&datagram);
    }

    #[test]
    fn anything_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
    }

    /// A change's request, read as an answer, holds the change.
    #[test]
    fn there_and_back(mac: [u8; 6], id in 0..4095u16, qos in 0..8u8, on: bool, min: u32, max: u32) {
        let mac = MacAddress::new(mac);
        let changes = [
            VfChange::Mac((!mac.is_zero()).then_some(mac)),
            VfChange::Vlan(PortVlan { id, qos, protocol: TagProtocol::Dot1Q }),
            VfChange::SpoofCheck(on),
            VfChange::Trust(!on),
            VfChange::TxRate { min, max },
            VfChange::Link(if on { VfLink::Enable } else { VfLink::Disable }),
        ];
        // The attributes of a change begin behind two headers, the link's 16 bytes and two nests.
        let attributes: Vec<_> = changes.iter().flat_map(|c| set_vf(9, 0, *c, 1)[40..].to_vec()).collect();
        let mut payload = words(&[0, 9, 0, 0]);
        payload.extend(attribute(22, &attribute(1, &attributes)));
        let parsed = parse(&message(16, 0, 1, &payload)).unwrap();
        let [Message::Link { link, .. }] = parsed.as_slice() else { panic!("{parsed:?}") };
        let settings = &link.vfs.as_ref().unwrap()[&0];
        for change in changes {
            prop_assert!(change.holds(settings), "{change} {settings:?}");
        }
    }
}
