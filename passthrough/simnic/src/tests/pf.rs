// SPDX-License-Identifier: Apache-2.0

//! The PF alone: the answers of its mailbox and the effects of its filters.

use std::time::Duration;

use netpolicy::MacAddress;
use sriov::{PfControl, PfError, PortVlan, TagProtocol, VfChange, VfLink};

use super::fixture::{Adapter, frame, mac};
use crate::{
    SimPfState,
    pf::{Frame, Port},
};

const BROADCAST: MacAddress = MacAddress::new([0xff; 6]);

fn words(message: &[u32]) -> [u32; 16] {
    let mut words = [0; 16];
    words[..message.len()].copy_from_slice(message);
    words
}

/// A PF with VFs that have the addresses 02:…:10, 02:…:11 and so on, set by the administrator, and are reset.
fn pf(vfs: u16) -> SimPfState {
    let mut pf = SimPfState::new(vfs);
    for vf in 0..vfs {
        pf.set(vf, VfChange::Mac(Some(mac(0x10 + vf as u8)))).unwrap();
        say(&mut pf, vf, &[1]);
    }
    pf
}

fn say(pf: &mut SimPfState, vf: u16, message: &[u32]) -> Option<u32> {
    pf.message(vf, &words(message), Duration::from_secs(10)).map(|reply| reply.first())
}

/// The destinations of a frame.
fn ports(pf: &mut SimPfState, vf: u16, bytes: &[u8], tag: Option<u16>) -> Vec<(Port, Option<u16>)> {
    let mut ports = Vec::new();
    pf.transmit(vf, Frame { tag, bytes }, Duration::ZERO, &mut |port, frame| ports.push((port, frame.tag)));
    ports
}

#[test]
fn before_a_reset_there_is_silence_and_then_a_refusal() {
    let mut pf = SimPfState::new(1);
    let mut say = |word, millis| {
        pf.message(0, &words(&[word]), Duration::from_millis(millis)).map(|reply| reply.first())
    };
    assert_eq!(say(1, 0), Some(0x4000_0001), "no address");
    assert_eq!(say(5, 1), Some(0xa000_0005));
    pf.vf_reset(0, Duration::from_millis(10));
    let mut say = |word, millis| {
        pf.message(0, &words(&[word]), Duration::from_millis(millis)).map(|reply| reply.first())
    };
    assert_eq!(say(5, 2010), None);
    assert_eq!(say(5, 2011), Some(0x4000_0005));
    assert_eq!(say(5, 2012), None);
    assert_eq!(say(0x8000_0001, 2013), None, "an answer is not answered");
    assert_eq!(say(0x1_0001, 4100), Some(0x4001_0001), "no reset");
}

#[test]
fn an_own_address_ends_with_a_reset_and_filters_do_not() {
    let mut pf = SimPfState::new(2);
    say(&mut pf, 0, &[1]);
    say(&mut pf, 1, &[1]);
    assert_eq!(say(&mut pf, 0, &[2, 0x2, 0x2200]), Some(0xa000_0002));
    assert_eq!(say(&mut pf, 0, &[0x2_0002, 0x2, 0x3300]), Some(0xa002_0002));
    let to = |pf: &mut SimPfState, last| {
        pf.set(1, VfChange::SpoofCheck(false)).unwrap();
        ports(pf, 1, &frame(mac(last), mac(9), ""), None)
    };
    assert_eq!(to(&mut pf, 0x22), [(Port::Vf(0), None)]);
    assert_eq!(to(&mut pf, 0x33), [(Port::Vf(0), None)]);
    pf.vf_reset(0, Duration::ZERO);
    assert_eq!(pf.settings()[&0].mac, None);
    say(&mut pf, 0, &[1]);
    assert_eq!(to(&mut pf, 0x22), [(Port::Uplink, None)]);
    assert_eq!(to(&mut pf, 0x33), [(Port::Vf(0), None)], "a filter outlives the guest");
    assert_eq!(say(&mut pf, 0, &[0x1_0002, 0, 0]), Some(0x6001_0002), "as igbvf sends it");
    assert_eq!(say(&mut pf, 0, &[0x1_0002, 0x2, 0x2200]), Some(0xa001_0002));
    assert_eq!(to(&mut pf, 0x33), [(Port::Uplink, None)]);
}

