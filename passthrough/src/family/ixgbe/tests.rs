// SPDX-License-Identifier: Apache-2.0

//! The relay between the stock driver and ixgbe: dialogues word by word, and the habits of both drivers.

use std::{sync::Arc, time::Duration};

use netpolicy::{Change, MacAddress, OnDenied, PromiscuousMode, Reason, Request, VlanId};

use crate::{
    channel::mailbox::{
        channel::MailboxChannel,
        register_bits::{CONTROL_RST, PFSTS},
        vf_mailbox::Clock,
    },
    family::Family,
    function::BarHandler,
    hardware::VfHardware,
    relay::{
        Config, Decision, How, RelayEvent,
        testing::{
            Bench, Bus, FakeClock, FakeVf,
            ixgbe::Ixgbe,
            ixgbe_driver::{IxgbevfDriver, dpdk_interrupt},
        },
    },
};

type Driver = IxgbevfDriver<Bench>;

const LOCAL: Decision = Decision::Grant { how: How::Local };
const FORWARD: Decision = Decision::Grant { how: How::Forward };
const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const RESET: &str = "1 -> 80000001,2,1100,0";
const LOST: (u32, u32) = (PFSTS, 0x100);

fn mac(last: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, last])
}

fn refuse(tell: OnDenied) -> Decision {
    Decision::Refuse { tell, reason: Reason::MacChangesRejected }
}

/// The decisions of a permissive policy, as the switch makes them.
fn permissive(request: &Request) -> Option<Decision> {
    Some(match request {
        Request::SetMulticast { .. }
        | Request::SetVlan { .. }
        | Request::SetMaxFrame(_)
        | Request::SetPromiscuous(_) => FORWARD,
        _ => LOCAL,
    })
}

fn machine() -> (Bench, Driver) {
    let bench = Bench::of(&Ixgbe, mac(0x11), Config::default());
    bench.policy(permissive);
    let driver = Driver::new(bench.clone());
    (bench, driver)
}

/// A guest whose interface is up.
fn guest() -> (Bench, Driver) {
    let (bench, mut driver) = machine();
    driver.probe().expect("probe");
    driver.up(&[0x111]).expect("up");
    driver.told();
    bench.events();
    (bench, driver)
}

/// The messages that the PF has received since `from`, up to their last word that is not zero.
fn received(bench: &Bench, from: usize) -> Vec<Vec<u32>> {
    let trimmed = |words: &[u32; 16]| {
        words[..words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1)].to_vec()
    };
    bench.vf().pf().received[from..].iter().map(trimmed).collect()
}

fn heard(bench: &Bench) -> usize {
    bench.vf().pf().received.len()
}

/// The mailbox's PFSTS, and word 0.
fn mailbox(bench: &Bench) -> (u32, u32) {
    let mut bus = bench.clone();
    (bus.read(0x2fc) & PFSTS, bus.read(0x200))
}

const AGREEMENT: [&str; 5] =
    ["8,8,0 -> 60000008", "8,7,0 -> 60000008", "8,6,0 -> 60000008", "8,5,0 -> 60000008", "8,4,0 -> a0000008"];

#[test]
fn probe() {
    let (bench, mut driver) = machine();
    driver.probe().expect("probe");
    let expected = [&[RESET], &AGREEMENT[..], &["9,0,0,0,0 -> a0000009,2,2,0,0"]].concat();
    assert_eq!(driver.told(), expected);
    assert_eq!((driver.mac, driver.version), (mac(0x11), Some(4)));
    // Version 1.4 and higher never reach the PF, and nothing but the reset needs a verdict.
    assert_eq!(received(&bench, 0), [vec![1], vec![8, 4], vec![9]]);
    assert_eq!(bench.requests(), [Request::Reset]);
}

#[test]
fn up_and_down() {
    let (bench, mut driver) = machine();
    driver.probe().expect("probe");
    driver.told();
    let from = heard(&bench);
    driver.up(&[0x111, 0x222, 0x333]).expect("up");
    let up = [
        "9,0,0,0,0 -> a0000009,2,2,0,0",
        "c,1 -> a000000c,1",
        "30003,2220111,333,0,0,0,0,0,0,0,0,0,0,0,0,0 -> a0030003",
        "6,0,0 -> a0000006",
        "5,5ee -> a0000005",
        "2,2,1100 -> a0000002",
        "10,0 -> a0000010,1",
    ];
    assert_eq!(driver.told(), up);
    let expected = [vec![9], vec![0xc], vec![0x3_0003, 0x222_0111, 0x333], vec![5, 0x5ee], vec![0x10]];
    assert_eq!(received(&bench, from), expected);
    let pf = bench.vf().pf();
    assert!(pf.ixgbe.receiver && pf.ixgbe.groups && pf.multicast.starts_with(&[0x111, 0x222, 0x333]));

    driver.call(&[0x1_0004, 100], 1).expect("VLAN");
    driver.call(&[4, 100], 1).expect("VLAN");
    assert_eq!(driver.told(), ["10004,64 -> a0010004", "4,64 -> a0000004"]);
    driver.reset().expect("down");
    assert_eq!(driver.told(), [&[RESET], &AGREEMENT[..]].concat());
    assert!(bench.vf().pf().multicast.is_empty());
    driver.up(&[]).expect("up");
}

