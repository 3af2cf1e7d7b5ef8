// SPDX-License-Identifier: Apache-2.0

//! The adapter's uplink. A packet socket pair stands in for the tap device: one read or write is one frame.

use rustix::{
    io::{read, write},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use sriov::{PortVlan, VfChange};

use super::fixture::{Adapter, eventually, frame, mac, text};

#[test]
fn frames_reach_the_wire_with_their_tags_and_come_back() {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let mut adapter = Adapter::with_tap(2, Some(tap));
    assert!(adapter.pf.about().uplink);
    let (mut left, mut right) = (adapter.guest(0), adapter.guest(1));
    let on_wire = || {
        let mut bytes = vec![0; 2000];
        let mut len = 0;
        assert!(eventually(|| read(&wire, bytes.as_mut_slice()).map(|got| len = got).is_ok()));
        bytes.truncate(len);
        bytes
    };
    // Frames between VFs stay inside; broadcasts and frames to unknown addresses go out.
    left.send(&frame(mac(0x11), mac(0x10), "inside"));
    let outside = frame(mac(0x99), mac(0x10), "outside");
    left.send(&outside);
    assert_eq!(on_wire(), outside);
    assert_eq!(text(&right.receive()), "inside");
    adapter.apply(0, VfChange::Vlan(PortVlan { id: 7, qos: 1, ..PortVlan::default() }));
    left.send(&outside);
    let mut tagged = outside.clone();
    tagged.splice(12..12, [0x81, 0, 0x20, 7]);
    assert_eq!(on_wire(), tagged);

    let mut answer = frame(mac(0x10), mac(0x99), "answer");
    write(&wire, &answer).unwrap();
    answer.splice(12..12, [0x81, 0, 0, 7]);
    write(&wire, &answer).unwrap();
    let received = left.receive();
    assert_eq!((text(&received), received.tag, left.read(0xf10)), ("answer", None, 1), "in its VLAN only");
    for nonsense in [&[1u8][..], &[0xff; 13], &[0xff; 12_000]] {
        write(&wire, nonsense).unwrap();
    }
    write(&wire, &frame(mac(0x11), mac(0x99), "to the other")).unwrap();
    assert_eq!(text(&right.receive()), "to the other");
    // Without a link no frame passes in either direction.
    adapter.pf.set_link(false).unwrap();
    write(&wire, &frame(mac(0x11), mac(0x99), "lost")).unwrap();
    right.send(&frame(mac(0x99), mac(0x11), "lost too"));
    assert!(eventually(|| adapter.counters(1).not_sent == 1));
    adapter.pf.set_link(true).unwrap();
    write(&wire, &frame(mac(0x11), mac(0x99), "back")).unwrap();
    assert_eq!(text(&right.receive()), "back");
    // The tap device is deleted: the VFs still reach each other.
    drop(wire);
    adapter.apply(0, VfChange::Vlan(PortVlan::default()));
    left.send(&frame(mac(0x11), mac(0x10), "alone"));
    assert_eq!(text(&right.receive()), "alone");
}