/// The state that the PF keeps for a VF over each kind of reset, so that the simulation is never kinder than the
/// hardware. In igb (Linux 6.12, `igb_main.c`), `igb_vf_reset` clears VLANs, hashes and flags, `igb_vf_reset_event`
/// also an address that the VF chose itself. Filters stay in `vf_macs`, and no reset writes VMOLR.RLPML or the
/// administrator's settings.
#[test]
fn each_reset_clears_what_igb_clears_and_nothing_else() {
    // (setting, kept over the reset message, kept over VTCTRL.RST and FLR)
    let kept = [
        ("own address", true, false),
        ("administrator's address", true, true),
        ("further address", true, true),
        ("longest frame", true, true),
        ("VLAN", false, false),
        ("multicast hash", false, false),
        ("all multicast", false, false),
        ("rate, spoof check and trust", true, true),
    ];
    for (setting, over_message, over_reset) in kept {
        for (name, reset, expect) in [("message", false, over_message), ("reset", true, over_reset)] {
            let mut pf = SimPfState::new(2);
            say(&mut pf, 0, &[1]);
            say(&mut pf, 1, &[1]);
            pf.set(1, VfChange::SpoofCheck(false)).unwrap();
            let group = MacAddress::new([1, 0, 0x5e, 0, 0, 0x11]);
            let (mut to, mut len, mut tag) = (mac(0x22), 64, None);
            let own = [2, 0x2, 0x2200];
            match setting {
                "own address" => drop(say(&mut pf, 0, &own)),
                "further address" => drop(say(&mut pf, 0, &[0x2_0002, 0x2, 0x2200])),
                "multicast hash" => (to, _) = (group, say(&mut pf, 0, &[0x1_0003, 0x110])),
                "all multicast" => (to, _) = (group, say(&mut pf, 0, &[0x2_0006])),
                _ => pf.set(0, VfChange::Mac(Some(mac(0x22)))).unwrap(),
            }
            match setting {
                "longest frame" => (len, _) = (3000, say(&mut pf, 0, &[5, 9000])),
                "VLAN" => (tag, _) = (Some(100), say(&mut pf, 0, &[0x1_0004, 100])),
                "rate, spoof check and trust" => {
                    pf.set(0, VfChange::TxRate { min: 0, max: 50 }).unwrap();
                    pf.set(0, VfChange::SpoofCheck(false)).unwrap();
                    pf.set(0, VfChange::Trust(true)).unwrap();
                }
                _ => {}
            }
            let has = |pf: &mut SimPfState| {
                let settings = pf.settings().remove(&0).unwrap();
                let shown = (settings.max_tx_rate, settings.spoof_check, settings.trust);
                let bytes = frame(to, mac(9), &"x".repeat(len));
                let arrives = ports(pf, 1, &bytes, tag).iter().any(|(port, _)| *port == Port::Vf(0));
                arrives
                    && (setting != "rate, spoof check and trust" || shown == (50, Some(false), Some(true)))
            };
            assert!(has(&mut pf), "{setting} is not set");
            if reset {
                pf.vf_reset(0, Duration::ZERO);
            }
            say(&mut pf, 0, &[1]);
            assert_eq!(has(&mut pf), expect, "{setting} over a {name}");
        }
    }
}

#[test]
fn tables_are_bounded() {
    let mut pf = pf(4);
    for vf in 0..4 {
        pf.set(vf, VfChange::Trust(true)).unwrap();
    }
    let accepted = |pf: &mut SimPfState, vf, message: &[u32]| say(pf, vf, message).unwrap() & 1 << 31 != 0;
    // 24 addresses, of which igb takes 4 for itself and one for each VF.
    let filters =
        (0..100).filter(|n| accepted(&mut pf, (n % 4) as u16, &[0x2_0002, 0x2, 0x4000 + n])).count();
    assert_eq!(filters, 16);
    pf.set(3, VfChange::Vlan(PortVlan { id: 4000, ..PortVlan::default() })).unwrap();
    let vlans = (100..300).filter(|vlan| accepted(&mut pf, 0, &[0x1_0004, *vlan])).count();
    assert_eq!(vlans, 31);
    assert!(accepted(&mut pf, 1, &[0x1_0004, 4000]), "one that is in the table");
    assert!(accepted(&mut pf, 0, &[0x0004, 100]) && accepted(&mut pf, 1, &[0x1_0004, 555]));
}