#[test]
fn address_and_mtu() {
    let (bench, mut driver) = guest();
    assert_eq!(driver.set_mac(mac(0x22)), Ok(true));
    assert_eq!(driver.told(), ["2,2,2200 -> a0000002"]);
    assert_eq!(bench.vf().pf().mac, mac(0x22));
    bench.policy(|_| Some(refuse(OnDenied::Nack)));
    assert_eq!(driver.set_mac(mac(0x33)), Ok(false));
    driver.call(&[5, 9018], 1).expect("answered");
    assert_eq!(driver.told(), ["2,2,3300 -> 60000002", "5,233a -> 60000005"]);
    assert_eq!(driver.mac, mac(0x22), "EPERM, and nothing changed");
    driver.reset().expect("reset");
    assert_eq!(driver.mac, mac(0x22));
}

#[test]
fn a_silent_denial_is_silent_even_right_after_a_reset() {
    let (bench, mut driver) = machine();
    driver.probe().expect("probe");
    bench.policy(|_| Some(refuse(OnDenied::Silent)));
    // The user has set this address while the interface was down: the driver restores nothing.
    assert_eq!(driver.set_mac(mac(0x22)), Ok(true));
    assert_eq!((bench.vf().pf().mac, driver.mac), (mac(0x11), mac(0x22)));
    driver.reset().expect("reset");
    assert_eq!(driver.mac, mac(0x11), "the reply to a reset has the effective address");
}

#[test]
fn dpdk_agrees_on_the_highest_version_that_it_knows_and_may_not_ask_before() {
    let (bench, mut driver) = machine();
    driver.reset_hw().expect("reset");
    for words in [&[9, 0, 0, 0, 0][..], &[0x10, 0], &[0xc, 0]] {
        assert_eq!(driver.call(words, 1).expect("answered")[0], 0x6000_0000 | words[0]);
    }
    assert_eq!(driver.call(&[8, 4, 0], 1), Ok(vec![0xa000_0008]));
    assert_eq!(driver.call(&[9, 0, 0, 0, 0], 5), Ok(vec![0xa000_0009, 2, 2, 0, 0]));
    // A further reset ends the agreement on both sides.
    driver.reset_hw().expect("reset");
    let from = heard(&bench);
    assert_eq!(driver.call(&[9, 0, 0, 0, 0], 1), Ok(vec![0x6000_0009]));
    assert_eq!(heard(&bench), from, "the relay knows the version");
}

#[test]
fn a_change_of_trust_or_link_makes_the_guest_reset_by_two_words() {
    let revocations: [fn(&FakeVf); 2] = [|vf| Ixgbe::set_trust(vf, true), |vf| Ixgbe::set_link(vf, false)];
    for revoke in revocations {
        let (bench, mut driver) = guest();
        assert!(!driver.tick(), "the link is up");
        let (acknowledged, interrupts) = (bench.vf().pf().acknowledgements, bench.vf().pf().triggered.len());
        revoke(&bench.vf());
        bench.wait(SECOND);
        assert_eq!(bench.events(), [RelayEvent::PfReset]);
        // Both drivers see it: DPDK by the first word, Linux by the second.
        let mut bus = bench.clone();
        assert!(!driver.tick(), "no clear to send, and no nack: the driver only acknowledges");
        assert_eq!(bench.vf().pf().triggered.len(), interrupts + 2, "one interrupt for each word");
        assert_eq!(mailbox(&bench), (PFSTS, 0x4000_0000));
        assert!(driver.tick(), "a reset is scheduled");
        assert_eq!(bench.vf().pf().acknowledgements, acknowledged, "ixgbe would answer each of them");
        assert!(!dpdk_interrupt(&mut bus), "the second word is not DPDK's");
        driver.reset().expect("reset");
        driver.up(&[]).expect("up");
        bench.wait(SECOND);
        assert!(!driver.tick() && !bench.events().contains(&RelayEvent::PfReset), "no further loss");
    }
}

