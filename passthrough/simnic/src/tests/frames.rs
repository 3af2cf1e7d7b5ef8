// SPDX-License-Identifier: Apache-2.0

//! Frames from guest to guest: descriptors, offloads, interrupts, filters.

use passthrough::{hardware::VfHardware, relay::testing::Bus};
use sriov::{PortVlan, VfChange};

use super::fixture::{Adapter, Guest, eventually, frame, mac, text};

fn pair() -> (Adapter, Guest, Guest) {
    let mut adapter = Adapter::new(3);
    let (left, right) = (adapter.guest(0), adapter.guest(1));
    (adapter, left, right)
}

#[test]
fn frames_go_both_ways_many_times_around_the_rings() {
    let (mut adapter, mut left, mut right) = pair();
    for round in 0..100 {
        let ping = frame(mac(0x11), mac(0x10), &format!("ping {round}"));
        left.send(&ping);
        assert_eq!(right.receive().bytes, ping);
        let pong = frame(mac(0x10), mac(0x11), &format!("pong {round}"));
        right.send(&pong);
        assert_eq!(left.receive().bytes, pong);
    }
    // Statistics: frames, bytes, from a VF of the same adapter.
    let count = |guest: &mut Guest, offset| guest.read(offset);
    assert_eq!([0xf10, 0xf14, 0xf18, 0xf40].map(|at| count(&mut left, at)), [100, 100, 6000, 100]);
    assert_eq!((adapter.counters(0).sent, adapter.counters(0).received), (100, 100));
    assert_eq!((left.vf.dma_errors(), right.vf.dma_errors()), (0, 0));
}

#[test]
fn interrupts_come_on_the_vectors_that_the_driver_chose() {
    let (mut adapter, mut left, mut right) = pair();
    let fired = |guest: &Guest, vector: usize| eventually(|| guest.vectors[vector].read().is_ok());
    // Clear interrupts of the probe and enable them again, as a handler does.
    for guest in [&mut left, &mut right] {
        guest.vectors.iter().for_each(|vector| drop(vector.read()));
        guest.write(0x1524, 7);
    }
    left.send(&frame(mac(0x11), mac(0x10), "one"));
    assert!(fired(&left, 0) && fired(&right, 1));
    right.receive();
    // The last message masked the interrupt until the driver enables it.
    left.send(&frame(mac(0x11), mac(0x10), "two"));
    right.receive();
    assert!(right.vectors[1].read().is_err());
    right.write(0x1524, 2);
    assert!(fired(&right, 1));
    // A change of the PF's link: a message on the mailbox's vector, and the link's state.
    adapter.pf.set_link(false).unwrap();
    assert!(fired(&right, 2));
    assert_eq!(right.read(8) & 2, 0);
    assert_eq!(right.read(0x800), 0x2000_0100);
    adapter.pf.set_link(true).unwrap();
    assert!(eventually(|| right.read(8) & 2 != 0));
}

#[test]
fn forged_frames_do_not_arrive() {
    let (mut adapter, mut left, mut right) = pair();
    left.send(&frame(mac(0x11), mac(0x99), "forged"));
    left.send(&frame(mac(0x11), mac(0x10), "honest"));
    assert_eq!(text(&right.receive()), "honest");
    assert_eq!(adapter.counters(0).spoofed, 1);
    adapter.apply(0, VfChange::SpoofCheck(false));
    left.send(&frame(mac(0x11), mac(0x99), "forged"));
    assert_eq!(text(&right.receive()), "forged");
    // The guest receives for the device's address, not for the one that its driver uses.
    adapter.apply(1, VfChange::Mac(Some(mac(0x22))));
    left.send(&frame(mac(0x11), mac(0x10), "lost"));
    left.send(&frame(mac(0x22), mac(0x10), "found"));
    assert_eq!(text(&right.receive()), "found");
}

#[test]
fn tags_of_the_guest_and_of_its_port() {
    let (mut adapter, mut left, mut right) = pair();
    for guest in [&mut left, &mut right] {
        assert_eq!(guest.driver.call(&[0x1_0004, 100]), Ok(0xa001_0004));
    }
    let to_right = |text: &str| frame(mac(0x11), mac(0x10), text);
    left.send_tagged(&to_right("by descriptor"), 0x6064);
    let received = right.receive();
    assert_eq!((text(&received), received.tag), ("by descriptor", Some(0x6064)));
    let mut inside = to_right("in the frame");
    inside.splice(12..12, [0x81, 0, 0, 100]);
    left.send(&inside);
    let received = right.receive();
    assert_eq!((text(&received), received.tag), ("in the frame", Some(100)));
    left.send_tagged(&to_right("not joined"), 101);
    left.send(&to_right("untagged"));
    assert_eq!(text(&right.receive()), "untagged");
    // Access ports: neither guest sees a tag.
    for vf in [0, 1] {
        adapter.apply(vf, VfChange::Vlan(PortVlan { id: 7, ..PortVlan::default() }));
    }
    left.send(&to_right("access"));
    let received = right.receive();
    assert_eq!((text(&received), received.tag), ("access", None));
    assert_eq!(left.driver.call(&[0x1_0004, 7]), Ok(0x6001_0004));
    adapter.apply(1, VfChange::Vlan(PortVlan { id: 8, ..PortVlan::default() }));
    left.send(&to_right("other VLAN"));
    adapter.apply(1, VfChange::Vlan(PortVlan { id: 7, ..PortVlan::default() }));
    left.send(&to_right("same VLAN"));
    assert_eq!(text(&right.receive()), "same VLAN");
}