#[test]
fn who_gets_a_frame() {
    // (changes and messages, from VF 0 with this tag, to, expected)
    let check = |messages: &[(u16, &[u32])], tag, to: MacAddress, expect: &[Port]| {
        let mut pf = pf(3);
        for (vf, message) in messages {
            say(&mut pf, *vf, message).unwrap();
        }
        let found: Vec<Port> =
            ports(&mut pf, 0, &frame(to, mac(0x10), ""), tag).into_iter().map(|(port, _)| port).collect();
        assert_eq!(found, expect, "{to} {messages:x?}");
    };
    let (one, two, wire) = (Port::Vf(1), Port::Vf(2), Port::Uplink);
    let group = |last| MacAddress::new([1, 0, 0x5e, 0, 0, last]);
    check(&[], None, mac(0x11), &[one]);
    check(&[], None, mac(0x10), &[]);
    check(&[], None, mac(0x44), &[wire]);
    check(&[], None, BROADCAST, &[one, two, wire]);
    check(&[], Some(0), mac(0x11), &[one]);
    check(&[], None, group(0x11), &[wire]);
    // The hash of 01:00:5e:00:00:11 is 0x110.
    check(&[(2, &[0x1_0003, 0x110])], None, group(0x11), &[two, wire]);
    check(&[(2, &[0x1_0003, 0x110])], None, group(0x12), &[wire]);
    // All VFs share one hash table.
    check(&[(2, &[0x1_0003, 0x110]), (1, &[0x1_0003, 0x999])], None, group(0x11), &[one, two, wire]);
    check(&[(2, &[0x1_0003, 0x110]), (2, &[3])], None, group(0x11), &[wire]);
    check(&[(1, &[0x1f_0003])], None, group(0x11), &[one, wire]);
    check(&[(1, &[0x2_0006])], None, group(0x11), &[one, wire]);
    check(&[(1, &[0x2_0006])], None, mac(0x12), &[two]);
    check(&[(0, &[0x1_0004, 7]), (1, &[0x1_0004, 7])], Some(7), BROADCAST, &[one, wire]);
    check(&[(0, &[0x1_0004, 7]), (1, &[0x1_0004, 7])], Some(7), mac(0x12), &[wire]);
    check(&[(1, &[0x1_0004, 7])], Some(7), mac(0x11), &[]);
    check(&[(1, &[5, 63])], None, mac(0x11), &[wire]);
    check(&[(1, &[5, 64])], None, mac(0x11), &[one]);
}

#[test]
fn tags_are_put_in_and_taken_out_for_access_ports_only() {
    let mut pf = pf(3);
    for vf in [0, 1] {
        pf.set(vf, VfChange::Vlan(PortVlan { id: 7, qos: 3, ..PortVlan::default() })).unwrap();
    }
    say(&mut pf, 2, &[0x1_0004, 7]);
    assert_eq!(say(&mut pf, 1, &[0x1_0004, 9]), Some(0x6001_0004), "the administrator's tag stays");
    let mut got = Vec::new();
    let bytes = frame(BROADCAST, mac(0x10), "access");
    pf.transmit(0, Frame { tag: None, bytes: &bytes }, Duration::ZERO, &mut |port, frame| {
        got.push((port, frame.tag, frame.bytes.to_vec()));
    });
    assert_eq!(got[0], (Port::Vf(1), None, bytes.clone()));
    assert_eq!(got[1], (Port::Vf(2), Some(0x6007), bytes.clone()));
    let mut wire = bytes.clone();
    wire.splice(12..12, [0x81, 0, 0x60, 7]);
    assert_eq!(got[2], (Port::Uplink, None, wire.clone()));
    // The same from the wire.
    let mut got = Vec::new();
    pf.receive(&wire, &mut |port, frame| got.push((port, frame.tag, frame.bytes.to_vec())));
    let expect = [(0, None), (1, None), (2, Some(0x6007))];
    assert_eq!(got, expect.map(|(vf, tag)| (Port::Vf(vf), tag, bytes.clone())));
    // Untagged frames from the wire do not reach access ports, and a tag of its own does not get a VF out of its VLAN.
    let mut got = Vec::new();
    pf.receive(&bytes, &mut |port, _| got.push(port));
    assert_eq!(got, [Port::Vf(2)]);
    for check in [true, false] {
        pf.set(0, VfChange::SpoofCheck(check)).unwrap();
        assert_eq!(ports(&mut pf, 0, &bytes, Some(9)), []);
        assert_eq!(ports(&mut pf, 0, &bytes, Some(7)), []);
    }
}