#[test]
fn dpdk_sees_the_first_word_exactly() {
    let (bench, _) = guest();
    Ixgbe::set_trust(&bench.vf(), true);
    bench.wait(SECOND);
    assert_eq!(mailbox(&bench), LOST);
    assert!(dpdk_interrupt(&mut bench.clone()));
}

#[test]
fn a_guest_that_never_resets_causes_no_storm() {
    let (bench, mut driver) = guest();
    let before = bench.vf().pf();
    Ixgbe::set_trust(&bench.vf(), true);
    // 10 s of a driver that reads and acknowledges as fast as interrupts would let it, and a PF whose link flaps.
    for round in 0..10_000 {
        driver.tick();
        let mut bus = bench.clone();
        bus.write(0x2fc, 0x2);
        if round % 100 == 0 {
            bench.vf().ping();
        }
        bench.wait(MS);
    }
    let after = bench.vf().pf();
    assert_eq!(after.received.len(), before.received.len());
    assert_eq!(after.acknowledgements, before.acknowledgements);
    assert!(after.triggered.len() <= before.triggered.len() + 2, "{:?}", after.triggered.len());
    assert_eq!(bench.events(), [RelayEvent::PfReset]);
}

#[test]
fn a_message_from_before_a_reset_does_not_undo_it() {
    let (bench, mut driver) = guest();
    // The PF revokes "clear to send" in the moment in which the driver resets by itself.
    let mut bus = bench.clone();
    bus.write(0, CONTROL_RST);
    Ixgbe::set_trust(&bench.vf(), true);
    driver.reset_hw().expect("reset");
    driver.negotiate();
    bench.wait(SECOND);
    assert_eq!(driver.call(&[0x10, 0], 2), Ok(vec![0xa000_0010, 1]));
    assert_eq!(bench.events(), []);
}

#[test]
fn a_refused_frame_length_does_not_leave_the_receiver_off() {
    let (bench, mut driver) = machine();
    bench.vf().with_pf(|pf| pf.ixgbe.is_82599 = true);
    driver.probe().expect("probe");
    driver.up(&[]).expect("up");
    let from = heard(&bench);
    assert_eq!(driver.call(&[5, 9018], 1), Ok(vec![0x6000_0005]), "the PF has short frames");
    assert!(bench.vf().pf().ixgbe.receiver);
    assert_eq!(received(&bench, from), [vec![5, 9018], vec![5, 0x5ee]]);
    // After a reset the driver starts again, and nothing was accepted yet.
    driver.reset().expect("reset");
    let from = heard(&bench);
    assert_eq!(driver.call(&[5, 9018], 1), Ok(vec![0x6000_0005]));
    assert_eq!(received(&bench, from), [vec![5, 9018]]);
    assert_eq!(driver.call(&[5, 0x5ee], 1), Ok(vec![0xa000_0005]));
    assert!(bench.vf().pf().ixgbe.receiver);
}

#[test]
fn an_82599_beside_long_frames_receives_after_its_frame_length() {
    let (bench, mut driver) = machine();
    bench.vf().with_pf(|pf| (pf.ixgbe.is_82599, pf.ixgbe.long_frames) = (true, true));
    driver.probe().expect("probe");
    assert!(!bench.vf().pf().ixgbe.receiver, "off until a frame length is accepted");
    driver.up(&[]).expect("up");
    assert!(bench.vf().pf().ixgbe.receiver, "the relay forwards each one");
}

#[test]
fn a_blocked_port_has_no_link() {
    let (bench, mut driver) = guest();
    Ixgbe::set_link(&bench.vf(), true);
    bench.wait(SECOND);
    driver.reset().expect("reset");
    assert_eq!(driver.call(&[0x10, 0], 2), Ok(vec![0xa000_0010, 0]));
    let pf = bench.vf().pf();
    assert!(!pf.ixgbe.receiver && !pf.ixgbe.transmitter);
}

#[test]
fn a_reset_of_the_vf_alone_silences_the_guest_though_the_pf_would_listen() {
    let (bench, mut driver) = guest();
    let mut bus = bench.clone();
    bus.write(0, CONTROL_RST);
    let from = heard(&bench);
    assert!(bench.vf().pf().clear_to_send, "ixgbe keeps it");
    assert_eq!(driver.call(&[5, 0x5ee], 1), Ok(vec![0x4000_0005]));
    assert_eq!(heard(&bench), from);
}

