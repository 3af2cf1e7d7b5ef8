// SPDX-License-Identifier: Apache-2.0

//! Resets, and the end of either side.

use passthrough::hardware::{IrqKind, VfHardware};

use super::fixture::{Adapter, eventually, frame, mac, text};
use crate::SimPf;

#[test]
fn after_a_function_reset_there_is_no_dma_until_the_driver_is_back() {
    let mut adapter = Adapter::new(2);
    let (mut left, mut right) = (adapter.guest(0), adapter.guest(1));
    right.vf.reset().unwrap();
    // A new boot reuses the memory: no byte of it may change.
    let snapshot = |guest: &super::fixture::Guest| {
        use vm_memory::{Bytes, GuestAddress};
        let mut bytes = vec![0; super::fixture::MEMORY];
        guest.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    let before = snapshot(&right);
    assert!(eventually(|| adapter.counters(1).resets >= 3), "two by its driver's probe, and this one");
    for _ in 0..50 {
        left.send(&frame(mac(0x11), mac(0x10), "old"));
    }
    assert_eq!((right.read(0x2828), right.read(0x1524), right.read(0x2800)), (0, 0, 0));
    assert!(snapshot(&right) == before);
    // The VF receives nothing until the reset message, whatever the state of its queues.
    right.probe();
    assert_eq!(right.driver.netdev, mac(0x11));
    left.send(&frame(mac(0x11), mac(0x10), "new"));
    assert_eq!(text(&right.receive()), "new");
}

#[test]
fn flr_by_configuration_space_is_one_too() {
    let mut adapter = Adapter::new(1);
    let mut guest = adapter.guest(0);
    guest.vf.config_write(0xa8, &[0, 0x80]);
    let mut command = [0xff; 2];
    guest.vf.config_read(4, &mut command);
    assert_eq!((command, guest.read(0x3828)), ([0, 0], 0));
}

#[test]
fn joined_vlans_and_hashes_end_with_a_reset() {
    let mut adapter = Adapter::new(2);
    let (mut left, mut right) = (adapter.guest(0), adapter.guest(1));
    for guest in [&mut left, &mut right] {
        guest.driver.call(&[0x1_0004, 100]).unwrap();
    }
    left.send_tagged(&frame(mac(0x11), mac(0x10), "joined"), 100);
    assert_eq!(text(&right.receive()), "joined");
    right.driver.reset().unwrap();
    right.open(0x0200_0002);
    left.send_tagged(&frame(mac(0x11), mac(0x10), "left"), 100);
    left.send(&frame(mac(0x11), mac(0x10), "untagged"));
    assert_eq!(text(&right.receive()), "untagged");
}

#[test]
fn a_vf_without_its_pf_has_no_link_and_says_so() {
    let mut adapter = Adapter::new(1);
    let mut guest = adapter.guest(0);
    let failed = guest.vf.error_event().unwrap();
    assert!(failed.read().is_err() && guest.read(8) & 2 != 0);
    // Another holder gets the VF: the first one's guest loses it.
    let resets = adapter.counters(0).resets;
    let (_other, _) = adapter.vf(0, mac(0x10));
    assert!(adapter.counters(0).resets > resets);
    assert!(eventually(|| failed.read().is_ok()));
    assert_eq!(guest.read(8) & 2, 0);
    // The guest does not hang: frames are lost, and messages have no answer.
    guest.send(&frame(mac(0x11), mac(0x10), "nowhere"));
    guest.write(0x800, 5);
    guest.write(0xc40, 1);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(guest.read(0xc40) & 0x30, 0);
}

#[test]
fn a_vmm_that_ends_leaves_its_vf_reset() {
    let mut adapter = Adapter::new(2);
    let mut left = adapter.guest(0);
    let right = adapter.guest(1);
    let resets = adapter.counters(1).resets;
    drop(right);
    assert!(eventually(|| adapter.counters(1).resets > resets));
    left.send(&frame(mac(0x11), mac(0x10), "nobody"));
    assert_eq!(adapter.counters(1).received, 0);
}

#[test]
fn the_pf_outlives_its_agent_and_ends_when_it_has_nobody() {
    use std::time::Duration;

    use crate::pf::{Options, listen, serve};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let listener = listen(&path).unwrap();
    let linger = Some(Duration::from_millis(100));
    let options = Options { name: "sim0".into(), vfs: 1, listener, tap: None, linger };
    let thread = std::thread::spawn(move || serve(options));
    let mut agent = SimPf::connect(&path).unwrap();
    let connection = agent.attach(0).unwrap();
    drop(agent);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!thread.is_finished(), "it has a VF");
    drop(connection);
    assert!(eventually(|| thread.is_finished()));
    thread.join().unwrap().unwrap();
}

#[test]
fn vectors_lead_nowhere_after_a_reset() {
    let mut adapter = Adapter::new(1);
    let mut guest = adapter.guest(0);
    let fire = |guest: &mut super::fixture::Guest| {
        guest.vectors.iter().for_each(|vector| drop(vector.read()));
        guest.write(0x1524, 7);
        guest.write(0x1520, 7);
        guest.vectors.each_ref().map(|vector| vector.read().is_ok())
    };
    assert_eq!(fire(&mut guest), [true; 3]);
    guest.vf.disable_irqs(IrqKind::Msix).unwrap();
    assert_eq!(fire(&mut guest), [false; 3]);
    guest.vf.enable_irqs(IrqKind::Msix, &guest.vectors).unwrap();
    assert_eq!(fire(&mut guest), [true; 3]);
    guest.vf.reset().unwrap();
    assert_eq!(fire(&mut guest), [false; 3]);
    assert!(guest.vf.enable_irqs(IrqKind::Msi, &[]).is_err());
    let four = [0; 4].map(|_| guest.vectors[0].try_clone().unwrap());
    assert!(guest.vf.enable_irqs(IrqKind::Msix, &four).is_err());
}