#[test]
fn forged_frames_are_dropped_while_they_are_checked_for() {
    let check = |pf: &mut SimPfState, from, tag, passes: bool| {
        let before = pf.counters()[&0].spoofed;
        assert_eq!(!ports(pf, 0, &frame(mac(0x11), from, ""), tag).is_empty(), passes, "{from} {tag:?}");
        assert_eq!(pf.counters()[&0].spoofed - before, u64::from(!passes));
    };
    let mut pf = pf(2);
    let pf = &mut pf;
    check(pf, mac(0x10), None, true);
    check(pf, mac(0x11), None, false);
    check(pf, MacAddress::ZERO, None, false);
    check(pf, mac(0x10), Some(5), false);
    pf.set(0, VfChange::Trust(true)).unwrap();
    say(pf, 0, &[0x2_0002, 0x2, 0x9900]);
    check(pf, mac(0x99), None, true);
    pf.set(0, VfChange::SpoofCheck(false)).unwrap();
    check(pf, mac(0x77), None, true);
    check(pf, mac(0x77), Some(5), true);
    // The administrator's change of the address takes effect at once.
    pf.set(0, VfChange::SpoofCheck(true)).unwrap();
    pf.set(0, VfChange::Mac(Some(mac(0x55)))).unwrap();
    check(pf, mac(0x10), None, false);
    check(pf, mac(0x55), None, true);
}

#[test]
fn the_agent_gets_the_answers_of_igb() {
    let mut adapter = Adapter::new(2);
    let pf = &mut adapter.pf;
    assert_eq!((pf.name(), pf.about().vfs, pf.about().uplink), ("sim0", 2, false));
    assert_eq!(pf.capabilities().unwrap().driver, netpolicy::SIMULATED);
    let vlan = PortVlan { id: 7, qos: 3, protocol: TagProtocol::Dot1Q };
    let changes = [
        VfChange::Mac(Some(mac(1))),
        VfChange::Vlan(vlan),
        VfChange::SpoofCheck(false),
        VfChange::Trust(true),
        VfChange::TxRate { min: 0, max: 100 },
    ];
    pf.apply(1, &changes).unwrap();
    let settings = pf.read(1).unwrap();
    assert!(changes.iter().all(|change| change.holds(&settings)), "{settings:?}");
    assert_eq!(pf.read(0).unwrap().mac, None);
    let refused = |error: PfError| matches!(error, PfError::Refused { .. });
    let unsupported = |error: PfError| matches!(error, PfError::Unsupported { .. });
    let no_vf = |error: PfError| matches!(error, PfError::NoVf { vf: 2, .. });
    assert!(refused(pf.set(0, VfChange::Mac(Some(BROADCAST))).unwrap_err()));
    assert!(refused(pf.set(0, VfChange::TxRate { min: 1, max: 10 }).unwrap_err()));
    assert!(unsupported(pf.set(0, VfChange::Link(VfLink::Disable)).unwrap_err()));
    let service = PortVlan { protocol: TagProtocol::Dot1Ad, ..vlan };
    assert!(unsupported(pf.set(0, VfChange::Vlan(service)).unwrap_err()));
    assert!(no_vf(pf.set(2, VfChange::Trust(true)).unwrap_err()));
    assert!(no_vf(pf.read(2).unwrap_err()));
    assert!(no_vf(pf.attach(2).unwrap_err()));
    assert!(no_vf(pf.detach(2).unwrap_err()));
    // A returning agent finds everything unchanged.
    let mut again = crate::SimPf::connect(pf.path()).unwrap();
    assert_eq!(again.read_all().unwrap(), pf.read_all().unwrap());
}