/// A VF that the agent scrubs, or a relay that revokes: no guest has made an agreement.
#[test]
fn changes_that_need_a_version_are_made_without_a_guest() {
    let clock = Arc::new(FakeClock::default());
    clock.sleep(10 * SECOND);
    let vf = FakeVf::of(&Ixgbe, mac(0x11), clock.clone());
    let mut ids = [0; 4];
    vf.config_read(0, &mut ids);
    let [a, b, c, d] = ids;
    let family = Family::of(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])).expect("a family");
    assert_eq!(family.driver, "ixgbevf");
    vf.with_pf(|pf| {
        pf.ixgbe.is_82599 = true;
        pf.ixgbe.long_frames = true;
        pf.ixgbe.receive_mode = 2;
    });
    let mut channel = MailboxChannel::new(family, vf.clone(), clock);
    channel.reset_vf();
    assert_eq!(channel.reset(100 * MS).expect("reset").mac, Some(mac(0x11)));
    let vlan = VlanId::new(100).expect("a VLAN");
    for change in [
        Change::LeaveVlan(vlan),
        Change::ClearUnicast,
        Change::SetMulticast(Vec::new()),
        Change::SetPromiscuous(PromiscuousMode::OFF),
        Change::SetMaxFrame(1522),
    ] {
        let reply = channel.send_change(&change, mac(0x11), 100 * MS);
        assert!(reply.is_ok_and(|reply| reply.outcome.accepted), "{change:?}");
    }
    let pf = vf.pf();
    assert_eq!((pf.ixgbe.receive_mode, pf.ixgbe.version, pf.unhandled, pf.warnings), (0, 4, 0, 0));
    assert!(pf.ixgbe.receiver);
    let agreements = pf.received.iter().filter(|words| words[0] == 8).count();
    assert_eq!(agreements, 1, "one agreement for all changes");
}

#[test]
fn interrupt_registers_pass_and_the_rest_of_the_page_does_not() {
    let (bench, _) = guest();
    let mut bus = bench.clone();
    // (offset, read from the hardware, written to the hardware)
    for (offset, read, write) in [
        (0x008, true, false), // VFSTATUS
        (0x010, true, false), // VFLINKS
        (0x048, true, false), // VFFRTIMER
        (0x100, true, true),  // VTEICR
        (0x108, true, true),  // VTEIMS
        (0x10c, false, true), // VTEIMC
        (0x110, true, true),  // VTEIAC
        (0x114, true, true),  // VTEIAM
        (0x118, false, false),
        (0x120, true, true), // VTIVAR
        (0x12c, true, true),
        (0x130, false, false),
        (0x140, true, true), // VTIVAR_MISC
        (0x144, false, false),
        (0x188, true, true), // VTRSCINT
        (0x18c, false, false),
        (0x240, false, false), // behind VFMBMEM
        (0x300, false, true),  // VFPSRTYPE
        (0x820, false, true),  // VTEITR
        (0x828, false, true),
        (0x82c, false, false),
        (0xffc, false, false),
    ] {
        let before = bench.vf().pf().passed.len();
        bus.write(offset, 0x1234_5678);
        let written = bench.vf().pf().passed.split_off(before);
        assert_eq!(written, if write { vec![(offset, 0x1234_5678)] } else { vec![] }, "{offset:#x}");
        assert_eq!(bus.read(offset) != 0, read, "{offset:#x}");
    }
    let before = bench.vf().pf().triggered.len();
    bus.write(0x104, 3);
    assert_eq!(bench.vf().pf().triggered[before..], [3]);
    bus.write(0x2fc, 0x4);
    assert!(!bench.vf().holds_buffer(), "the real mailbox is the relay's");
}

#[test]
fn accesses_that_pass_are_counted_without_a_lock() {
    let (bench, _) = guest();
    let page = bench.0.borrow().page.clone();
    let before = bench.0.borrow().relay.stats().passed;
    let held = page.lock_registers_for_test();
    // As after an interrupt: VTEIMS, twice, and VTEITR; VTEICR is read once.
    for (offset, value) in [(0x108, 1_u32), (0x108, 2), (0x820, 0x28)] {
        BarHandler::write(&*page, offset, &value.to_le_bytes());
    }
    BarHandler::read(&*page, 0x100, &mut [0; 4]);
    drop(held);
    // Accesses that do not pass are no such accesses.
    let mut bus = bench.clone();
    bus.write(0x2fc, 0x4);
    bus.write(0x118, 1);
    bus.read(0x2fc);
    bus.read(0x118);
    let after = bench.0.borrow().relay.stats().passed;
    assert_eq!((after.reads - before.reads, after.writes - before.writes), (1, 3));
}