/// Ethernet, IPv4, TCP, with the pseudo header's sum that Linux leaves for segmentation.
fn tcp(payload: usize) -> Vec<u8> {
    let mut packet = frame(mac(0x11), mac(0x10), "");
    packet.truncate(12);
    packet.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9, 0x50, 0x18, 0x20, 0]);
    // 10.0.0.1 + 10.0.0.2 + 6.
    packet.extend([0x14, 0x09, 0, 0]);
    packet.extend((0..payload).map(|byte| byte as u8));
    packet
}

#[test]
fn a_great_packet_is_cut_to_segments_with_their_checksums() {
    let (_adapter, mut left, mut right) = pair();
    let packet = tcp(20_000);
    left.fill(&packet);
    // MAC 14, IP 20; TCP, IPv4; MSS 1448, TCP 20. The packet in two pieces.
    let context = [14 << 9 | 20, 0, 0x2020_0000 | 1 << 11 | 1 << 10, 1448 << 16 | 20 << 8];
    let [low, _, command, status] = Guest::data(packet.len(), 1 << 31, 1 << 8 | 1 << 9);
    let without_end = (command & !(1 << 24 | 1 << 27 | 0xffff)) | 12_000;
    let rest = (command & !0xffff) | (packet.len() as u32 - 12_000);
    left.put(&[context, [low, 0, without_end, status], [low + 12_000, 0, rest, 0]]);
    assert!(left.reported());
    let sum = |bytes: &[u8]| {
        let sum = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum::<u32>();
        (sum & 0xffff) + (sum >> 16)
    };
    let mut together = Vec::new();
    while together.len() < 20_000 {
        let bytes = right.receive().bytes;
        let length = usize::from(bytes[16]) << 8 | usize::from(bytes[17]);
        assert_eq!(sum(&bytes[14..34]) % 0xffff, 0, "IP checksum");
        let tcp = &bytes[34..14 + length];
        assert_eq!((sum(tcp) + 0x1409 + tcp.len() as u32) % 0xffff, 0, "TCP checksum");
        together.extend_from_slice(&tcp[20..]);
    }
    assert_eq!(together, packet[54..]);
    assert_eq!(left.read(0xf14), 20_000u32.div_ceil(1448));
}

#[test]
fn jumbo_frames_take_several_buffers_and_split_headers() {
    let (_adapter, mut left, mut right) = pair();
    let mut long = frame(mac(0x11), mac(0x10), "");
    long.extend((0..9000).map(|byte| (byte * 3) as u8));
    left.send(&long);
    left.send(&frame(mac(0x11), mac(0x10), "too long before"));
    assert_eq!(text(&right.receive()), "too long before");
    assert_eq!(right.driver.call(&[5, 9728]), Ok(0xa000_0005));
    left.send(&long);
    assert_eq!(right.receive().bytes, long);
    // As in igbvf with a large MTU: header split always, 128 bytes, pieces of 2 KiB.
    right.write(0x2828, 0);
    right.open(0x0a00_0202);
    left.send(&long);
    assert_eq!(right.receive().bytes, long);
    left.send(&frame(mac(0x11), mac(0x10), "short"));
    assert_eq!(text(&right.receive()), "short");
}

#[test]
fn a_receiver_without_buffers_loses_its_own_frames_only() {
    let (mut adapter, mut left, mut right) = pair();
    let mut third = adapter.guest(2);
    right.write(0x2828, 0);
    for round in 0..300 {
        left.send(&frame(mac(0x11), mac(0x10), &format!("{round}")));
    }
    left.send(&frame(mac(0x12), mac(0x10), "for the third"));
    assert_eq!(text(&third.receive()), "for the third");
    assert_eq!(right.read(0xf10), 0);
}

#[test]
fn without_bus_mastering_nothing_is_read_or_written() {
    let (_adapter, mut left, mut right) = pair();
    right.vf.config_write(4, &[2, 0]);
    left.send(&frame(mac(0x11), mac(0x10), "lost"));
    left.vf.config_write(4, &[2, 0]);
    left.fill(&frame(mac(0x11), mac(0x10), "waits"));
    left.put(&[Guest::data(60, 0, 0)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(left.driver.bus.read(0x3810), 1);
    right.vf.config_write(4, &[6, 0]);
    left.vf.config_write(4, &[6, 0]);
    assert_eq!(text(&right.receive()), "waits");
}
